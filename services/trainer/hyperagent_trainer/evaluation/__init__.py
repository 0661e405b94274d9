"""Evaluation: held-out KL, the gain from conditioning on the prompt, statistics of generated adapters."""
