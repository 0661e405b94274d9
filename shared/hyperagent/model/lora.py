"""Apply generated LoRA factors to a frozen student without changing its modules.

Within the context, each target layer's `forward` is an instance attribute that overrides the method of its class.
Parameter names and the state dict do not change, and nothing remains after the context. The factors may carry a graph:
gradients flow through them to the network that generated them.

How the delta is added depends on the dtype of the layer's product, which is that of the weights or of autocast:

    float32, float64    the frozen product, to which the delta is added in place: `make_batched_lora_hook`
    bfloat16, float16   one product for both: `augmented_linear`

The first is faster in float32, where the addition costs no accuracy; docs/adapter.md has the figures.

Legend of shape suffixes: B samples, T tokens, I and O input and output features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperagent.errors import InvalidRequest
from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.augmented_linear import augmented_linear

ForwardHook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


def make_batched_lora_hook(pair: LoRAPair, scale: float) -> ForwardHook:
    """Return a forward hook that adds scale * x @ a.T @ b.T to the output in place, with separate factors per sample.

    The hooked layer's input must be [B, T, I] with the factors' B; padding at the end of a sample then changes
    nothing before it. With b = 0 the output keeps its bits.

    Raises (in the hook):
        InvalidRequest: the input is not [B, T, I] with as many samples as there are adapters.
    """

    def add_delta(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x_BTI = inputs[0]
        if x_BTI.dim() != 3 or len(x_BTI) != len(pair.a):
            raise InvalidRequest(
                f"an adapter batch of {len(pair.a)} met an input of shape {list(x_BTI.shape)}; give one adapter per sample"
            )
        low_BTR = torch.bmm(x_BTI, pair.a.to(x_BTI.dtype).transpose(1, 2))
        return output.baddbmm_(low_BTR, pair.b.to(output.dtype).transpose(1, 2), alpha=scale)

    return add_delta


class HookBasedLoRAInjector:
    """Applies adapters to a student for the duration of a `with` block."""

    def __init__(self, student: nn.Module, *, scale: float) -> None:
        """Look up the student's modules; `scale` is alpha / rank."""
        self._modules = dict(student.named_modules())
        self._scale = scale

    @contextmanager
    def inject(self, weights: AdapterWeights) -> Iterator[None]:
        """Apply one adapter per sample of the batch while the block runs.

        A layer's input is [B, T, I], or flattened to [B T, I] as in mixture-of-experts blocks; one adapter applies to a
        whole sample, so sequences that are packed into one sample share it.

        Under activation checkpointing (non-reentrant) the backward pass belongs inside the block too: it runs the
        layers again, and after the block they have no adapter, at which torch raises CheckpointError.

        Args:
            weights: a [B, R, I] and b [B, O, R] of the layers to adapt, in any floating dtype, on the layers' device.

        Raises:
            InvalidRequest: a factor names a module that is not a plain linear layer of the student, or does not match
                it in shape, dtype or device; the layers' adapters differ in number; a layer already has an adapter.
                Within the block: a layer's input does not divide into as many samples as there are adapters.
        """
        self._check(weights)
        zero = torch.stack([~pair.b.any() for pair in weights.values()]).tolist() if weights else []
        with ExitStack() as stack:
            for (name, pair), is_zero in zip(weights.items(), zero, strict=True):
                module = self._modules[name]
                module.forward = _adapted_forward(module, pair, self._scale, zero=is_zero)
                stack.callback(delattr, module, "forward")
            yield

    def _check(self, weights: AdapterWeights) -> None:
        counts = set()
        for name, pair in weights.items():
            module = self._modules.get(name)
            # A subclass may compute something other than x @ W.T, which the adapted forward computes.
            if type(module) is not nn.Linear:
                raise InvalidRequest(
                    f"the student has no linear layer {name!r}: the adapter was made for another student; use that one"
                )
            if "forward" in vars(module):
                raise InvalidRequest(
                    f"layer {name} already has an adapter or another wrapper of its forward; leave that context first"
                )
            _check_pair(name, pair, module)
            counts.add(len(pair.a))
        if len(counts) > 1:
            raise InvalidRequest(
                f"the layers have {sorted(counts)} adapters; give every layer one adapter per sample of the batch"
            )


def _check_pair(name: str, pair: LoRAPair, module: nn.Linear) -> None:
    if pair.a.dim() != 3 or pair.b.dim() != 3 or (len(pair.a), pair.a.shape[1]) != (len(pair.b), pair.b.shape[2]):
        raise InvalidRequest(
            f"the adapter's factors at {name} are {list(pair.a.shape)} and {list(pair.b.shape)}; "
            "give a [B, R, I] and b [B, O, R], one of each per sample"
        )
    if (pair.a.shape[2], pair.b.shape[1]) != (module.in_features, module.out_features):
        raise InvalidRequest(
            f"the adapter maps {pair.a.shape[2]} to {pair.b.shape[1]} features at {name}, but the student maps "
            f"{module.in_features} to {module.out_features}; use the student that the adapter was made for"
        )
    for factor in (pair.a, pair.b):
        if not factor.is_floating_point() or factor.device != module.weight.device:
            raise InvalidRequest(
                f"the adapter's factors at {name} are {factor.dtype} on {factor.device}, the student's weight there "
                f"{module.weight.dtype} on {module.weight.device}; give floating factors on the student's device"
            )


def _adapted_forward(module: nn.Linear, pair: LoRAPair, scale: float, *, zero: bool) -> Callable[[Tensor], Tensor]:
    """Return the function that replaces the layer's own forward."""
    add_delta = make_batched_lora_hook(pair, scale)

    def forward(x: Tensor) -> Tensor:
        x_BTI = _by_sample(x, len(pair.a))
        dtype = _product_dtype(module.weight)
        if dtype in (torch.float32, torch.float64):
            y_BTO = add_delta(module, (x_BTI,), F.linear(x_BTI, module.weight, module.bias))
        else:
            y_BTO = augmented_linear(
                x_BTI.to(dtype), module.weight, module.bias, pair.a, pair.b, scale=scale, zero=zero
            )
        return y_BTO if x.dim() == 3 else y_BTO.flatten(0, 1)

    return forward


def _by_sample(x: Tensor, num: int) -> Tensor:
    """Return the layer's input as [B, T, I]."""
    if x.dim() == 2 and len(x) % num == 0:
        return x.unflatten(0, (num, -1))
    if x.dim() == 3 and len(x) == num:
        return x
    raise InvalidRequest(
        f"an adapter batch of {num} met an input of shape {list(x.shape)}; give one adapter per sample"
    )


def _product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which `F.linear` multiplies by this weight; autocast does not convert float64."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype
