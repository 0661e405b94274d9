"""Adapter service: turns a prompt into a LoRA adapter in PEFT's format."""
