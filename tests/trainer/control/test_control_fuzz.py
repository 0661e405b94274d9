"""Tests of malicious start requests: no internal error, no other process, no file outside the folders."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from hyperagent_trainer.control.app import create_control_app
from hyperagent_trainer.control.settings import ControlSettings
from hyperagent_trainer.control.supervisor import Supervisor

CHILD = (sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "training_child.py"))
SPAWNS = ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system", "os.fork", "os.spawn")
PARTS = (
    "..", "/", "\\", "%2e%2e", "%252e", "\0", "\n", "\u202e", "\uff0e\uff0e\uff0f", "é", "💥", "~", "$(id)", "`id`", ";id",
    "/etc/passwd", "file://", "finishes", ".yaml", "secret", "con", " ", "-", ".", "a" * 80, "http://169.254.169.254/",
)  # fmt: skip
NAMES = (
    "../secret",
    "../recipes/finishes",
    "/etc/passwd",
    "finishes\0",
    "finishes.yaml",
    "./finishes",
    "finishes/",
    "",
)
VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "1", "../x", [], [1], {}, {"a": 1},
)  # fmt: skip
FIELDS = (
    "num_steps",
    "batch_size",
    "learning_rate",
    "seed",
    "student",
    "tokens",
    "cache",
    "command",
    "env",
    "__class__",
)

_calls: list[tuple[str, tuple[Any, ...]]] | None = None
"""Audit events of the interpreter, or None while not recording; an audit hook cannot be removed."""


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _calls is not None and (event == "open" or event in SPAWNS):
        _calls.append((event, arguments))


@contextmanager
def audited() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    global _calls
    if not getattr(audited, "is_hooked", False):
        sys.addaudithook(_listen)
        audited.is_hooked = True  # type: ignore[attr-defined]
    _calls = []
    try:
        yield _calls
    finally:
        _calls = None


def name(chance: random.Random) -> Any:
    kind = chance.random()
    if kind < 0.01:
        return "finishes"
    if kind < 0.2:
        return chance.choice(NAMES)
    if kind < 0.3:
        return chance.choice(VALUES)
    return "".join(chance.choice(PARTS) for _ in range(chance.randint(1, 5)))


def body(chance: random.Random) -> bytes:
    kind = chance.random()
    if kind < 0.05:
        return chance.randbytes(chance.randint(0, 200))
    if kind < 0.1:
        return json.dumps(chance.choice(VALUES)).encode()
    if kind < 0.12:
        depth = chance.randint(1, 5000)
        return b"[" * depth + b"]" * chance.randint(0, depth)
    request: dict[str, Any] = {"recipe": name(chance)}
    if chance.random() < 0.5:
        fields = chance.sample(FIELDS, chance.randint(0, 3))
        request["overrides"] = {field: chance.choice(VALUES) for field in fields}
    if chance.random() < 0.2:
        request[chance.choice(FIELDS)] = chance.choice(VALUES)
    return json.dumps(request).encode()


@pytest.fixture
def settings(tmp_path: Path) -> ControlSettings:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    recipe = "student: ../finishes\ntokens: t\ncache: c\n"
    (recipes / "finishes.yaml").write_text(recipe)
    (tmp_path / "secret.yaml").write_text(recipe)
    (tmp_path / "secret").mkdir()
    return ControlSettings(recipes=recipes, runs=tmp_path / "runs", stop_grace_s=5.0)


def is_foreign(path: object, settings: ControlSettings) -> bool:
    """Return whether a file belongs neither to the service's folders nor to the interpreter or the system."""
    if not isinstance(path, (str, bytes)):
        return False  # A descriptor that was open already.
    place = Path(os.path.realpath(os.fsdecode(path)))
    own = (settings.runs, settings.recipes, Path("/proc"), Path("/dev"), Path(sys.prefix), Path(sys.base_prefix))
    code = (Path(entry) for entry in sys.path if entry)
    # A traceback reads only the source files of modules.
    is_code = place.suffix in (".py", ".pyc", ".so") and any(place.is_relative_to(folder.resolve()) for folder in code)
    return not is_code and not any(place.is_relative_to(folder.resolve()) for folder in own)


@pytest.mark.parametrize("num_requests", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_start_requests_reach_nothing_but_the_recipes(num_requests: int, settings: ControlSettings) -> None:
    chance = random.Random(0)
    supervisor = Supervisor(settings, command=CHILD)
    app = create_control_app(supervisor, token="secret")
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    statuses: dict[int, int] = {}
    with TestClient(app, headers=headers, raise_server_exceptions=False) as client, audited() as calls:
        for _ in range(num_requests):
            content = body(chance)
            answer = client.post("/v1/runs", content=content)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (content, answer.text)
        seen = list(calls)

    started = {run.run_id for run in supervisor.runs.all()}
    assert statuses[201] == len(started) > 0, "what is well meant is let through, or nothing was tested"
    assert statuses[404] > 0
    assert statuses[422] > num_requests / 2
    spawned = [(event, arguments) for event, arguments in seen if event != "open"]
    assert len([event for event, _ in spawned if event == "subprocess.Popen"]) == len(started)
    for event, arguments in spawned:
        if event == "subprocess.Popen":
            executable, command, *_ = arguments
            assert executable == "/bin/sh"
            assert tuple(command[4:-1]) == CHILD
            assert Path(command[-1]).parent == settings.runs.resolve()
            assert Path(command[-1]).name in started
        else:
            # Only events of subprocess itself.
            assert event in ("os.posix_spawn", "os.fork"), (event, arguments)
    assert {str(a[0]) for event, a in seen if event == "open" and is_foreign(a[0], settings)} == set()
