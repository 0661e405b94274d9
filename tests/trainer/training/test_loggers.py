"""Tests of the TensorBoard and Weights & Biases loggers with the real packages."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import losses, metrics, run, start_worker

from hyperagent.errors import ConfigError
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.training.loggers import Loggers
from hyperagent_trainer.training.reporter import RunReporter
from hyperagent_trainer.training.trainer import train


def scalars_in_tensorboard(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Return the scalars that TensorBoard itself reads, by name."""
    reader = EventAccumulator(str(folder.tensorboard), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def numbers_in_metrics(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Return the numbers of `metrics.jsonl` by path, in float32 like TensorBoard's."""
    found = defaultdict(list)
    for line in metrics(folder):
        step = line.pop("step")
        values: list[tuple[str, Any]] = list(line.items())
        while values:
            name, value = values.pop()
            if isinstance(value, dict):
                values.extend((f"{name}/{key}", inner) for key, inner in value.items())
            elif type(value) in (int, float):
                found[name].append((step, float(np.float32(value))))
    return dict(found)


def test_tensorboard_shows_the_numbers_of_the_metrics(recipe: TrainRecipe, tmp_path: Path) -> None:
    folder = run(recipe.model_copy(update={"loggers": ("tensorboard",)}), tmp_path / "run")
    shown = scalars_in_tensorboard(folder)
    assert shown == numbers_in_metrics(folder)
    assert [step for step, _ in shown["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in shown["held_out_kl/adapter"]] == [0, 3, 6]
    assert {"tokens_per_s", "grad_norms/encoder", "conditioning/held_out/gain/mean"} <= shown.keys()
    # Loggers do not change the metrics.
    plain = run(recipe, tmp_path / "plain")
    assert losses(folder) == losses(plain)
    assert not plain.tensorboard.exists()


def _train_and_die_after(step: int, recipe: TrainRecipe, root: Path) -> None:
    report_step = RunReporter.step

    def die(self: RunReporter, number: int, **values: Any) -> None:
        report_step(self, number, **values)
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    RunReporter.step = die  # type: ignore[method-assign]
    train(recipe, RunFolder(root), threading.Event())


# Before the first checkpoint, so that the evaluation at step 0 is repeated; and between the second and the third.
@pytest.mark.parametrize("step", [1, 5])
def test_after_a_kill_no_step_is_shown_twice_and_none_is_missing(
    recipe: TrainRecipe, tmp_path: Path, step: int
) -> None:
    recipe = recipe.model_copy(update={"loggers": ("tensorboard",)})
    (tmp_path / "run").mkdir()
    life = multiprocessing.get_context("forkserver").Process(
        target=_train_and_die_after, args=(step, recipe, tmp_path / "run")
    )
    life.start()
    life.join()
    assert life.exitcode == -signal.SIGKILL
    # Event files are named by the second and read in that order; only a test restarts within a second.
    time.sleep(1)
    folder = run(recipe, tmp_path / "run")
    assert len(list(folder.tensorboard.iterdir())) == 2
    shown = scalars_in_tensorboard(folder)
    assert shown == numbers_in_metrics(folder)
    assert [number for number, _ in shown["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [number for number, _ in shown["held_out_kl/frozen"]] == [0, 3, 6]


@pytest.mark.slow
def test_of_several_ranks_the_first_one_tells(recipe: TrainRecipe, tmp_path: Path) -> None:
    on_two = recipe.model_copy(update={"loggers": ("tensorboard",), "processes": 2, "shard_network": True})
    process, folder = start_worker(on_two, tmp_path / "run"), RunFolder(tmp_path / "run")
    assert process.wait(240) == 0, folder.log.read_text()
    assert len(list(folder.tensorboard.iterdir())) == 1
    assert scalars_in_tensorboard(folder) == numbers_in_metrics(folder)


def test_wandb_is_offline_and_reaches_for_no_network(recipe: TrainRecipe, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as anywhere:
        anywhere.setblocking(False)
        # Requests to its server, its own reports and all other HTTP traffic would arrive here.
        address = f"http://127.0.0.1:{anywhere.getsockname()[1]}"
        variables = dict.fromkeys(("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), address)
        process = start_worker(
            recipe.model_copy(update={"loggers": ("wandb",)}), tmp_path / "run", NO_PROXY="", no_proxy="", **variables
        )
        folder = RunFolder(tmp_path / "run")
        assert process.wait(240) == 0, folder.log.read_text()
        with pytest.raises(BlockingIOError):
            anywhere.accept()
    (written,) = (folder.root / "wandb").glob("offline-run-*/*.wandb")
    assert written.name == "run-run.wandb"
    content = written.read_bytes()
    for name in ("held_out_kl", "grad_norms", "learning_rate"):
        assert name.encode() in content
    assert folder.read_status().state == "done"
    assert "wandb" not in folder.log.read_text()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_stops_the_run_before_anything_is_loaded(
    recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    changed = recipe.model_copy(update={"loggers": (name,), "student": tmp_path / "nothing"})
    with pytest.raises(ConfigError, match=rf"loggers name {name}, .* `pip install 'hyperagent-trainer\[{name}\]'`"):
        run(changed, tmp_path / "run")
    monkeypatch.delitem(sys.modules, name)
    # A folder of that name, which a wandb run leaves in the working directory, is not a package.
    (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="is not installed"):
        run(changed, tmp_path / "run")


def test_a_logger_is_named_once(recipe: TrainRecipe) -> None:
    with pytest.raises(ValidationError, match="a logger is named twice"):
        TrainRecipe.model_validate({**recipe.model_dump(), "loggers": ["wandb", "wandb"]})


# The error also ends TensorBoard's writer thread.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_fills_up_ends_tensorboard_and_not_the_run(
    recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

    folder, append = RunFolder(tmp_path / "run"), LocalFileSystem.append

    def full(self: LocalFileSystem, *args: Any) -> None:
        if any(line["step"] == 3 for line in metrics(folder)):
            raise OSError(28, "No space left on device")
        append(self, *args)

    monkeypatch.setattr(LocalFileSystem, "append", full)
    with capture_logs() as logs:
        run(recipe.model_copy(update={"loggers": ("tensorboard",)}), folder.root)
    assert folder.read_status().state == "done"
    assert losses(folder) == losses(run(recipe, tmp_path / "plain"))
    (warning,) = [entry for entry in logs if entry["log_level"] == "warning" and "logger" in entry]
    assert warning["logger"] == "tensorboard"
    assert "No space left" in warning["error"]
    assert [step for step, _ in scalars_in_tensorboard(folder)["loss"]] == [1, 2]


@pytest.mark.slow
def test_the_death_of_wandbs_own_process_ends_wandb_and_not_the_run(recipe: TrainRecipe, tmp_path: Path) -> None:
    long = recipe.model_copy(
        update={"loggers": ("wandb",), "num_steps": 80, "evaluate_every": 80, "checkpoint_every": 80}
    )
    process, folder = start_worker(long, tmp_path / "run"), RunFolder(tmp_path / "run")
    try:
        while not (folder.metrics.exists() and '"loss"' in folder.metrics.read_text()):
            assert process.poll() is None, folder.log.read_text()
            time.sleep(0.02)
        (core,) = [p for p in psutil.Process(process.pid).children() if p.name() == "wandb-core"]
        core.kill()
        assert process.wait(240) == 0, folder.log.read_text()
    finally:
        process.kill()
    assert folder.read_status().state == "done"
    assert list(losses(folder)) == list(range(1, 81))
    warnings = [line for line in folder.log.read_text().splitlines() if "logger dropped after an error" in line]
    assert len(warnings) == 1


class _Heard:
    """Logger that keeps its lines."""

    failures = (OSError,)

    def __init__(self) -> None:
        self.lines: list[tuple[int, Mapping[str, float]]] = []

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.lines.append((step, scalars))

    def close(self) -> None:
        pass


class _Deaf(_Heard):
    def log(self, *_: object) -> None:
        raise OSError("not now")


def test_one_logger_that_fails_is_left_out_and_another_hears_on() -> None:
    heard = _Heard()
    line = json.loads('{"step": 3, "a": {"b": {"c": 1}, "d": 0.5, "e": null}, "f": true, "g": "x", "h": [1, 2]}')
    with capture_logs() as logs:
        loggers = Loggers({"deaf": _Deaf(), "heard": heard})
        loggers.log(line)
        loggers.log({"step": 4, "i": 2})
        loggers.close()
    assert heard.lines == [(3, {"a/b/c": 1, "a/d": 0.5}), (4, {"i": 2})]
    assert [(entry["logger"], entry["error"]) for entry in logs] == [("deaf", "not now")]
