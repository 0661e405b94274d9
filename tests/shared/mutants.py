"""Mutation testing of the cache; run by hand, with the results in docs/reliability.md.

    python tests/shared/mutants.py [--count 120] [--seed 0]

Samples mutations of a single place (a comparison, an operator, a constant, a condition, a raise) in the code of the
codecs and of recovery, and runs the fast tests on a copy with that mutation. A mutation that no test detects is printed:
either it is equivalent to the original code, or a test is missing.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = (
    "format/truncation", "format/codecs", "format/elias_fano", "format/record", "format/convert", "format/shard",
    "index_rebuild", "maintenance/repair", "shard_reader", "writer",
)  # fmt: skip
TESTS = ("cache/test_format", "cache/test_maintenance", "cache/test_local", "test_topk", "cache/test_remote")
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.Mod: ast.Mult,
}  # fmt: skip


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield replacements of `node`, each with a name for display."""
    changed = copy.deepcopy(node)
    match changed:
        case ast.Compare(ops=[operator]) if type(operator) in COMPARISONS:
            changed.ops = [COMPARISONS[type(operator)]()]
            yield "comparison", changed
        case ast.BinOp(op=operator) if type(operator) in OPERATORS and not _is_type(changed):
            changed.op = OPERATORS[type(operator)]()
            yield "operator", changed
        case ast.BoolOp(op=operator):
            changed.op = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield "and, or", changed
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "not", operand
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield "constant", ast.Constant(value + 1)
        case ast.Raise():
            yield "raise", ast.Pass()


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, kind and source of every mutant."""
    tree = ast.parse(source)
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns"):
                continue
            places = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
            for place, node in places:
                if not isinstance(node, ast.AST):
                    continue
                for kind, changed in changes(node):
                    ast.copy_location(changed, node)
                    _put(parent, field, place, changed)
                    yield getattr(node, "lineno", 0), kind, ast.unparse(ast.fix_missing_locations(tree))
                    _put(parent, field, place, node)


def is_noticed(copy_of_shared: Path, timeout_s: float) -> bool:
    """Return whether the tests on the code in `copy_of_shared` fail or time out."""
    tests = [str(ROOT / f"tests/shared/{name}.py") for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy_of_shared),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-s", type=float, default=120)
    options = parser.parse_args()
    found = [
        (module, *mutant)
        for module in MODULES
        for mutant in mutants((ROOT / f"shared/hyperagent/cache/{module}.py").read_text(encoding="utf-8"))
    ]
    chosen = random.Random(options.seed).sample(found, min(options.count, len(found)))
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) / "shared"
        shutil.copytree(ROOT / "shared", shared)
        if is_noticed(shared, options.timeout_s):
            sys.exit("the tests fail on the unchanged code; fix that first")
        unnoticed = 0
        for module, line, kind, source in chosen:
            path = shared / f"hyperagent/cache/{module}.py"
            original = path.read_text(encoding="utf-8")
            path.write_text(source, encoding="utf-8")
            if not is_noticed(shared, options.timeout_s):
                unnoticed += 1
                sys.stdout.write(f"not noticed: {module}.py, line {line}, {kind}\n")
                sys.stdout.flush()
            path.write_text(original, encoding="utf-8")
    sys.stdout.write(f"{len(chosen) - unnoticed} of {len(chosen)} noticed, of {len(found)} that there are\n")


def _is_type(node: ast.BinOp) -> bool:
    # `X | None` in a cast or an annotation.
    return isinstance(node.right, ast.Constant) and node.right.value is None


def _put(parent: ast.AST, field: str, place: int | None, node: ast.AST) -> None:
    if place is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[place] = node


if __name__ == "__main__":
    main()
