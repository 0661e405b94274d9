"""Turn a prompt into the features that a hypernetwork reads: vectors of the frozen student, one per token.

    embeddings   rows of the embedding table, 0.6 GB for the 80B student: a service needs no other part of the student
    hidden@K     hidden states after the first K decoder layers: words in context, at the cost of running those layers

Legend of shape suffixes: B samples, P prompt tokens, E hidden size of the student, V rows of the embedding table.
"""

from __future__ import annotations

import copy
import re
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hyperagent.errors import ConfigError
from hyperagent.model.config import EMBEDDINGS, FEATURIZER_PATTERN


class PromptFeaturizer(Protocol):
    """Computes features of prompt ids, without a gradient."""

    num_ids: int
    """Number of rows of the student's embedding table; ids at or above it are invalid."""

    def __call__(self, ids_BP: Tensor) -> Tensor:
        """Return the features [B, P, E] of int64 ids; padding is on the right, where causal layers do not see it."""
        ...


class EmbeddingFeaturizer:
    """Looks up rows of the student's embedding table, as float32."""

    def __init__(self, table_VE: Tensor) -> None:
        self._table_VE = table_VE.detach()
        self.num_ids = len(table_VE)

    def __call__(self, ids_BP: Tensor) -> Tensor:
        return self._table_VE[ids_BP].float()


class HiddenStateFeaturizer:
    """Computes hidden states with the student's first layers, which it shares and does not copy, as float32."""

    def __init__(self, student: PreTrainedModel, num_layers: int) -> None:
        decoder = student.get_decoder()
        if num_layers > len(decoder.layers):
            raise ConfigError(
                f"the featurizer hidden@{num_layers} needs {num_layers} decoder layers, but the student has {len(decoder.layers)}"
            )
        # A decoder with fewer layers and no final norm. It shares the student's modules; only the containers are new.
        early = copy.copy(decoder)
        early._modules = {
            **decoder._modules,
            "layers": nn.ModuleList(decoder.layers[:num_layers]),
            "norm": nn.Identity(),
        }
        early.config = copy.copy(decoder.config)
        early.config.num_hidden_layers = num_layers
        self._early = early
        table_VE: Tensor = student.get_input_embeddings().weight  # type: ignore[assignment]
        self.num_ids = len(table_VE)

    @torch.no_grad()
    def __call__(self, ids_BP: Tensor) -> Tensor:
        hidden_BPE: Tensor = self._early(input_ids=ids_BP, use_cache=False).last_hidden_state
        return hidden_BPE.float()


def make_featurizer(name: str, student: PreTrainedModel) -> PromptFeaturizer:
    """Return the featurizer with that name for a loaded student.

    Raises:
        ConfigError: there is no featurizer of that name, or the student has too few layers for it.
    """
    if re.fullmatch(FEATURIZER_PATTERN, name) is None:
        raise ConfigError(f"there is no featurizer {name!r}; choose {EMBEDDINGS} or hidden@K with K decoder layers")
    if name == EMBEDDINGS:
        return EmbeddingFeaturizer(student.get_input_embeddings().weight)  # type: ignore[arg-type]
    return HiddenStateFeaturizer(student, int(name.removeprefix("hidden@")))
