"""Exports a cache to other formats and reads them."""
