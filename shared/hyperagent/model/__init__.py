"""The model code that trainer and adapter service share: targets, hypernetwork, LoRA injection, PEFT files, bundle."""
