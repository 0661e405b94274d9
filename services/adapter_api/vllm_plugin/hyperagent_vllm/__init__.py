"""vLLM plugin: `model="hyper:auto"` answers with the adapter that is generated for the conversation."""
