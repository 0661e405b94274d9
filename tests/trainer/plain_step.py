"""Compute the gradient of one optimizer step by its definition, on merged float64 weights, one trajectory at a time.

Nothing here uses the trainer's code: no batches, no padding, no injected layers, no loss kernels, no cut graph. The teacher
is that of the fixture `cache_folder`, whose distribution is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_runs import run
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import TRAIN, TokenizedTrajectory, read_data_identity, read_tokens, write_tokens
from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.targets import discover_target_layers
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.loss.options import LossOptions
from hyperagent_trainer.runs.folder import RunFolder

KEPT, TAIL_IDS = 8, 9
"""Number of kept ids in a row of `cache_folder`, and number of ids that share its tail evenly."""


@dataclass(frozen=True)
class PlainStudent:
    """A student in float64 with adapters merged into its weights."""

    recipe: TrainRecipe

    @cached_property
    def model(self) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.recipe.student, dtype=torch.float64).eval()
        # The grouped matrix product does not support float64.
        model.set_experts_implementation("eager")
        return model.requires_grad_(False)

    @cached_property
    def vocab_size(self) -> int:
        return ChatTokenizer(self.recipe.student).vocab_size

    @cached_property
    def common_ids(self) -> set[int]:
        """Return the ids that more than nine of ten training prompts hold."""
        prompts = [set(map(int, t.prompt_ids)) for t in read_tokens(self.recipe.tokens, split=TRAIN)]
        return {i for i in set().union(*prompts) if sum(i in p for p in prompts) > 0.9 * len(prompts)}

    def network(self, weights: dict[str, Tensor]) -> AgenticHyperNetwork:
        """Return the hypernetwork with a checkpoint's weights in float64."""
        config, embeddings = self.recipe.hypernetwork, self.model.get_input_embeddings().weight
        layers, common_V = discover_target_layers(self.model), torch.zeros_like(weights["common_V"])
        network = AgenticHyperNetwork(config, layers, embeddings.shape[1], common_V=common_V)
        network.load_state_dict(weights, strict=True)
        return network.double()

    def adapter(self, network: AgenticHyperNetwork, trajectory: TokenizedTrajectory) -> AdapterWeights:
        """Return the adapter of the trajectory's prompt: a [R, I] and b [O, R] of every layer."""
        ids_1P = torch.from_numpy(trajectory.prompt_ids.astype("int64"))[None]
        mask = [int(token) not in self.common_ids for token in trajectory.prompt_ids]
        mask_1P = torch.tensor([mask if any(mask) else [True] * len(mask)])
        made = network(self.model.get_input_embeddings()(ids_1P), mask_1P)
        return {name: LoRAPair(pair.a[0], pair.b[0]) for name, pair in made.items()}

    def row_losses(
        self,
        trajectory: TokenizedTrajectory,
        adapter: AdapterWeights | None,
        *,
        temperature: float = 1.0,
        options: LossOptions | None = None,
        full_view: bool = False,
    ) -> Tensor:
        """Return the loss of every supervised row in nats, shape [N]."""
        scale = self.recipe.hypernetwork.alpha / self.recipe.hypernetwork.rank
        merged = {
            f"{name}.weight": self.model.get_submodule(name).weight + scale * pair.b.double() @ pair.a.double()
            for name, pair in (adapter or {}).items()
        }
        ids = trajectory.token_ids if full_view else trajectory.student_ids
        positions = trajectory.positions if full_view else trajectory.student_positions
        ids_1T = torch.from_numpy(ids.astype("int64"))[None]
        logits_TV = functional_call(self.model, merged, kwargs={"input_ids": ids_1T, "use_cache": False}).logits[0]
        positions_N = torch.from_numpy(positions.astype("int64"))
        logits_NV, targets_N = logits_TV[positions_N - 1, : self.vocab_size], ids_1T[0, positions_N]
        return torch.stack(
            [
                _row_loss(logits_V, int(target), temperature, options or LossOptions())
                for logits_V, target in zip(logits_NV, targets_N, strict=True)
            ]
        )


def _row_loss(logits_V: Tensor, target: int, t: float, options: LossOptions) -> Tensor:
    kept = [target, *[i for i in range(KEPT) if i != target][: KEPT - 1]]
    # The cache's codec stores log-probabilities in float16 and the mass of the tail in float32.
    log_kept = torch.tensor([0.8] + [0.1 / (KEPT - 1)] * (KEPT - 1)).log().half().double()
    mass = torch.cat([(log_kept / t).exp(), torch.tensor([TAIL_IDS * (0.1 / TAIL_IDS) ** (1 / t)]).double()])
    p = mass / mass.sum()
    all_q = (logits_V / t).softmax(0)
    q = torch.cat([all_q[kept], 1 - all_q[kept].sum()[None]])
    m = options.jsd_beta * p + (1 - options.jsd_beta) * q
    divergence = {
        "forward_kl": (p * (p / q).log()).sum(),
        "reverse_kl": (q * (q / p).log()).sum(),
        "jsd": options.jsd_beta * (p * (p / m).log()).sum() + (1 - options.jsd_beta) * (q * (q / m).log()).sum(),
        "tvd": (p - q).abs().sum() / 2,
    }[options.divergence]
    cross_entropy = -logits_V.log_softmax(0)[target]
    return (1 - options.ce_weight) * t**2 * divergence + options.ce_weight * cross_entropy


@dataclass(frozen=True)
class PlainStep:
    """Expected loss and gradient of one step."""

    loss: float
    """Nats per supervised row."""
    gradient: dict[str, Tensor]
    """Gradient by parameter name, before clipping."""

    @property
    def norm(self) -> float:
        return float(torch.stack([g.norm() for g in self.gradient.values()]).norm())


def plain_step(
    recipe: TrainRecipe,
    weights: dict[str, Tensor],
    trajectories: Sequence[TokenizedTrajectory],
    *,
    full_view: bool = False,
) -> PlainStep:
    """Compute the recipe's step of a hypernetwork with these weights over all `trajectories`."""
    student = PlainStudent(recipe)
    network = student.network(weights)
    rows = [
        student.row_losses(
            one,
            student.adapter(network, one),
            temperature=recipe.temperature,
            options=recipe.loss,
            full_view=full_view,
        )
        for one in trajectories
    ]
    loss = torch.cat(rows).mean()
    names, parameters = zip(*network.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return PlainStep(float(loss.detach()), dict(zip(names, gradients, strict=True)))


@dataclass(frozen=True)
class SavedRun:
    """A run that has kept a checkpoint of every step, including step 0."""

    folder: RunFolder

    def weights(self, step: int) -> dict[str, Tensor]:
        return load_file(self.folder.checkpoint(step) / "network.safetensors")

    def moments(self, step: int, name: str) -> dict[str, Tensor]:
        """Return one of AdamW's two moments, by parameter name."""
        found = load_file(self.folder.checkpoint(step) / "optimizer.safetensors")
        return {key.removesuffix(f".{name}"): value for key, value in found.items() if key.endswith(f".{name}")}

    def first_gradient(self) -> dict[str, Tensor]:
        """Return the clipped gradient of step 1: AdamW's first moment then holds a tenth of it."""
        return {name: value.double() * 10 for name, value in self.moments(1, "exp_avg").items()}


def saved_run(recipe: TrainRecipe, root: Path) -> SavedRun:
    """Run the recipe and keep every checkpoint; `patience` adds one of step 0."""
    kept = {"checkpoint_every": 1, "keep_checkpoints": 1000, "patience": 1000}
    return SavedRun(run(recipe.model_copy(update=kept), root))


def uneven_prompts(tokens: Path, path: Path) -> Path:
    """Write a copy of a tokens file whose prompts differ in length, from 3 tokens upwards."""
    with write_tokens(path, read_data_identity(tokens)) as writer:
        for number, one in enumerate(read_tokens(tokens)):
            writer.write(replace(one, prompt_ids=one.token_ids[: 3 + 4 * number]))
    return path


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the relative error in the 2-norm over all tensors."""
    assert found.keys() == expected.keys()
    squares = [
        ((found[name].double() - value).square().sum(), value.square().sum()) for name, value in expected.items()
    ]
    return float(sum(error for error, _ in squares) / sum(size for _, size in squares)) ** 0.5
