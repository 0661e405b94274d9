"""A fake training process that keeps the contract of the run folder, or breaks it in a chosen way.

Its only argument is the run folder; the last part of the recipe's `student` path selects the behavior. It imports nothing
of the project, so that the tests depend on the files alone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

run = Path(sys.argv[1])
recipe = json.loads((run / "recipe.json").read_text())
behavior = Path(recipe["student"]).name


def say(state: str, step: int = 0) -> None:
    temporary = run / "status.temporary"
    temporary.write_text(json.dumps({"state": state, "step": step, "num_steps": recipe["num_steps"]}))
    temporary.replace(run / "status.json")


def save(step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)


def train_until_stopped() -> None:
    stops = []
    signal.signal(signal.SIGTERM, lambda *_: stops.append(True))
    step = max((int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("*")), default=0)
    with (run / "metrics.jsonl").open("a", buffering=1) as metrics:
        while not stops and step < recipe["num_steps"]:
            step += 1
            metrics.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
            say("running", step)
            time.sleep(0.02)
    save(step)
    say("stopped" if stops else "done", step)


def ignore_sigterm(state: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say(state)
    while True:
        time.sleep(1)


match behavior:
    case "trains":
        train_until_stopped()
    case "finishes":
        say("done", recipe["num_steps"])
    case "ignores-sigterm":
        ignore_sigterm("running")
    case "lingers":
        ignore_sigterm("done")
    case "stops-and-lingers":
        save(7)
        ignore_sigterm("stopped")
    case "answers-no-signals-yet":
        say("loading")
        time.sleep(600)
    case "crashes":
        say("running")
        sys.stderr.write("the reader met a bad row\n")
        sys.exit(3)
    case "killed":
        save(7)
        say("running", 7)
        os.kill(os.getpid(), signal.SIGKILL)
    case "killed-with-a-child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (run / "child.pid").write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    case _:
        sys.exit(f"unknown behavior {behavior}")
