"""Names of the two files of an adapter in PEFT's format, which PEFT and vLLM load from one folder."""

MODEL_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
