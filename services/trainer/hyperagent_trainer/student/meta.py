"""Build the student's architecture without its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hyperagent.errors import ConfigError


def student_without_weights(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model that a folder's config.json describes, on the meta device.

    Raises:
        ConfigError: the folder has no config.json of a model that transformers knows.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is not a model folder: it has no config.json; name the student's folder in the recipe"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} is not a model folder: {error}; give one with config.json and weights") from error
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model
