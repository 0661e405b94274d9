"""Checkpoints: their format, which of them are kept, which is the best."""
