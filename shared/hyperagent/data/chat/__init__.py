"""Rendering and tokenization of conversations, and the mask of the supervised tokens."""
