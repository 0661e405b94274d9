"""Time generating an adapter for the 48-layer student on the CPU, by stage, against the matrix products it needs.

    python benchmarks/generate.py [--preset base] [--tokens 4096 32768] [--threads 2] [--json]

The target layers are those of the real architecture, built on the meta device; the embedding table is random,
151,936 x 2,048 in bfloat16. `bound` runs only the matrix products of the same forward pass, in the same shapes. Each
prompt length runs in a separate process, which also gives its peak memory; times are the median of three after one
warm-up.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3NextConfig

from hyperagent.model.blocks import Attention
from hyperagent.model.config import PRESETS, HyperNetworkConfig
from hyperagent.model.featurizer import EmbeddingFeaturizer
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.targets import discover_target_layers, num_adapter_parameters

VOCAB, HIDDEN = 151_936, 2048
REPEATS = 3
Product = tuple[int, int, int, int]
"""(batch, rows, inner, columns) of one matrix product."""


def real_student() -> PreTrainedModel:
    """Build Qwen3-Coder-Next on the meta device, from its architecture alone."""
    config = Qwen3NextConfig(  # type: ignore[call-arg]  # full_attention_interval is declared elsewhere
        vocab_size=151_936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=2,
        head_dim=256, linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
        linear_value_head_dim=128, moe_intermediate_size=512, shared_expert_intermediate_size=512, num_experts=512,
        num_experts_per_tok=10, full_attention_interval=4, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def products_of(network: AgenticHyperNetwork, run: Callable[[], object]) -> Counter[Product]:
    """Count the matrix products of one forward pass: those of the linear layers, and two per attention head."""
    seen: Counter[Product] = Counter()

    def linear(module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        seen[1, inputs[0].numel() // module.in_features, module.in_features, module.out_features] += 1

    def attention(module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        assert isinstance(module, Attention)
        query, context = inputs[0], inputs[1]
        batch, size = query.shape[0] * module.num_heads, query.shape[-1] // module.num_heads
        seen[batch, query.shape[1], size, context.shape[1]] += 1
        seen[batch, query.shape[1], context.shape[1], size] += 1

    hooks = [m.register_forward_hook(linear) for m in network.modules() if isinstance(m, nn.Linear)]
    hooks += [m.register_forward_hook(attention) for m in network.modules() if isinstance(m, Attention)]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def median_seconds(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def bound_seconds(products: Counter[Product]) -> float:
    """Return the seconds of the matrix products alone: the time of each distinct one, multiplied by its count."""
    total = 0.0
    for (batch, rows, inner, columns), count in products.items():
        # Same layouts as in the network: weights are stored [out, in], keys [.., C, d].
        left, right = torch.randn(batch, rows, inner), torch.randn(batch, columns, inner)
        if batch == 1:
            left, right = left[0], right[0]
        total += count * median_seconds(partial(torch.matmul, left, right.mT))
    return total


@torch.inference_mode()
def measure(preset: str, num_tokens: int) -> dict[str, Any]:
    """Measure one prompt length: seconds of each stage, of the total, and of the bound; memory; sizes."""
    torch.manual_seed(0)
    layers = discover_target_layers(real_student())
    network = AgenticHyperNetwork(HyperNetworkConfig.preset(preset), layers, HIDDEN).eval()
    featurizer = EmbeddingFeaturizer(torch.randn(VOCAB, HIDDEN, dtype=torch.bfloat16))
    for head in network.b_parameters():
        nn.init.normal_(head, std=0.01)
    ids_1P = torch.randint(VOCAB, (1, num_tokens))
    mask_1P = torch.ones(1, num_tokens, dtype=torch.bool)
    held = peak_rss()

    def whole() -> dict[str, Any]:
        return network(featurizer(ids_1P), mask_1P)

    seconds = median_seconds(whole)
    peak = peak_rss()
    features_1PE = featurizer(ids_1P)
    latents_1LD = network.encoder(features_1PE, mask_1P)
    read_1MSD = network.generator.features(latents_1LD)
    stages = {
        "featurizer": median_seconds(lambda: featurizer(ids_1P)),
        "encoder": median_seconds(lambda: network.encoder(features_1PE, mask_1P)),
        "generator": median_seconds(lambda: network.generator.features(latents_1LD)),
        "heads": median_seconds(lambda: network.generator.factors(read_1MSD)),
    }
    products = products_of(network, whole)
    bound = bound_seconds(products)
    flops = sum(2 * batch * rows * inner * columns * n for (batch, rows, inner, columns), n in products.items())
    numbers = num_adapter_parameters(layers, network.config.rank)
    return {
        "preset": preset,
        "tokens": num_tokens,
        "layers": len(layers),
        "hypernetwork_parameters": sum(p.numel() for p in network.parameters()),
        "adapter_parameters": numbers,
        "adapter_bytes": {"float32": 4 * numbers, "bfloat16": 2 * numbers},
        "seconds": seconds,
        "stage_seconds": stages,
        "gflop": flops / 1e9,
        "bound_seconds": bound,
        "bound_gflop_per_s": flops / 1e9 / bound,
        "seconds_over_bound": seconds / bound,
        "peak_rss_bytes": peak,
        # Memory of the pass itself, in addition to the network and the table, which remain allocated.
        "peak_extra_bytes": peak - held,
    }


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32_768])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see whether it runs")
    options = parser.parse_args()
    if options.smoke:
        options.preset, options.tokens = "tiny", [64]
    if options.one:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.preset, options.tokens[0])))
        return
    common = ["--one", "--preset", options.preset, "--threads", str(options.threads)]
    results = [
        json.loads(subprocess.check_output([sys.executable, __file__, *common, "--tokens", str(n)]))
        for n in options.tokens
    ]
    report = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": options.threads},
        "torch": torch.__version__,
        "results": results,
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['machine']}, torch {report['torch']}, preset {options.preset}, float32")
    for r in results:
        stages = "  ".join(f"{name} {seconds:.2f}" for name, seconds in r["stage_seconds"].items())
        print(
            f"{r['tokens']:6} tokens {r['seconds']:6.2f} s ({stages})  {r['seconds_over_bound']:.2f} x bound  "
            f"{r['peak_rss_bytes'] / 2**30:.2f} GiB peak, {r['peak_extra_bytes'] / 2**30:.2f} above network and table"
        )


if __name__ == "__main__":
    main()
