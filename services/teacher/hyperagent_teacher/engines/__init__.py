"""Engines that score token sequences: Transformers and vLLM, with one interface."""
