"""The tree in the docstring of `hyperagent.errors` is the tree of classes, here and in every service."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from hyperagent import errors

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^ {4}(?P<indent>[│ ]*)[├└]── (?P<name>\w+) +\S.*?\((?P<builtin>\w+)\)$")


def drawn() -> dict[str, tuple[str, str]]:
    """Name -> base and built-in class, as the docstring draws them."""
    tree: dict[str, tuple[str, str]] = {}
    path = ["HyperagentError"]
    for line in (errors.__doc__ or "").splitlines():
        if found := LINE.match(line):
            depth = 1 + len(found["indent"]) // 4
            assert depth <= len(path), f"{found['name']} hangs in the air"
            assert found["name"] not in tree, f"{found['name']} is drawn twice"
            path = [*path[:depth], found["name"]]
            tree[found["name"]] = path[depth - 1], found["builtin"]
    return tree


def classes_in_the_sources() -> list[tuple[str, tuple[str, ...]]]:
    """Name and bases of every class of the packages."""
    files = [path for top in ("shared", "services", "demo") for path in (ROOT / top).rglob("*.py")]
    assert len(files) > 150
    return [
        (node.name, tuple(ast.unparse(base).rpartition(".")[2] for base in node.bases))
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]


def test_the_tree_that_is_drawn_is_the_tree_of_classes() -> None:
    found: list[tuple[str, str]] = []
    known, new = set[str](), {"HyperagentError"}
    while new:
        known |= new
        added = [(name, base) for name, bases in classes_in_the_sources() for base in bases if base in new]
        found += added
        new = {name for name, _ in added}
    assert sorted(found) == sorted((name, base) for name, (base, _) in drawn().items())


def test_each_class_is_also_the_built_in_one_that_is_named() -> None:
    for name, (base, builtin) in drawn().items():
        kind = getattr(errors, name)
        assert issubclass(kind, getattr(errors, base))
        assert next(one.__name__ for one in kind.__mro__ if one.__module__ == "builtins") == builtin, name
