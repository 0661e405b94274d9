"""Load the engine that the settings name."""

from __future__ import annotations

from typing import Any

from hyperagent.errors import ConfigError
from hyperagent_teacher.config import TeacherSettings
from hyperagent_teacher.engines.base import ScoringEngine


async def load_engine(settings: TeacherSettings) -> ScoringEngine:
    """Load the model into the engine that the settings select.

    Raises:
        ConfigError: a setting, the model or the tokenizer cannot be used, or vLLM is not installed.
        ServiceError: vLLM does not start.
    """
    common: dict[str, Any] = {
        "tokenizer_folder": settings.tokenizer or settings.model,
        "top_k": settings.top_k,
        "max_tokens": settings.max_tokens,
        "temperatures": settings.row_temperatures,
        "dtype": settings.dtype,
        "head_dtype": settings.head_dtype,
    }
    # Importing either engine takes seconds, and only one of them has to be installed.
    if settings.backend == "transformers":
        from hyperagent_teacher.engines.transformers import TransformersEngine

        return TransformersEngine(settings.model, **common, device=settings.device)
    try:
        from hyperagent_teacher.engines.vllm import VllmEngine
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--backend vllm needs vLLM in this environment ({error}); install hyperagent-teacher[vllm] in a separate environment"
        ) from error
    return await VllmEngine.load(settings.model, **common, capture=settings.capture, engine_args=settings.engine_args)
