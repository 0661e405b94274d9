"""Check the student alone: its parts must match, it must be frozen, and the targets must cover it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import nn

from hyperagent.architecture import decoder_prefix, layer_types, num_experts, routers
from hyperagent_trainer.report import Check
from hyperagent_trainer.student.student import Student


def check_student(student: Student, target_names: Iterable[str]) -> Iterator[Check]:
    """Run the checks that need no forward pass."""
    names = list(target_names)
    yield _vocabulary(student)
    yield _frozen(student)
    yield _targets_exist(student, names)
    yield _coverage(student, names)
    yield _router_untouched(student, names)


def _vocabulary(student: Student) -> Check:
    rows, size = student.embeddings.shape
    head_rows, head_size = student.head.shape
    decoder_size = student.model.config.get_text_config().hidden_size
    return Check(
        "vocabulary",
        student.vocab_size <= min(rows, head_rows) and size == head_size == decoder_size,
        {
            "tokenizer entries": student.vocab_size,
            "embedding rows": rows,
            "head rows": head_rows,
            "embedding size": size,
            "head size": head_size,
        },
        f"no more entries than rows, sizes equal to the hidden size of {decoder_size}",
        "an id without a row, or a table of another model, would give meaningless results; "
        "put the student's own tokenizer and weights in one folder",
    )


def _frozen(student: Student) -> Check:
    parameters = dict(student.model.named_parameters())
    trainable = [name for name, p in parameters.items() if p.requires_grad]
    graded = [name for name, p in parameters.items() if p.grad is not None]
    return Check(
        "student_frozen",
        not trainable and not graded,
        {"parameters": len(parameters), "trainable": len(trainable), "with a gradient": len(graded)},
        "none trainable, none with a gradient",
        "only the network may learn; call requires_grad_(False) on the student",
    )


def _targets_exist(student: Student, names: list[str]) -> Check:
    modules = dict(student.model.named_modules())
    wrong = [name for name in names if not isinstance(modules.get(name), nn.Linear)]
    return Check(
        "targets_exist",
        bool(names) and not wrong,
        {
            "targets": len(names),
            "not a linear layer of the student": len(wrong),
            **({"first": wrong[0]} if wrong else {}),
        },
        "at least one target, each a linear layer of the student",
        "the network was made for another student; discover the targets on this one",
    )


def _coverage(student: Student, names: list[str]) -> Check:
    """Check that every decoder layer has a target, and that layers of one kind have the same targets."""
    prefix, layers = decoder_prefix(student.model), student.model.get_decoder().layers
    kinds = layer_types(student.model.config.get_text_config())
    paths: list[set[str]] = [set() for _ in layers]
    for name in names:
        head, _, rest = name.removeprefix(f"{prefix}.layers.").partition(".")
        if name.startswith(f"{prefix}.layers.") and head.isdigit() and int(head) < len(layers):
            paths[int(head)].add(rest)
    of_kind: dict[str, set[str]] = defaultdict(set)
    for kind, found in zip(kinds, paths, strict=True):
        of_kind[kind] |= found
    partial = [i for i, kind in enumerate(kinds) if not paths[i] or paths[i] != of_kind[kind]]
    counts = [len(found) for found in paths]
    return Check(
        "coverage",
        not partial,
        {
            "layers": len(layers),
            "targets per layer at least": min(counts),
            "at most": max(counts),
            **{f"{kind} layers": kinds.count(kind) for kind in dict.fromkeys(kinds)},
            "uncovered or partial": ", ".join(map(str, partial)) or "none",
        },
        "a target in every decoder layer, the same ones in all layers of a kind",
        "layers without an adapter do not change, and the others learn to compensate; name the projections of every kind "
        "of layer (Qwen3-Next: self_attn.* and linear_attn.*)",
    )


def _router_untouched(student: Student, names: list[str]) -> Check:
    found = routers(student.model)
    expects = num_experts(student.model.config.get_text_config()) > 0
    learning = sum(p.requires_grad for router in found.values() for p in router.parameters())
    forbidden = [n for n in names if ".experts" in n or any(n == r or n.startswith(f"{r}.") for r in found)]
    return Check(
        "router_untouched",
        not forbidden and not learning and (bool(found) or not expects),
        {
            "routers": len(found),
            "targets in routers or routed experts": len(forbidden),
            "router parameters that can learn": learning,
        },
        "none among the targets, none learns" + (", at least one router found" if expects else ""),
        "an adapter on a router changes which experts are picked, and routed experts are no linear layers; leave both out",
    )
