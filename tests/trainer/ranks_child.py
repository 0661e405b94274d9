"""Run a few steps of a recipe on the ranks that torchrun starts: `torchrun ranks_child.py RECIPE.json OUT`.

It tries every way of storing the network and the activations, and writes the losses and the first step's gradients to OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hyperagent.cache.remote import open_for_reading
from hyperagent.data.files.tokens_file import TRAIN
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.data.dataset import load_split
from hyperagent_trainer.data.schedule import batches_from, plan_step
from hyperagent_trainer.data.training_prompts import TrainingPrompts
from hyperagent_trainer.distributed import Ranks, full_tensor, init_distributed
from hyperagent_trainer.network.build import assemble, shard_network
from hyperagent_trainer.optim.optimizer import make_optimizer
from hyperagent_trainer.student.activation_checkpoint import recomputation
from hyperagent_trainer.student.student import Student
from hyperagent_trainer.training.step import accumulate_gradients

NUM_STEPS = 3
WAYS = {
    "replicated": {},
    "replicated, recomputed": {"checkpoint_activations": True},
    "replicated, recomputed in tiles": {"checkpoint_activations": True, "moe_tile_tokens": 8},
    "sharded": {"shard_network": True},
    "sharded, recomputed": {"shard_network": True, "checkpoint_activations": True},
}
EXACT = "replicated, float64"


def run(
    recipe: TrainRecipe, ranks: Ranks, dtype: torch.dtype = torch.float32
) -> tuple[list[float], dict[str, torch.Tensor]]:
    student = Student(recipe.student, device=ranks.device, dtype=dtype, mesh=ranks.mesh)
    torch.manual_seed(recipe.seed)
    adapted = assemble(recipe, student, None)
    network = adapted.network
    for parameter in network.b_parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    network.to(dtype)
    if dtype == torch.float64:  # torch's grouped products know no float64
        student.model.set_experts_implementation("eager")
    # The featurizer returns float32.
    network.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))
    if recipe.shard_network and ranks.size > 1:
        shard_network(network, ranks)
    optimizer = make_optimizer(network, recipe)
    found = []
    with open_for_reading(recipe.cache) as cache, recomputation(student.model, recipe):
        data = load_split(
            recipe.tokens,
            cache,
            TRAIN,
            tokenizer=student.tokenizer.identity,
            max_prompt_tokens=recipe.max_prompt_tokens,
        )
        lengths = [len(t.student_ids) for t in data.trajectories]
        order = batches_from(lengths, batch_size=recipe.batch_size, seed=recipe.seed, first_step=0)
        prompts = TrainingPrompts(data.trajectories, shuffled=False, seed=recipe.seed)
        for step in range(1, NUM_STEPS + 1):
            plan = plan_step(next(order), lengths, rank=ranks.rank, num_ranks=ranks.size, size=1)
            batches = data.batches([m.indices for m in plan.micro_batches], ranks.device, workers=0)
            found.append(accumulate_gradients(plan, batches, adapted, data, prompts, recipe, ranks, step=step).loss)
            if len(found) == 1:
                gradients = {
                    n: full_tensor(p.grad).clone() for n, p in network.named_parameters() if p.grad is not None
                }
            optimizer.step()
    return found, gradients


def main() -> None:
    recipe = TrainRecipe.model_validate_json(Path(sys.argv[1]).read_bytes())
    out = Path(sys.argv[2])
    with init_distributed() as ranks:
        for way, changes in WAYS.items():
            save(out, way, run(recipe.model_copy(update={"checkpoint_activations": False, **changes}), ranks), ranks)
        if ranks.size == 1:
            exact = run(recipe.model_copy(update={"checkpoint_activations": False}), ranks, torch.float64)
            save(out, EXACT, exact, ranks)


def save(out: Path, way: str, found: tuple[list[float], dict[str, torch.Tensor]], ranks: Ranks) -> None:
    losses, gradients = found
    if ranks.is_first:
        (out / f"{way}.json").write_text(json.dumps(losses))
        save_file({n: g.contiguous() for n, g in gradients.items()}, out / f"{way}.safetensors")


if __name__ == "__main__":
    main()
