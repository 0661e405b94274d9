"""What autograd keeps for a backward pass, counted."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(forward: Callable[[], object], owner: nn.Module) -> int:
    """Bytes of the storages that `forward` leaves to its backward pass, each counted once, without `owner`'s parameters."""
    owned = {p.untyped_storage()._cdata for p in owner.parameters()}
    kept: dict[int, int] = {}
    held = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage.nbytes()
            # A freed storage's place would be given out again, and two would count as one.
            held.append((tensor, storage))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        held.append(forward())
    return sum(kept.values())
