"""Tests of the supervisor with real child processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from hyperagent.errors import ConfigError, Conflict, CorruptRecord, NotFound, ServiceError
from hyperagent.http.run_models import FINAL_STATES, RunOverrides, RunRequest
from hyperagent_trainer.control.settings import ControlSettings
from hyperagent_trainer.control.supervisor import Supervisor
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.runs.store import Run

CHILD = (sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "training_child.py"))
BEHAVIORS = (
    "trains",
    "finishes",
    "ignores-sigterm",
    "lingers",
    "stops-and-lingers",
    "answers-no-signals-yet",
    "crashes",
    "killed",
    "killed-with-a-child",
)

Open = Callable[[], Supervisor]


@pytest.fixture
def settings(tmp_path: Path) -> ControlSettings:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for behavior in BEHAVIORS:
        (recipes / f"{behavior}.yaml").write_text(f"student: ../{behavior}\ntokens: t\ncache: c\nnum_steps: 1000\n")
    return ControlSettings(recipes=recipes, runs=tmp_path / "runs", stop_grace_s=1.0)


@pytest.fixture
def open_supervisor(settings: ControlSettings) -> Iterator[Open]:
    """Return a function that opens supervisors on the same folders; each one closes the previous one."""
    opened: list[Supervisor] = []

    def open_one() -> Supervisor:
        if opened:
            opened.pop().close()
        opened.append(Supervisor(settings, command=CHILD))
        return opened[-1]

    yield open_one
    for supervisor in opened:
        supervisor.close()


@pytest.fixture
def supervisor(open_supervisor: Open) -> Supervisor:
    return open_supervisor()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def wait_for_state(supervisor: Supervisor, run: Run, *states: str) -> Run:
    wait_until(lambda: supervisor.runs.get(run.run_id).status.state in states)
    return supervisor.runs.get(run.run_id)


def start(supervisor: Supervisor, behavior: str, key: str | None = None) -> Run:
    return supervisor.start(RunRequest(recipe=behavior), idempotency_key=key)


def process_of(run: Run) -> psutil.Process:
    return psutil.Process(json.loads(run.folder.process.read_text())["pid"])


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start_in_a_control_process_that_is_killed(settings: ControlSettings, behavior: str) -> str:
    """Start a run from a separate process, kill that process with SIGKILL, and return the run's id."""
    reader, writer = os.pipe()
    control = os.fork()
    if control == 0:
        with suppress(BaseException):
            run = start(Supervisor(settings, command=CHILD), behavior)
            os.write(writer, run.run_id.encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        run_id = pipe.read().decode()
    os.waitpid(control, 0)
    assert run_id
    return run_id


def test_a_run_gets_the_resolved_recipe_and_ends_done(supervisor: Supervisor, settings: ControlSettings) -> None:
    run = supervisor.start(RunRequest(recipe="finishes", overrides=RunOverrides(num_steps=12, seed=3)))
    run = wait_for_state(supervisor, run, *FINAL_STATES)
    assert (run.status.state, run.status.step, run.request.recipe, run.is_resumable) == ("done", 12, "finishes", False)
    recipe = json.loads(run.folder.recipe.read_text())
    assert (recipe["num_steps"], recipe["seed"]) == (12, 3)
    assert recipe["student"] == str(settings.recipes.parent.resolve() / "finishes")
    assert supervisor.recipes() == sorted(BEHAVIORS)
    assert [r.run_id for r in supervisor.runs.all()] == [run.run_id]


def test_a_stopped_run_has_saved_and_resumes_where_it_was(supervisor: Supervisor) -> None:
    run = start(supervisor, "trains")
    wait_until(lambda: supervisor.runs.get(run.run_id).status.step >= 3)
    supervisor.stop(run.run_id)
    stopped = wait_for_state(supervisor, run, *FINAL_STATES)
    assert (stopped.status.state, stopped.is_resumable) == ("stopped", True)

    resumed = supervisor.resume(run.run_id)
    assert resumed.status.state in ("queued", "running")
    wait_until(lambda: supervisor.runs.get(run.run_id).status.step > stopped.status.step)
    steps = [line["step"] for line in supervisor.runs.metrics(run.run_id).values]
    assert steps == list(range(1, len(steps) + 1))


def test_closing_tells_the_training_at_once_and_can_wait_later(settings: ControlSettings) -> None:
    supervisor = Supervisor(settings, command=CHILD)
    run = start(supervisor, "trains")
    wait_until(lambda: supervisor.runs.get(run.run_id).status.step >= 1)
    supervisor.begin_close()
    assert supervisor.is_closing.is_set()
    assert wait_for_state(supervisor, run, *FINAL_STATES).status.state == "stopped"
    supervisor.close()


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace_period(supervisor: Supervisor) -> None:
    run = start(supervisor, "ignores-sigterm")
    wait_for_state(supervisor, run, "running")
    process = process_of(run)
    supervisor.stop(run.run_id)
    supervisor.stop(run.run_id)
    run = wait_for_state(supervisor, run, *FINAL_STATES)
    assert run.status.state == "failed"
    assert "1 s after SIGTERM and was killed" in run.status.reason
    assert not is_running(process)


def test_a_run_stopped_before_its_process_answers_signals_is_stopped(supervisor: Supervisor) -> None:
    run = start(supervisor, "answers-no-signals-yet")
    wait_for_state(supervisor, run, "loading")
    supervisor.stop(run.run_id)
    run = wait_for_state(supervisor, run, *FINAL_STATES)
    assert (run.status.state, run.is_resumable) == ("stopped", False)
    with pytest.raises(Conflict, match="start a new run"):
        supervisor.resume(run.run_id)


def test_a_killed_process_fails_its_run_and_keeps_what_it_had_reported(supervisor: Supervisor) -> None:
    run = wait_for_state(supervisor, start(supervisor, "killed"), *FINAL_STATES)
    assert (run.status.state, run.status.step, run.is_resumable) == ("failed", 7, True)
    assert "SIGKILL" in run.status.reason


def test_a_crash_gives_its_exit_code_and_last_log_line_as_the_reason(supervisor: Supervisor) -> None:
    run = wait_for_state(supervisor, start(supervisor, "crashes"), *FINAL_STATES)
    assert run.status.state == "failed"
    assert "exit code 3" in run.status.reason
    assert run.status.reason.endswith("the reader met a bad row")


def test_what_a_dead_process_had_started_is_ended(supervisor: Supervisor) -> None:
    run = wait_for_state(supervisor, start(supervisor, "killed-with-a-child"), *FINAL_STATES)
    pid = int((run.folder.root / "child.pid").read_text())
    wait_until(lambda: not psutil.pid_exists(pid) or not is_running(psutil.Process(pid)))


def ids_of(supervisor: Supervisor) -> list[str]:
    return [run.run_id for run in supervisor.runs.all()]


def test_one_run_trains_at_a_time_and_the_others_wait_their_turn(supervisor: Supervisor) -> None:
    first = wait_for_state(supervisor, start(supervisor, "trains"), "running")
    second, third, fourth = (start(supervisor, behavior) for behavior in ("trains", "crashes", "finishes"))
    assert {run.status.state for run in (second, third, fourth)} == {"queued"}
    assert ids_of(supervisor) == [fourth.run_id, third.run_id, second.run_id, first.run_id]
    for wish in (supervisor.pause, supervisor.checkpoint):
        with pytest.raises(Conflict, match="queued"):
            wish(second.run_id)

    supervisor.stop(first.run_id)
    wait_for_state(supervisor, first, "stopped")
    wait_for_state(supervisor, second, "running")
    assert supervisor.resume(first.run_id).status.state == "queued"
    with pytest.raises(Conflict, match="is queued and cannot be resumed"):
        supervisor.resume(first.run_id)
    assert not third.folder.log.exists()

    supervisor.stop(second.run_id)
    assert wait_for_state(supervisor, third, *FINAL_STATES).status.state == "failed"
    assert wait_for_state(supervisor, fourth, *FINAL_STATES).status.state == "done"
    wait_for_state(supervisor, first, "running")


def test_a_run_that_waits_is_stopped_and_never_starts(supervisor: Supervisor) -> None:
    first = wait_for_state(supervisor, start(supervisor, "trains"), "running")
    second, third = start(supervisor, "finishes"), start(supervisor, "finishes")
    stopped = supervisor.stop(second.run_id).status
    assert (stopped.state, stopped.reason) == ("stopped", "stopped on request while it was queued")
    with pytest.raises(Conflict, match="nothing to stop"):
        supervisor.stop(second.run_id)
    shutil.rmtree(third.folder.root)
    fourth = start(supervisor, "finishes")
    supervisor.stop(first.run_id)
    wait_for_state(supervisor, fourth, "done")
    assert supervisor.runs.get(second.run_id).status == stopped
    assert not second.folder.log.exists()


def test_the_queue_has_an_end(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperagent_trainer.control.supervisor.MAX_WAITING", 2)
    first = wait_for_state(supervisor, start(supervisor, "trains"), "running")
    waiting = [start(supervisor, "finishes") for _ in range(2)]
    with pytest.raises(Conflict, match="2 runs are queued already"):
        start(supervisor, "finishes")
    assert ids_of(supervisor) == [*(run.run_id for run in reversed(waiting)), first.run_id]


def test_the_queue_outlives_its_supervisor(open_supervisor: Open) -> None:
    supervisor = open_supervisor()
    first = wait_for_state(supervisor, start(supervisor, "trains"), "running")
    second, third = start(supervisor, "trains"), start(supervisor, "finishes")
    supervisor = open_supervisor()
    assert supervisor.runs.get(first.run_id).status.state == "stopped"
    wait_for_state(supervisor, second, "running")
    assert supervisor.runs.get(third.run_id).status.state == "queued"
    supervisor.stop(second.run_id)
    wait_for_state(supervisor, third, "done")


def test_a_queue_that_is_lost_is_built_again(settings: ControlSettings, open_supervisor: Open) -> None:
    supervisor = open_supervisor()
    first = wait_for_state(supervisor, start(supervisor, "trains", key="k1"), "running")
    second = start(supervisor, "trains", key="k2")
    for path in settings.runs.glob("runs.sqlite*"):
        path.unlink()
    supervisor = open_supervisor()
    wait_for_state(supervisor, second, "running")
    assert [start(supervisor, "trains", key=key).run_id for key in ("k1", "k2")] == [first.run_id, second.run_id]


def test_a_process_that_lingers_after_its_last_word_does_not_bar_the_next_run(supervisor: Supervisor) -> None:
    first = wait_for_state(supervisor, start(supervisor, "lingers"), "done")
    process = process_of(first)
    second = start(supervisor, "finishes")
    wait_for_state(supervisor, second, "done")
    assert not is_running(process)
    assert supervisor.runs.get(first.run_id).status.state == "done"


def test_a_run_is_resumed_only_when_its_old_process_has_ended(supervisor: Supervisor) -> None:
    run = wait_for_state(supervisor, start(supervisor, "stops-and-lingers"), "stopped")
    process = process_of(run)
    assert is_running(process)
    assert supervisor.resume(run.run_id).status.state in ("queued", "stopped")
    assert not is_running(process)
    assert process_of(run) != process


def test_many_requests_with_one_key_start_one_run(supervisor: Supervisor) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: start(supervisor, "finishes", key="k"), range(40)))
    assert len({run.run_id for run in runs}) == len(ids_of(supervisor)) == 1


def test_a_key_whose_run_was_removed_is_free_again(supervisor: Supervisor) -> None:
    first = wait_for_state(supervisor, start(supervisor, "finishes", key="k"), "done")
    shutil.rmtree(first.folder.root)
    assert start(supervisor, "finishes", key="k").run_id != first.run_id


def test_an_idempotency_key_starts_one_run_across_restarts(open_supervisor: Open) -> None:
    supervisor = open_supervisor()
    run = start(supervisor, "trains", key="k1")
    assert start(supervisor, "trains", key="k1").run_id == run.run_id
    supervisor = open_supervisor()
    assert start(supervisor, "trains", key="k1").run_id == run.run_id
    with pytest.raises(Conflict, match="k1"):
        start(supervisor, "finishes", key="k1")
    with pytest.raises(Conflict, match="k1"):
        supervisor.start(RunRequest(recipe="trains", overrides=RunOverrides(seed=1)), idempotency_key="k1")
    assert start(supervisor, "trains", key="k2").run_id != run.run_id


def test_unknown_names_are_not_found(supervisor: Supervisor, settings: ControlSettings) -> None:
    with pytest.raises(NotFound, match=r"there are: answers-no-signals-yet, crashes, finishes"):
        start(supervisor, "tarins")
    for run_id in ("20260101-000000-000000", "..", "../recipes", ""):
        with pytest.raises(NotFound):
            supervisor.runs.get(run_id)
    assert not [path for path in settings.runs.iterdir() if path.is_dir()]


def test_a_wrong_recipe_starts_nothing(supervisor: Supervisor, settings: ControlSettings) -> None:
    (settings.recipes / "wrong.yaml").write_text("student: s\ntokens: t\ncache: c\nnum_stepz: 3\n")
    with pytest.raises(ConfigError, match="num_stepz"):
        start(supervisor, "wrong")
    assert supervisor.runs.all() == []


def test_a_supervisor_that_is_closed_leaves_no_process(open_supervisor: Open) -> None:
    supervisor = open_supervisor()
    run = start(supervisor, "trains")
    wait_for_state(supervisor, run, "running")
    process = process_of(run)
    supervisor = open_supervisor()
    assert not is_running(process)
    assert (supervisor.runs.get(run.run_id).status.state, supervisor.runs.get(run.run_id).is_resumable) == (
        "stopped",
        True,
    )


def test_a_run_whose_control_process_was_killed_is_adopted(settings: ControlSettings, open_supervisor: Open) -> None:
    run_id = start_in_a_control_process_that_is_killed(settings, "trains")
    supervisor = open_supervisor()
    run = supervisor.runs.get(run_id)
    process = process_of(run)
    wait_for_state(supervisor, run, "running")
    waiting = start(supervisor, "finishes")
    assert waiting.status.state == "queued"
    supervisor.stop(run_id)
    assert wait_for_state(supervisor, run, *FINAL_STATES).status.state == "stopped"
    wait_for_state(supervisor, waiting, "done")
    assert not is_running(process)


def test_an_adopted_process_that_dies_fails_its_run(settings: ControlSettings, open_supervisor: Open) -> None:
    run_id = start_in_a_control_process_that_is_killed(settings, "trains")
    supervisor = open_supervisor()
    run = wait_for_state(supervisor, supervisor.runs.get(run_id), "running")
    process_of(run).kill()
    assert wait_for_state(supervisor, run, *FINAL_STATES).status.state == "failed"


def test_a_run_whose_process_died_unwatched_is_failed(settings: ControlSettings, open_supervisor: Open) -> None:
    run_id = start_in_a_control_process_that_is_killed(settings, "trains")
    pid_file = settings.runs / run_id / "process.json"
    process = psutil.Process(json.loads(pid_file.read_text())["pid"])
    wait_until(lambda: RunFolder(settings.runs / run_id).read_status().state == "running")
    process.kill()
    wait_until(lambda: not is_running(process))
    assert open_supervisor().runs.get(run_id).status.state == "failed"


@pytest.mark.parametrize("differs", ["creation time", "command line"])
def test_a_recycled_pid_is_not_adopted(open_supervisor: Open, differs: str) -> None:
    supervisor = open_supervisor()
    run = wait_for_state(supervisor, start(supervisor, "killed"), "failed")
    run.folder.write_status(run.status.model_copy(update={"state": "running"}))
    argument = str(run.folder.root) if differs == "creation time" else "elsewhere"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)", argument]) as bystander:
        create_time = psutil.Process(bystander.pid).create_time() - (60 if differs == "creation time" else 0)
        record = {"pid": bystander.pid, "create_time": create_time}
        run.folder.process.write_text(json.dumps(record))
        supervisor = open_supervisor()
        assert supervisor.runs.get(run.run_id).status.state == "failed"
        assert bystander.poll() is None
        bystander.kill()


def test_a_process_record_that_cannot_be_written_starts_no_process(supervisor: Supervisor) -> None:
    run = wait_for_state(supervisor, start(supervisor, "killed"), "failed")
    run.folder.process.unlink()
    run.folder.process.mkdir()
    status = supervisor.resume(run.run_id).status
    assert status.state == "failed"
    assert str(run.folder.process) in status.reason
    # A process that has just ended has no command line any more.
    started = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in started if str(run.folder.root) in line]
    run.folder.process.rmdir()


def test_a_runs_folder_has_one_supervisor(supervisor: Supervisor, settings: ControlSettings) -> None:
    with pytest.raises(ServiceError, match="another control process"):
        Supervisor(settings, command=CHILD)


def test_a_missing_recipes_folder_is_named(settings: ControlSettings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-folder"):
        Supervisor(settings.model_copy(update={"recipes": tmp_path / "no-such-folder"}))


def test_a_damaged_run_is_named_and_lets_go_of_the_folder(open_supervisor: Open) -> None:
    supervisor = open_supervisor()
    run = wait_for_state(supervisor, start(supervisor, "finishes"), "done")
    open_supervisor()
    status = run.folder.status
    whole = status.read_bytes()
    status.write_bytes(whole[:5])
    with pytest.raises(CorruptRecord, match=r"status\.json is damaged"):
        open_supervisor()
    status.write_bytes(whole)
    assert open_supervisor().runs.get(run.run_id).status.state == "done"
