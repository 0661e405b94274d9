"""Hyper-Agent's shared core: what the teacher, the trainer and the adapter service must agree on, bit for bit."""

__version__ = "0.1.0"
