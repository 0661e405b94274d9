"""Export a run's checkpoint as a bundle or a PEFT adapter."""
