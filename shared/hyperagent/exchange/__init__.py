"""The cache's rows in other people's file formats, and back."""
