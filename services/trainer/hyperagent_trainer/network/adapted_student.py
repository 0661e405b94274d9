"""The adapted student: a network that makes adapters, the frozen student that they adapt, and the distillation loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.config import EMBEDDINGS
from hyperagent.model.featurizer import make_featurizer
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.lora import HookBasedLoRAInjector
from hyperagent.model.static_lora import StaticLoRA
from hyperagent_trainer.data.dataset import Batch, pad_prompts
from hyperagent_trainer.loss.distillation import check_backend, compute_distillation_loss
from hyperagent_trainer.loss.options import LossBackend, LossOptions
from hyperagent_trainer.student.student import Student

AdapterNetwork = AgenticHyperNetwork | StaticLoRA
"""The trained network: it makes adapters that depend on the prompt, or one for every prompt."""


class AdaptedStudent:
    """Computes a training step from prompts to the summed loss."""

    def __init__(
        self,
        student: Student,
        network: AdapterNetwork,
        *,
        loss_workspace_bytes: int | None = None,
        loss_backend: LossBackend = "auto",
    ) -> None:
        """Put a network in front of a student.

        Args:
            loss_workspace_bytes, loss_backend: see `compute_distillation_loss`.

        Raises:
            ConfigError: the network reads more of the student's layers than it has.
            InvalidRequest: the backend cannot run on the student's device.
        """
        check_backend(loss_backend, student.head.device)
        self.student = student
        self.network = network
        self.reads_prompt = isinstance(network, AgenticHyperNetwork)
        """Whether the adapters depend on the prompt."""
        featurizer = network.config.featurizer if isinstance(network, AgenticHyperNetwork) else EMBEDDINGS
        self._featurizer = make_featurizer(featurizer, student.model)
        self.injector = HookBasedLoRAInjector(student.model, scale=network.scale)
        self._loss_workspace_bytes = loss_workspace_bytes
        self._loss_backend = loss_backend

    def adapters(self, prompts: Sequence[NDArray[np.uint32]]) -> AdapterWeights:
        """Make one adapter per prompt: a [B, R, I] and b [B, O, R] for every target layer."""
        weights: AdapterWeights = self.network(*self.features(prompts))
        return weights

    def features(self, prompts: Sequence[NDArray[np.uint32]]) -> tuple[Tensor, Tensor]:
        """Return the network's inputs: features [B, P, E] and a mask [B, P], True at the tokens that it reads."""
        ids_BP, mask_BP = pad_prompts(prompts, self.student.embeddings.device)
        if isinstance(self.network, AgenticHyperNetwork):
            mask_BP = self.network.readable(ids_BP, mask_BP)
        return self._featurizer(ids_BP), mask_BP

    def loss_sum(
        self,
        batch: Batch,
        adapters: AdapterWeights | None,
        options: LossOptions | None = None,
        *,
        scale: float = 1.0,
    ) -> Tensor:
        """Return `compute_distillation_loss` of the batch, with forward KL by default.

        Args:
            adapters: one per trajectory; None computes the loss of the bare student.
        """
        with self.injector.inject(adapters or {}):
            hidden_BTD = self.student.hidden_states(batch.token_ids_BT)
        return self._loss(hidden_BTD, batch, options, scale)

    def backward(
        self, batch: Batch, adapters: AdapterWeights, options: LossOptions | None = None, *, scale: float = 1.0
    ) -> Tensor:
        """Add the gradient of `loss_sum` to that of the network's parameters, and return the loss, detached.

        The graph is cut at the adapters. The student's part runs backward first and is freed, with its layers still
        adapted because recomputation needs the adapters; then the network's part runs backward once.
        """
        leaves = {
            name: LoRAPair(pair.a.detach().requires_grad_(), pair.b.detach().requires_grad_())
            for name, pair in adapters.items()
        }
        with self.injector.inject(leaves):
            loss = self._loss(self.student.hidden_states(batch.token_ids_BT), batch, options, scale)
            loss.backward()
        cuts = [
            (factor, leaf.grad)
            for name, pair in adapters.items()
            for factor, leaf in zip((pair.a, pair.b), (leaves[name].a, leaves[name].b), strict=True)
            if factor.requires_grad
        ]
        torch.autograd.backward([factor for factor, _ in cuts], [gradient for _, gradient in cuts])
        return loss.detach()

    def _loss(self, hidden_BTD: Tensor, batch: Batch, options: LossOptions | None, scale: float) -> Tensor:
        return compute_distillation_loss(
            hidden_BTD[batch.sample_N, batch.index_N],
            self.student.head,
            batch.rows,
            vocab_size=self.student.vocab_size,
            options=options,
            scale=scale,
            workspace_bytes=self._loss_workspace_bytes,
            backend=self._loss_backend,
        )

    @torch.no_grad()
    def logits(self, token_ids: NDArray[np.uint32], prompt: NDArray[np.uint32]) -> Tensor:
        """Return the logits [T, V] of one sequence under the adapter of one prompt."""
        ids_1T = torch.from_numpy(token_ids.astype(np.int64))[None].to(self.student.head.device)
        with self.injector.inject(self.adapters([prompt])):
            hidden_1TD = self.student.hidden_states(ids_1T)
        return hidden_1TD[0] @ self.student.head.T
