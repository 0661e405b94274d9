"""Entry point of the plugin: vLLM calls `register` in each of its processes.

Every interface of vLLM asks `BaseServing._check_model` whether it knows a request's model, so resolving `hyper:...` there serves
chat, completions, responses and Anthropic's messages alike. The method is not public: another release of vLLM than the ones that
were tested is refused instead of being patched blindly.
"""

from __future__ import annotations

import inspect
import os
from http import HTTPStatus
from typing import Any

import structlog

from hyperagent.errors import (
    Busy,
    ConfigError,
    HyperagentError,
    InvalidRequest,
    LimitExceeded,
    NotFound,
)
from hyperagent_vllm.adapters import PREFIX, EngineAdapters
from hyperagent_vllm.cpu_kernels import correct_cpu_kernels
from hyperagent_vllm.settings import PluginSettings, read_settings

TESTED_VERSIONS = ("0.32",)
_PARAMETERS = ["self", "request"]
_STATUS: tuple[tuple[type[HyperagentError], HTTPStatus], ...] = (
    (NotFound, HTTPStatus.NOT_FOUND),
    (LimitExceeded, HTTPStatus.BAD_REQUEST),
    (InvalidRequest, HTTPStatus.BAD_REQUEST),
    (Busy, HTTPStatus.TOO_MANY_REQUESTS),
    (HyperagentError, HTTPStatus.SERVICE_UNAVAILABLE),
)

_log = structlog.get_logger()


def register() -> None:
    """Make vLLM understand `hyper:...`, if the environment names an adapter service.

    Raises:
        ConfigError: the settings are invalid, or this vLLM is not one that was tested.
    """
    settings = read_settings()
    if settings is None:
        return
    require_known_vllm()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        correct_cpu_kernels()
    _patch(settings)


def require_known_vllm() -> None:
    """Require a release of vLLM that was tested, with the Python frontend.

    Raises:
        ConfigError: it is another one.
    """
    import vllm
    from vllm.entrypoints.serve.engine.serving import BaseServing

    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0", "false", "False"):
        raise ConfigError("hyperagent-vllm works in vLLM's Python frontend only; unset VLLM_USE_RUST_FRONTEND")
    parameters = list(inspect.signature(BaseServing._check_model).parameters)
    if not vllm.__version__.startswith(TESTED_VERSIONS) or parameters != _PARAMETERS:
        raise ConfigError(
            f"hyperagent-vllm was tested with vLLM {', '.join(TESTED_VERSIONS)}, this is {vllm.__version__}; install one of these, "
            "or unset HYPERAGENT_VLLM_SERVICE"
        )


def _patch(settings: PluginSettings) -> None:
    from vllm.entrypoints.serve.engine.serving import BaseServing

    original = BaseServing._check_model
    if getattr(original, "hyperagent", False):
        return
    known: dict[int, EngineAdapters] = {}

    async def check_model(self: Any, request: Any) -> Any:
        if not isinstance(request.model, str) or not request.model.startswith(PREFIX):
            return await original(self, request)
        if id(self.models) not in known:
            known[id(self.models)] = EngineAdapters(self.models, settings)
        try:
            request.model = await known[id(self.models)].resolve(request)
        except HyperagentError as error:
            if settings.on_failure == "base":
                _log.warning("answered without an adapter", model=request.model, error=str(error))
                request.model = self.models.base_model_paths[0].name
                return None
            status = next(status for kind, status in _STATUS if isinstance(error, kind))
            return self.create_error_response(
                message=str(error), err_type=type(error).__name__, status_code=status, param="model"
            )
        return None

    check_model.hyperagent = True  # type: ignore[attr-defined]
    BaseServing._check_model = check_model
