"""What trainer and adapter service must agree on: targets, hypernetwork, LoRA injection, PEFT files, bundle."""
