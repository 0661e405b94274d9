"""Applying generated LoRA factors to a frozen student without touching its modules.

Forward hooks add each sample's own delta to a layer's output, so parameter names and the state dict stay the
student's, and nothing remains once the context is left. The factors may carry a graph: gradients flow through
them to whatever generated them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from hyperagent.errors import InvalidRequest
from hyperagent.model.adapter import AdapterWeights, LoRAPair

ForwardHook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


def make_batched_lora_hook(pair: LoRAPair, scale: float) -> ForwardHook:
    """A forward hook that adds scale * x @ a.T @ b.T, with factors of its own for every sample of the batch.

    The hooked layer's input must be [B, T, I] with the factors' B: padding at the end of a sample then changes
    nothing before it.

    Raises (in the hook):
        InvalidRequest: the input is not [B, T, I] with as many samples as there are adapters.
    """
    a_BIR = pair.a.transpose(1, 2)
    b_BRO = pair.b.transpose(1, 2)

    def add_delta(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x_BTI = inputs[0]
        if x_BTI.dim() != 3 or x_BTI.shape[0] != a_BIR.shape[0]:
            raise InvalidRequest(
                f"an adapter batch of {a_BIR.shape[0]} met an input of shape {tuple(x_BTI.shape)}; give one adapter per sample"
            )
        low_BTR = torch.bmm(x_BTI, a_BIR.to(x_BTI.dtype))
        return torch.baddbmm(output, low_BTR, b_BRO.to(output.dtype), alpha=scale)

    return add_delta


class HookBasedLoRAInjector:
    """Puts adapters on a student for the length of a `with` block."""

    def __init__(self, student: nn.Module, *, scale: float) -> None:
        """Remember the student; `scale` is alpha / rank."""
        self._modules = dict(student.named_modules())
        self._scale = scale

    @contextmanager
    def inject(self, weights: AdapterWeights) -> Iterator[None]:
        """Apply one adapter per sample of the batch while the block runs.

        Raises:
            InvalidRequest: a factor names a module that the student lacks, or has another shape than it.
        """
        with ExitStack() as stack:
            for name, pair in weights.items():
                module = self._modules.get(name)
                if not isinstance(module, nn.Linear):
                    raise InvalidRequest(
                        f"the student has no linear layer {name!r}: the adapter was made for another student"
                    )
                if (pair.a.shape[-1], pair.b.shape[-2]) != (module.in_features, module.out_features):
                    raise InvalidRequest(
                        f"the adapter maps {pair.a.shape[-1]} to {pair.b.shape[-2]} features at {name}, the student {module.in_features} to {module.out_features}"
                    )
                handle = module.register_forward_hook(make_batched_lora_hook(pair, self._scale))
                stack.callback(handle.remove)
            yield
