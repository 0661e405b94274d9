"""The adapter service: a prompt in, a LoRA adapter in PEFT's format out."""
