"""Engines that score token sequences: Transformers and vLLM behind one interface."""
