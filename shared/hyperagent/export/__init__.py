"""Export of a cache to other file formats, and import."""
