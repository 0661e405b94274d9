"""Compare an optimizer step of the laptop recipe with the same step with PEFT's layers and transformers' own logits.

    python benchmarks/train.py [--tokens 1024] [--vocab 151936] [--steps 5] [--json]

A tiny Qwen3-Next with a real tokenizer's vocabulary, 4 trajectories per step with a quarter of the tokens supervised,
top 128 ids of a teacher, rank 16 on the default targets, AdamW. Each variant runs in a separate process; the time is
the median of the steps after the first, the memory is the growth of the process's peak (VmHWM) since before the first
step.

    ours                  the recipe's hypernetwork: prompts to adapters, injection, fused loss, backward, AdamW
    ours, recomputed      the same with the student's layers recomputed in the backward pass
    ours, static          a static adapter in place of the hypernetwork
    peft                  one PEFT adapter for all samples; `model(ids).logits`, then the same divergence with autograd
    peft, rows only       the same, but logits of the supervised rows alone

A PEFT adapter is one set of parameters: its step runs no hypernetwork and cannot use one adapter per sample.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.utils import logging

from hyperagent.cache.hot_tier import HotTierStats
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.static_lora import StaticLoRA
from hyperagent.model.targets import discover_target_layers
from hyperagent_trainer.config import load_recipe
from hyperagent_trainer.data.dataset import Batch
from hyperagent_trainer.data.teacher_rows import TeacherRows
from hyperagent_trainer.network.adapted_student import AdaptedStudent
from hyperagent_trainer.student.activation_checkpoint import recomputed_layers

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "recipes" / "laptop.yaml"
TOP_K = 128
PROMPT_TOKENS = 256
SUPERVISED = 4
"""One in this many tokens is supervised."""
HIDDEN = 128

Step = Callable[[], None]


class StudentWithoutFiles:
    """Minimal student for `AdaptedStudent`, without files."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        embeddings: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        self.embeddings: Tensor = embeddings.weight
        self.head: Tensor = head.weight
        self.vocab_size = self.head.shape[0]

    def hidden_states(self, token_ids_BT: Tensor) -> Tensor:
        output: Tensor = self.model.get_decoder()(input_ids=token_ids_BT, use_cache=False).last_hidden_state
        return output


def make_model(options: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(  # type: ignore[call-arg]  # full_attention_interval is declared elsewhere
            vocab_size=options.vocab, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=1, head_dim=64, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=HIDDEN, shared_expert_intermediate_size=HIDDEN, full_attention_interval=4,
            linear_conv_kernel_dim=4, linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=32,
            linear_value_head_dim=32, tie_word_embeddings=False, initializer_range=HIDDEN**-0.5 / 2,
        )
    )  # fmt: skip


def make_batch(options: argparse.Namespace, batch_size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(options.vocab, (batch_size, options.tokens), generator=generator)
    sample_N = torch.arange(batch_size).repeat_interleave(options.tokens // SUPERVISED)
    index_N = torch.arange(0, options.tokens - SUPERVISED + 1, SUPERVISED).repeat(batch_size)
    first_N1 = torch.randint(options.vocab, (len(sample_N), 1), generator=generator)
    kept = torch.rand(len(sample_N), TOP_K, generator=generator)
    return Batch(
        indices=tuple(range(batch_size)),
        token_ids_BT=ids_BT,
        num_tokens=ids_BT.numel(),
        sample_N=sample_N,
        index_N=index_N,
        rows=TeacherRows(
            ids_NK=(first_N1 + torch.arange(TOP_K) * (options.vocab // TOP_K)) % options.vocab,
            logprobs_NK=(0.95 * kept / kept.sum(1, keepdim=True)).log(),
            tail_logmass_N=torch.full((len(sample_N),), 0.05).log(),
            target_ids_N=ids_BT[sample_N, index_N],
        ),
        hot_tier_stats=HotTierStats(),
    )


def our_step(options: argparse.Namespace, *, static: bool = False, recomputed: bool = False) -> Step:
    recipe = load_recipe(RECIPE)
    student, batch = StudentWithoutFiles(make_model(options)), make_batch(options, recipe.batch_size)
    layers, config = discover_target_layers(student.model), recipe.hypernetwork
    network: StaticLoRA | AgenticHyperNetwork = (
        StaticLoRA(layers, rank=config.rank, alpha=config.alpha)
        if static
        else AgenticHyperNetwork(config, layers, HIDDEN)
    )
    adapted = AdaptedStudent(student, network)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    prompts = [ids.numpy().astype(np.uint32) for ids in batch.token_ids_BT[:, :PROMPT_TOKENS]]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with recomputed_layers(student.model) if recomputed else nullcontext():
            adapted.backward(batch, adapted.adapters(prompts), recipe.loss, scale=1 / batch.num_rows)
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.max_grad_norm)
        optimizer.step()

    return step


def peft_step(options: argparse.Namespace, *, rows_only: bool) -> Step:
    from peft import LoraConfig, get_peft_model

    recipe = load_recipe(RECIPE)
    model, batch = make_model(options), make_batch(options, recipe.batch_size)
    targets = [layer.name for layer in discover_target_layers(model)]
    alpha = round(recipe.hypernetwork.alpha)
    assert alpha == recipe.hypernetwork.alpha, "PEFT declares an integer"
    config = LoraConfig(r=recipe.hypernetwork.rank, lora_alpha=alpha, target_modules=targets)
    peft = get_peft_model(model, config)
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def supervised_logits() -> Tensor:
        if not rows_only:
            return peft(input_ids=batch.token_ids_BT, use_cache=False).logits[batch.sample_N, batch.index_N]
        hidden_BTD = model.get_decoder()(input_ids=batch.token_ids_BT, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(hidden_BTD[batch.sample_N, batch.index_N])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logq_NV = supervised_logits().float().log_softmax(-1)
        rows = batch.rows
        logq_NK = logq_NV.gather(1, rows.ids_NK)
        logq_rest_N = logq_NV.scatter(1, rows.ids_NK, -torch.inf).logsumexp(-1)
        kept = (rows.logprobs_NK.exp() * (rows.logprobs_NK - logq_NK)).sum()
        rest = (rows.tail_logmass_N.exp() * (rows.tail_logmass_N - logq_rest_N)).sum()
        ((kept + rest) / batch.num_rows).backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        optimizer.step()

    return step


VARIANTS: dict[str, Callable[[argparse.Namespace], Step]] = {
    "ours": our_step,
    "ours, recomputed": lambda options: our_step(options, recomputed=True),
    "ours, static": lambda options: our_step(options, static=True),
    "peft": lambda options: peft_step(options, rows_only=False),
    "peft, rows only": lambda options: peft_step(options, rows_only=True),
}


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Run several steps of one variant, in this process."""
    step = VARIANTS[name](options)
    # Man page proc_pid_clear_refs(5): 5 resets the peak to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before, seconds = status_bytes("VmRSS"), []
    for _ in range(options.steps + 1):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[1:]), "peak_extra_bytes": status_bytes("VmHWM") - before}


def in_process(name: str, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        shape = [f"--{k}={getattr(options, k)}" for k in ("tokens", "vocab", "steps")]
        subprocess.run([sys.executable, __file__, "--variant", name, "--out", str(out), *shape], check=True)
        result: dict[str, float] = json.loads(out.read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per trajectory")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see whether it runs")
    options = parser.parse_args()
    if options.smoke:
        options.tokens, options.vocab, options.steps = 64, 1000, 2
    logging.set_verbosity_error()
    if options.variant:
        options.out.write_text(json.dumps(measure(options.variant, options)))
        return
    results = {name: in_process(name, options) for name in VARIANTS}
    ours, peft = results["ours"], results["peft"]
    found = {
        "speedup_over_peft": peft["seconds"] / ours["seconds"],
        "peak_memory_ratio": ours["peak_extra_bytes"] / peft["peak_extra_bytes"],
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "tokens": options.tokens,
        "vocab": options.vocab,
        "results": results,
    }
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['machine']}, torch {found['torch']}, {options.tokens} tokens, vocabulary {options.vocab}")
    for name, row in results.items():
        print(f"  {name:18} {row['seconds']:7.2f} s a step {row['peak_extra_bytes'] / 1e6:9.1f} MB")
    print(f"  {found['speedup_over_peft']:.2f} x PEFT's speed, {found['peak_memory_ratio']:.2f} x its memory")


if __name__ == "__main__":
    main()
