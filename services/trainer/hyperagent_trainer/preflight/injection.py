"""Check the injection of adapters: a zero adapter must change nothing, and every target's adapter must take effect.

Legend of shape suffixes: B samples, T tokens, P prompt tokens, E feature size, D hidden size, O a layer's output
size, R rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from hyperagent.architecture import routers
from hyperagent_trainer.preflight.probe import Probe, b_gradients, outputs_of, resolution
from hyperagent_trainer.report import Check
from hyperagent_trainer.student.activation_checkpoint import recomputed_layers


def check_injection(probe: Probe) -> Iterator[Check]:
    """Run the checks that do not change the network; the student's logits must be finite."""
    yield _every_target_reached(probe)
    yield _routing(probe)
    if probe.adapted.reads_prompt:
        yield _samples_apart(probe)
    yield _checkpointing(probe)


@torch.no_grad()
def check_start(probe: Probe) -> Check:
    """Check that an untrained network does not change the student's logits."""
    start = probe.start()
    bare, again = probe.logits(start), probe.logits(start)
    adapted = probe.logits(probe.generate())
    return Check(
        "zero_init",
        bool(torch.equal(bare, again) and torch.equal(bare, adapted) and bare.isfinite().all()),
        {
            "logits": bare.numel(),
            "that differ": int((bare != adapted).sum()),
            "by at most": float((bare - adapted).abs().max()),
            "that differ between two passes": int((bare != again).sum()),
            "not finite": int((~bare.isfinite()).sum()),
        },
        "every logit finite and, bit for bit, the frozen student's, or those under the static adapter of a warm start",
        "training must start from the student as it is, not from noise; initialize the parameters that make B to zero, and "
        "use deterministic kernels if two passes differ",
    )


def _every_target_reached(probe: Probe) -> Check:
    """Check that every target's adapter takes effect.

    The loss depends on B of a target if and only if its module runs and the delta is added to the module's output.
    """
    leaves = probe.zero_leaves()
    with outputs_of({name: probe.module(name) for name in leaves}) as calls:
        gradients = b_gradients(probe.loss(leaves), leaves)
    idle = [name for name, outputs in calls.items() if not outputs]
    unreached = [name for name, g in gradients.items() if g is None or not g.isfinite().all() or not g.any()]
    return Check(
        "targets_reached",
        not unreached and not idle,
        {
            "targets": len(leaves),
            "never run": len(idle),
            "without an effect on the loss": len(unreached),
            **({"first": unreached[0]} if unreached else {}),
        },
        "every target runs in a forward pass, and its delta reaches the loss",
        "an adapter that is not applied silently trains nothing; leave out modules that never run, or fix the injector",
    )


@torch.no_grad()
def _routing(probe: Probe) -> Check:
    found = routers(probe.student.model)
    zero = probe.zero_leaves()
    small = {name: type(pair)(pair.a, 0.01 * _unit_rows(pair.b)) for name, pair in zero.items()}
    picks = []
    for adapters in (None, zero, small):
        with outputs_of(found) as calls:
            probe.hidden(adapters)
        picks.append(
            torch.cat([_indices(output) for outputs in calls.values() for output in outputs]) if found else None
        )
    bare, with_zero, with_small = picks
    if bare is None or with_zero is None or with_small is None:
        return Check("routing", True, {"routers": 0}, "no router, nothing to compare", "")
    changed = int((bare != with_zero).sum())
    return Check(
        "routing",
        changed == 0,
        {
            "picks": bare.numel(),
            "changed by a zero adapter": changed,
            "changed by a small one": f"{float((bare != with_small).float().mean()):.2%}",
        },
        "the same experts for every token with and without a zero adapter",
        "if experts are picked at random, or by another rule than the student's, every gradient is that of another network; "
        "remove the noise from the router",
    )


def _samples_apart(probe: Probe) -> Check:
    """Check that sample 0 depends on its own prompt and not on that of sample 1, by gradient (exactly) and by value."""
    features_BPE, mask_BP = probe.adapted.features(probe.prompts)
    features_BPE = features_BPE.clone().requires_grad_()
    # An untrained network's B is zero, so nothing would depend on the prompts; its parameters are moved off zero.
    network = copy.deepcopy(probe.adapted.network)
    with torch.no_grad():
        for parameter in network.b_parameters():
            parameter.add_(_unit_rows(parameter), alpha=0.01)
    moved = network(features_BPE, mask_BP)
    hidden_BTD = probe.hidden(moved)
    first_TD = hidden_BTD[0]
    gradient_BPE = None
    if first_TD.requires_grad:
        (gradient_BPE,) = torch.autograd.grad(first_TD.square().sum(), features_BPE, allow_unused=True)
    own, foreign = (0.0, 0.0) if gradient_BPE is None else (float(gradient_BPE[i].abs().max()) for i in (0, 1))
    with torch.no_grad():
        swapped = {name: type(pair)(pair.a.clone(), pair.b.clone()) for name, pair in moved.items()}
        for pair in swapped.values():
            pair.a[1], pair.b[1] = pair.a[1].flip(0), -pair.b[1]
        after_BTD = probe.hidden(swapped)
        scale = float(hidden_BTD.abs().max())
        change_B = [float(c) / scale for c in (after_BTD - hidden_BTD).abs().amax(dim=(1, 2))]
    bound = resolution(hidden_BTD)
    return Check(
        "samples_apart",
        own > 0 and foreign == 0 and change_B[0] <= bound < change_B[1],
        {
            "gradient to its own prompt": own,
            "to the other sample's": foreign,
            "change of a sample's hidden states with the other's adapter": change_B[0],
            "with its own": change_B[1],
        },
        f"a gradient to its own prompt and exactly none to the other's; changes below {bound:.1g} and above",
        "a sample that sees another's adapter learns from the wrong prompt; apply one adapter per sample",
    )


def _checkpointing(probe: Probe) -> Check:
    name, bound_text = "checkpointing", "gradients to B as without activation checkpointing, every layer run twice"
    remedy = (
        "recomputed layers must see the same adapters as in the forward pass; keep the injection open until the backward "
        "pass is done"
    )
    model = probe.student.model
    if not model.supports_gradient_checkpointing:
        return Check(name, True, {"supported by the student": "no"}, bound_text, remedy)
    plain, once = _gradients_within(probe)
    try:
        with recomputed_layers(model):
            recomputed, twice = _gradients_within(probe)
    except CheckpointError:
        return Check(name, False, {"recomputation": "another graph than the first pass"}, bound_text, remedy)
    scale = max((float(g.abs().max()) for g in plain if g is not None), default=0.0)
    difference = max(
        (
            float("inf") if (a is None) != (b is None) else float((a - b).abs().max())
            for a, b in zip(plain, recomputed, strict=True)
            if a is not None and b is not None
        ),
        default=float("inf"),
    ) / (scale or 1.0)
    bound = resolution(probe.student.head)
    return Check(
        name,
        difference <= bound and twice == 2 * once,
        {
            "largest difference, of the largest gradient": difference,
            "runs of a target": once,
            "with checkpointing": twice,
        },
        f"{bound_text}; at most {bound:.1g}",
        remedy,
    )


def _gradients_within(probe: Probe) -> tuple[list[Tensor | None], int]:
    """Return the gradients to B of every target, and how often the first target ran.

    The injection stays open until the gradients are computed.
    """
    leaves = probe.zero_leaves()
    first = next(iter(leaves))
    with outputs_of({first: probe.module(first)}) as calls, probe.adapted.injector.inject(leaves):
        hidden_BTD = probe.student.hidden_states(probe.batch.token_ids_BT)
        gradients = b_gradients(hidden_BTD.square().sum(), leaves)
    return list(gradients.values()), len(calls[first])


def _indices(output: object) -> Tensor:
    """Return a router's picks [B * T, experts per token]: the tensor of its output that is not floating point."""
    parts = output if isinstance(output, tuple) else (output,)
    return next(part for part in parts if isinstance(part, Tensor) and not part.is_floating_point())


def _unit_rows(like: Tensor) -> Tensor:
    """Return fixed normal numbers in the shape of `like`, independent of the global random state."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator).to(like)
