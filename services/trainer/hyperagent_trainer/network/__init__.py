"""The trained network, and the student with its adapters injected."""
