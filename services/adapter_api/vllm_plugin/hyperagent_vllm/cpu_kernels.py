"""Correct vLLM's LoRA kernels on the CPU for batches that mix requests with and without an adapter.

A request without one has the index -1, which Python takes for the last slot, so such requests were answered with the adapter in
it. Masking their inputs makes their contribution zero.
"""

from __future__ import annotations

from functools import wraps
from importlib import import_module
from typing import Any

_MODULES = ("vllm.lora.ops.torch_ops.lora_ops", "vllm.lora.ops.torch_ops", "vllm.lora.punica_wrapper.punica_cpu")
_KERNELS = ("bgmv_expand", "bgmv_shrink", "bgmv_expand_slice")
_IS_CORRECTED = "hyperagent_corrected"


def correct_cpu_kernels() -> None:
    """Replace the kernels wherever vLLM has imported them; a second call changes nothing."""
    modules = [import_module(name) for name in _MODULES]
    for kernel in _KERNELS:
        original = getattr(modules[0], kernel)
        if hasattr(original, _IS_CORRECTED):
            continue
        corrected = _corrected(original)
        for module in modules:
            if hasattr(module, kernel):
                setattr(module, kernel, corrected)


def _corrected(kernel: Any) -> Any:
    @wraps(kernel)
    def corrected(
        inputs: Any, weights: Any, output_tensor: Any, lora_indices_tensor: Any, *rest: Any, **options: Any
    ) -> Any:
        has_adapter = (lora_indices_tensor >= 0).to(inputs.dtype)
        return kernel(
            inputs * has_adapter[:, None], weights, output_tensor, lora_indices_tensor.clamp(min=0), *rest, **options
        )

    setattr(corrected, _IS_CORRECTED, True)
    return corrected
