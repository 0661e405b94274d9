"""Check the first gradients: the loss must reach the whole network, and the first step must have a reasonable size.

Where B starts at zero, only the parameters that generate B can have a gradient at step 0, and all of them must. After one
step B is no longer zero, and the parameters that generate A, and the encoder, must have a gradient too.

Legend of shape suffixes: B samples, I and O a layer's input and output size, R rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.static_lora import StaticLoRA
from hyperagent_trainer.network.adapted_student import AdapterNetwork
from hyperagent_trainer.preflight.probe import Probe, b_gradients
from hyperagent_trainer.report import Check

_MAKES_B = "B"
_A_SPREAD = (0.5, 2.0)
# Largest accepted first step as a share of a weight's norm; with a larger one the student is no longer recognizable.
_MAX_FIRST_STEP = 0.5
# AdamW evens out a group's scale, except for gradients near its epsilon of 1e-8.
_MAX_IMBALANCE = 1e4


def check_gradients(probe: Probe, make_optimizer: Callable[[AdapterNetwork], torch.optim.Optimizer]) -> Iterator[Check]:
    """Run the checks that train the probe's network for one step, like the first one of training."""
    parts = _parts(probe.adapted.network)
    yield _a_spread(probe)
    yield _balance(probe)
    optimizer = make_optimizer(probe.adapted.network)
    reached = _backward(probe, optimizer)
    step_0 = _gradient_check("gradients_step_0", {_MAKES_B: parts[_MAKES_B]}, probe, reached)
    yield step_0
    if not step_0.passed:
        return
    with torch.no_grad():
        # Copied, because a static adapter's factors are the parameters that the step changes.
        before = {name: LoRAPair(pair.a.clone(), pair.b.clone()) for name, pair in probe.generate().items()}
    optimizer.step()
    first_step = _first_step(probe, before)
    yield first_step
    if not first_step.passed:
        return
    reached = _backward(probe, optimizer)
    yield _gradient_check("gradients_step_1", parts, probe, reached)


def _backward(probe: Probe, optimizer: torch.optim.Optimizer) -> bool:
    """Compute the network's gradients; return False if the loss does not depend on the network."""
    optimizer.zero_grad(set_to_none=True)
    loss = probe.loss(probe.generate())
    if loss.requires_grad:
        loss.backward()
    return loss.requires_grad


def _parts(network: AdapterNetwork) -> dict[str, list[list[nn.Parameter]]]:
    """Return the parts of a network, each as a list of pieces; every piece as a whole must have a gradient."""
    if isinstance(network, StaticLoRA):
        return {"A": [[a] for a in network.a], _MAKES_B: [[b] for b in network.b]}
    generator = network.generator
    return {
        "encoder": [list(network.encoder.parameters())],
        "generator": [[generator.queries, *generator.blocks.parameters(), *generator.norm.parameters()]],
        "A": [[p] for p in generator.a_heads.parameters()],
        _MAKES_B: [[p] for p in generator.b_heads.parameters()],
    }


def _gradient_check(name: str, parts: Mapping[str, list[list[nn.Parameter]]], probe: Probe, reached: bool) -> Check:
    norms = {part: [_norm(piece) for piece in pieces] for part, pieces in parts.items()}
    everything = [norm for part in norms.values() for norm in part]
    of_student = sum(p.grad is not None for p in probe.student.model.parameters())
    return Check(
        name,
        reached and not of_student and bool(everything) and all(0 < norm < math.inf for norm in everything),
        {
            **{f"{part}: least norm of {len(found)}": min(found, default=0.0) for part, found in norms.items()},
            "student parameters with a gradient": of_student,
        },
        "every norm above 0 and finite, no gradient in the student",
        "parameters without a gradient never learn; make sure that adapters are not detached, that A is not zero and "
        "that nothing runs under no_grad",
    )


def _norm(parameters: list[nn.Parameter]) -> float:
    """Return the norm of the gradient over all parameters; 0 if none has a gradient."""
    return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))


@torch.no_grad()
def _a_spread(probe: Probe) -> Check:
    """Compare the spread of A with PEFT's.

    PEFT draws A uniformly within 1/sqrt(I) (kaiming_uniform_ with a = sqrt(5)): its standard deviation is 1/sqrt(3 I).
    """
    ratios = [float(pair.a.std()) * math.sqrt(3 * pair.a.shape[-1]) for pair in probe.generate().values()]
    low, high = _A_SPREAD
    return Check(
        "a_spread",
        all(low <= ratio <= high for ratio in ratios),
        {"least std of A, of PEFT's": min(ratios), "largest": max(ratios)},
        f"between {low:g} and {high:g}",
        "B's gradients are proportional to A, so A's spread sets the speed of all learning; scale the parameters that make A",
    )


def _balance(probe: Probe) -> Check:
    """Compare the gradients to B between groups of targets, by the path of the target inside its layer."""
    leaves = probe.zero_leaves()
    squares: dict[str, list[float]] = defaultdict(list)
    for name, gradient in b_gradients(probe.loss(leaves), leaves).items():
        squares[".".join(name.split(".")[-2:])].append(0.0 if gradient is None else float(gradient.square().mean()))
    spreads = {path: math.sqrt(sum(found) / len(found)) for path, found in squares.items()}
    largest, least = max(spreads.values()), min(spreads.values())
    return Check(
        "gradient_balance",
        least > 0 and largest < math.inf and largest / least <= _MAX_IMBALANCE,
        {
            **{f"{path} rms": spread for path, spread in spreads.items()},
            "ratio": largest / least if least else math.inf,
        },
        f"every group above 0, the largest at most {_MAX_IMBALANCE:g} times the least",
        "a group whose gradients are much smaller than the others' does not learn once gradients are clipped; leave the group "
        "out, or inspect its layers",
    )


@torch.no_grad()
def _first_step(probe: Probe, before: AdapterWeights) -> Check:
    """Compare what the first step changed with the weights; a warm start's own adapter is no part of the step."""
    scale = probe.adapted.network.scale
    changes = {name: _difference(pair, before[name]) for name, pair in probe.generate().items()}
    ratios = [
        scale * size / float(probe.module(name).weight.float().norm())  # type: ignore[operator]
        for name, size in _delta_norms(changes).items()
    ]
    return Check(
        "first_step",
        all(0 < ratio <= _MAX_FIRST_STEP for ratio in ratios),
        {"least delta, of its weight's norm": min(ratios), "largest": max(ratios)},
        f"above 0, at most {_MAX_FIRST_STEP:g}, after the recipe's first step",
        "an adapter as large as the weights it corrects has replaced the student; lower learning_rate, "
        "b_head_learning_rate_factor or alpha, or warm up for longer",
    )


def _difference(one: LoRAPair, other: LoRAPair) -> LoRAPair:
    """Return factors of `one.b @ one.a - other.b @ other.a`, of twice the rank."""
    return LoRAPair(torch.cat([one.a, other.a], dim=1), torch.cat([one.b, -other.b], dim=2))


def _delta_norms(adapters: AdapterWeights) -> dict[str, float]:
    """Return the largest Frobenius norm of b @ a over the samples, by target, without computing b @ a [O, I]."""
    norms = {}
    for name, pair in adapters.items():
        gram_BRR = (pair.b.transpose(1, 2) @ pair.b) * (pair.a @ pair.a.transpose(1, 2))
        norms[name] = float(gram_BRR.sum(dim=(1, 2)).max().clamp_min(0).sqrt())
    return norms
