"""Shard the frozen student over ranks, each of which reads only its own part of the weights.

The model is built without memory (meta device), sharded layer by layer with FSDP2, and only then filled: from each
tensor in the files a rank reads the rows that it keeps. No rank ever holds the whole student. The embedding table and
the output head stay whole on every rank, because the featurizer and the loss read them as plain tensors.

The files store routed experts separately, while transformers' models stack them; a rank reads only its own experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from hyperagent.errors import ConfigError
from hyperagent_trainer.student.meta import student_without_weights

_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Stacked tensors of routed experts, and the tensors in the files from which each expert's rows are concatenated."""
_UNUSED = ("mtp.",)
"""Prefixes of weights in the files that training does not use: Qwen3-Next's multi-token prediction."""


def load_sharded(folder: Path, mesh: DeviceMesh, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load the frozen student of a model folder, sharded over `mesh`.

    Raises:
        ConfigError: the files lack a weight of the model, hold one that the model does not have or one of another shape,
            or the model has a buffer that no file holds and that does not belong to a rotary embedding.
    """
    model = student_without_weights(folder, dtype)
    model.eval().requires_grad_(False)
    shard_student(model, mesh)
    model.to_empty(device=device)
    _make_rotary_buffers(model, device)
    model.tie_weights()
    with _Files(folder) as files:
        for name, parameter in model.named_parameters():
            _fill_(name, parameter, files)
        files.require_all_used()
    return model


def shard_student(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard the decoder over the mesh, layer by layer; the embedding table and the head stay whole."""
    decoder = model.get_decoder()
    whole = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    # The decoder is an FSDP root: training calls the decoder, never the model around it.
    fully_shard(decoder, mesh=mesh, ignored_params=whole)


def embedding_table(folder: Path, dtype: torch.dtype) -> Tensor:
    """Read the embedding table [V, E] of a student, and nothing else of its weights.

    Args:
        dtype: dtype of the returned table, whatever the folder holds.

    Raises:
        ConfigError: the folder holds no model, or its files lack the table.
    """
    model = student_without_weights(folder, dtype)
    table_VE: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    name = next(name for name, parameter in model.named_parameters() if parameter is table_VE)
    with _Files(folder) as files:
        ((_, read_VE),) = files.read(name, slice(0, len(table_VE)), tuple(table_VE.shape))
        return read_VE.to(dtype)


def _make_rotary_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the rotary embeddings' buffers: no file holds them, and `to_empty` leaves their memory uninitialized."""
    for name, module in model.named_modules():
        if module._non_persistent_buffers_set:
            if "inv_freq" not in module._non_persistent_buffers_set:
                raise ConfigError(
                    f"the student's {name} has buffers {sorted(module._non_persistent_buffers_set)} that no file holds; "
                    "run it in one process, which loads it with transformers"
                )
            fresh: nn.Module = type(module)(config=model.config.get_text_config())
            for buffer_name, buffer in fresh.named_buffers():
                setattr(module, buffer_name, buffer.to(device))


def _fill_(name: str, parameter: nn.Parameter, files: _Files) -> None:
    data: Any = parameter.data
    rows = slice(0, parameter.shape[0])
    if isinstance(data, DTensor):
        shape, offset = compute_local_shape_and_global_offset(parameter.shape, data.device_mesh, data.placements)
        rows = slice(offset[0], offset[0] + shape[0])
        data = data.to_local()
    for start, part in files.read(name, rows, tuple(parameter.shape)):
        data[start : start + len(part)].copy_(part)


class _Files:
    """The safetensors files of a model folder; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = ExitStack()
        self._slices: dict[str, Any] = {}
        self._used: set[str] = set()

    def __enter__(self) -> _Files:
        for path in sorted(self._folder.glob("*.safetensors")):
            file = self._open.enter_context(safe_open(path, framework="pt"))
            self._slices.update({name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, name: str, rows: slice, shape: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
        """Yield parts of the rows of a model's weight, each with the index at which it begins within `rows`.

        Raises:
            ConfigError: the files lack the weight or hold one of another shape.
        """
        prefix, _, last = name.rpartition(".")
        if name not in self._slices and prefix.endswith(".experts") and last in _STACKED:
            # Every rank marks all experts as used, or it would report those of other ranks as unused weights.
            self._used.update(f"{prefix}.{e}.{part}.weight" for e in range(shape[0]) for part in _STACKED[last])
            for expert in range(rows.start, rows.stop):
                parts = [self._read(f"{prefix}.{expert}.{part}.weight") for part in _STACKED[last]]
                yield expert - rows.start, self._of_shape(name, torch.cat(parts), shape[1:])[None]
            return
        self._used.add(name)
        if rows.start < rows.stop:
            yield 0, self._of_shape(name, self._read(name, rows), (rows.stop - rows.start, *shape[1:]))

    def _read(self, name: str, rows: slice = slice(None)) -> Tensor:
        if name not in self._slices:
            raise ConfigError(f"the weights in {self._folder} lack {name}; copy the model again")
        read: Tensor = self._slices[name][rows]
        return read

    def _of_shape(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tensor.shape != shape:
            raise ConfigError(
                f"the weights in {self._folder} have {list(tensor.shape)} for {name} where the model has {list(shape)}; "
                "its config.json is of another model"
            )
        return tensor

    def require_all_used(self) -> None:
        """Check that every weight in the files has been read.

        Raises:
            ConfigError: the files hold weights that the model does not have.
        """
        left = sorted(n for n in self._slices if n not in self._used and not n.startswith(_UNUSED))
        if left:
            raise ConfigError(
                f"the weights in {self._folder} hold {len(left)} tensors that the model does not have, the first is "
                f"{left[0]}; its config.json is of another model"
            )
