"""Held-out KL, what conditioning on the prompt is worth, statistics of generated adapters."""
