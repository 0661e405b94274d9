"""Conversion of a trajectory file to a tokens file: selection, split, views, tokenization."""
