"""Private copies of the adapters that the engine knows.

vLLM reads an adapter a second time from its path, inside a step of the engine and unchecked, when it was evicted from the
cache in host memory: a folder that is gone then ends the engine, and one that was changed answers for the old one. So the
engine never gets a folder that anybody else writes to, and a copy stays until the engine has unloaded the adapter.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from hyperagent.adapter_files import CONFIG_FILE, MODEL_FILE
from hyperagent.errors import CorruptRecord

Shapes = Mapping[str, tuple[int, int]]
"""Output and input size of every linear layer of the student, by module name."""

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


class Staging:
    """Folder with one subfolder for each adapter."""

    def __init__(self, root: Path | None) -> None:
        """Create the folder, readable by its owner only."""
        if root is None:
            self._root = Path(tempfile.mkdtemp(prefix="hyperagent-vllm-"))
            return
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._root = Path(tempfile.mkdtemp(prefix="engine-", dir=root))

    def write(self, adapter_id: str, model: bytes, config: bytes) -> Path:
        """Write an adapter's two files and return their folder."""
        folder = self._root / adapter_id
        folder.mkdir(mode=0o700, exist_ok=True)
        for name, content in ((MODEL_FILE, model), (CONFIG_FILE, config)):
            temporary = folder / f"{name}.partial"
            temporary.write_bytes(content)
            temporary.chmod(0o400)
            temporary.rename(folder / name)
        return folder

    def remove(self, adapter_id: str) -> None:
        """Remove an adapter that the engine has unloaded."""
        shutil.rmtree(self._root / adapter_id, ignore_errors=True)


def require_sound(model: bytes, config: bytes, shapes: Shapes, *, max_rank: int) -> None:
    """Require that an adapter is one that the engine applies as it is meant.

    vLLM checks only how module names end, copies factors that are too small into a corner, and applies nothing of modules that
    it does not know, all without a word; numbers that are not finite stay in the engine after their request.

    Args:
        shapes: of the student's layers.
        max_rank: the engine's `--max-lora-rank`.

    Raises:
        CorruptRecord: it is not.
    """
    try:
        rank = json.loads(config)["r"]
        tensors = load(model)
    except (ValueError, KeyError, SafetensorError) as error:
        raise CorruptRecord(f"the adapter cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(rank, int) or not 0 < rank <= max_rank:
        raise CorruptRecord(f"the adapter has rank {rank}, the engine takes at most {max_rank} (--max-lora-rank)")
    modules = {
        name.removeprefix(_PREFIX).removesuffix(end) for name in tensors for end in (_A, _B) if name.endswith(end)
    }
    if not modules or len(tensors) != 2 * len(modules):
        raise CorruptRecord("the adapter does not hold one pair of factors for each of its modules")
    has_effect = False
    for module in sorted(modules):
        if module not in shapes:
            raise CorruptRecord(
                f"the adapter changes {module}, which the student does not have; it belongs to another student"
            )
        a, b = tensors.get(f"{_PREFIX}{module}{_A}"), tensors.get(f"{_PREFIX}{module}{_B}")
        num_outputs, num_inputs = shapes[module]
        if a is None or b is None or a.shape != (rank, num_inputs) or b.shape != (num_outputs, rank):
            raise CorruptRecord(
                f"the adapter's factors at {module} do not fit the student's {num_outputs} x {num_inputs}"
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            raise CorruptRecord(f"the adapter's factors at {module} are not finite")
        has_effect = has_effect or (bool(torch.any(a)) and bool(torch.any(b)))
    if not has_effect:
        raise CorruptRecord("the adapter changes nothing: its factors are zero")
