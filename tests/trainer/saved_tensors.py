"""Count the bytes that autograd keeps for a backward pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(forward: Callable[[], object], owner: nn.Module) -> int:
    """Return the bytes that `forward` keeps for its backward pass; every storage counts once, `owner`'s parameters not."""
    owned = {p.untyped_storage()._cdata for p in owner.parameters()}
    kept: dict[int, int] = {}
    held = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage.nbytes()
            # The address of a freed storage could be reused, and two would count as one.
            held.append((tensor, storage))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        held.append(forward())
    return sum(kept.values())
