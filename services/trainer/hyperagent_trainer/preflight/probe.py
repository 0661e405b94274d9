"""The pre-flight's probe: two short sequences of random tokens with random teacher's rows, and their prompts.

Legend of shape suffixes: B samples, T tokens, D hidden size, V vocabulary, N rows, K kept ids, I and O a layer's input
and output size, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyperagent.cache.hot_tier import HotTierStats
from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.static_lora import StaticLoRA
from hyperagent_trainer.data.dataset import Batch
from hyperagent_trainer.data.teacher_rows import TeacherRows
from hyperagent_trainer.network.adapted_student import AdaptedStudent

# Of unequal length, so that padding is tested too.
_SEQUENCE_TOKENS = (24, 17)
_PROMPT_TOKENS = (13, 9)
_TOP_K = 8
_TAIL = 0.1


class Probe:
    """An adapted student and a batch to test it on; the batch depends only on the vocabulary's size."""

    def __init__(self, adapted: AdaptedStudent) -> None:
        self.adapted = adapted
        self.student = adapted.student
        generator = np.random.default_rng(0)
        vocab_size = self.student.vocab_size
        self.prompts = [generator.integers(vocab_size, size=n).astype(np.uint32) for n in _PROMPT_TOKENS]
        self.batch = _batch(generator, vocab_size).to(self.student.head.device)
        with torch.no_grad():
            self.target_names = tuple(adapted.adapters(self.prompts))

    def hidden(self, adapters: AdapterWeights | None) -> Tensor:
        """Return the final hidden states [B, T, D] under the adapters, or those of the bare student for None."""
        with self.adapted.injector.inject(adapters or {}):
            return self.student.hidden_states(self.batch.token_ids_BT)

    def logits(self, adapters: AdapterWeights | None) -> Tensor:
        """Return the logits [B, T, V] under the adapters, or those of the bare student for None."""
        return self.hidden(adapters) @ self.student.head.T

    def loss(self, adapters: AdapterWeights) -> Tensor:
        """Return the trainer's loss in nats per supervised row."""
        return self.adapted.loss_sum(self.batch, adapters) / self.batch.num_rows

    def generate(self) -> AdapterWeights:
        """Return the network's adapters for the probe's prompts, attached to the graph."""
        return self.adapted.adapters(self.prompts)

    def start(self) -> AdapterWeights | None:
        """Return the adapters that an untrained network must equal: None, or the static adapter of a warm start."""
        network = self.adapted.network
        if isinstance(network, StaticLoRA) or network.base is None:
            return None
        weights: AdapterWeights = network.base(*self.adapted.features(self.prompts))
        return weights

    def zero_leaves(self) -> AdapterWeights:
        """Return adapters with the network's A and a zero B, detached from the graph; B requires a gradient."""
        with torch.no_grad():
            return {
                n: LoRAPair(p.a.clone(), torch.zeros_like(p.b).requires_grad_()) for n, p in self.generate().items()
            }

    def module(self, name: str) -> nn.Module:
        """Return the student's module of that name."""
        return self.student.model.get_submodule(name)


def b_gradients(loss: Tensor, leaves: AdapterWeights) -> dict[str, Tensor | None]:
    """Return d loss / d B [B, O, R] by target; None where the loss does not depend on B."""
    if not loss.requires_grad:
        return dict.fromkeys(leaves)
    found = torch.autograd.grad(loss, [pair.b for pair in leaves.values()], allow_unused=True)
    return dict(zip(leaves, found, strict=True))


@contextmanager
def outputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Any]]]:
    """Collect the outputs of each module, call by call, while the block runs."""
    calls: dict[str, list[Any]] = {name: [] for name in modules}
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: calls[name].append(output))
        for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def resolution(tensor: Tensor) -> float:
    """Return the relative difference that two orders of summation may cause in the tensor's dtype."""
    return 100 * torch.finfo(tensor.dtype).eps


def _batch(generator: np.random.Generator, vocab_size: int) -> Batch:
    lengths = _SEQUENCE_TOKENS
    n, k = sum(lengths), min(_TOP_K, vocab_size)
    ids = np.stack([generator.permutation(vocab_size)[:k] for _ in range(n)])
    kept = generator.dirichlet(np.ones(k), n) * (1 - _TAIL)
    token_ids = np.zeros((len(lengths), max(lengths)), np.int64)
    for row, length in zip(token_ids, lengths, strict=True):
        row[:length] = generator.integers(vocab_size, size=length)
    return Batch(
        indices=tuple(range(len(lengths))),
        token_ids_BT=torch.from_numpy(token_ids),
        num_tokens=n,
        sample_N=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        index_N=torch.cat([torch.arange(length) for length in lengths]),
        rows=TeacherRows(
            ids_NK=torch.from_numpy(ids),
            logprobs_NK=torch.from_numpy(np.log(kept)).float(),
            tail_logmass_N=torch.full((n,), _TAIL).log(),
            target_ids_N=torch.from_numpy(ids[:, 0].copy()),
        ),
        hot_tier_stats=HotTierStats(),
    )
