"""How long a command and a service take to start, and what memory the service then holds.

    python benchmarks/startup.py [--turns 5] [--before .venv/bin/hyperagent] [--json] [--smoke]

    hyperagent --help      wall time of the command
    serve trainer          from the start of the process to the first 200 of /readyz, and its resident memory (VmRSS) then
    bare server            the same for FastAPI and uvicorn with one route: the floor of a service
    bare interpreter       wall time of `python -c pass`: the floor of a command
    import                 wall time of an interpreter that imports a service's command-line module, with its settings

The variants take turns; of every figure the median over the turns is shown. `--before` names the `hyperagent` of another
checkout, which takes its turns in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

READY_TIMEOUT_S = 120.0
POLL_S = 0.005
HYPERAGENT = Path(sys.executable).with_name("hyperagent")
BARE_SERVER = """
import sys
import uvicorn
from fastapi import FastAPI
app = FastAPI()
app.get("/readyz")(lambda: {"status": "ok"})
uvicorn.run(app, port=int(sys.argv[2]), log_config=None)
"""
SERVICE_MODULES = {
    "teacher": "hyperagent_teacher.cli",
    "trainer": "hyperagent_trainer.control.cli",
    "adapter-api": "hyperagent_adapter_api.cli",
}
BOUNDS = {"help_seconds": 0.5, "serve_trainer_ready_seconds": 2.0, "serve_trainer_rss_mib": 120.0}
"""What the project promises on 2 cores with nothing else running."""

Figures = dict[str, float]


def time_command(command: Sequence[str | Path]) -> float:
    """Return the wall time of a command, in seconds.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    started = time.perf_counter()
    subprocess.run([*map(str, command)], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def time_service(command: Sequence[str | Path]) -> tuple[float, float]:
    """Start a service on a free port, which is appended to `command`; return the seconds until it is ready, and its MiB.

    Raises:
        RuntimeError: it ended, or was not ready in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipes").mkdir()
        started = time.perf_counter()
        process = subprocess.Popen(
            [*map(str, command), "--port", str(port)],
            cwd=folder,
            env={**os.environ, "HYPERAGENT_TOKEN": "secret"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not _answers(port):
                if process.poll() is not None or time.perf_counter() - started > READY_TIMEOUT_S:
                    raise RuntimeError(f"{command} is not ready; its exit code is {process.poll()}")
                time.sleep(POLL_S)
            return time.perf_counter() - started, _resident_mib(process.pid)
        finally:
            process.terminate()
            process.wait()


def _answers(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def measure_hyperagent(hyperagent: Path) -> Figures:
    """Return one turn's figures of a checkout, by its `hyperagent`."""
    seconds, mib = time_service([hyperagent, "serve", "trainer"])
    return {
        "help_seconds": time_command([hyperagent, "--help"]),
        "serve_trainer_ready_seconds": seconds,
        "serve_trainer_rss_mib": mib,
    }


def measure_imports() -> Figures:
    """Return the wall time of importing each service's command-line module, this checkout's."""
    return {
        f"import_{name}_seconds": time_command([sys.executable, "-c", f"import {module}"])
        for name, module in SERVICE_MODULES.items()
    }


def measure_floor() -> Figures:
    """Return one turn's figures of the bare interpreter and the bare server."""
    seconds, mib = time_service([sys.executable, "-c", BARE_SERVER])
    return {
        "interpreter_seconds": time_command([sys.executable, "-c", "pass"]),
        "server_ready_seconds": seconds,
        "server_rss_mib": mib,
    }


def compare(turns: int, before: Path | None) -> dict[str, Figures]:
    """Return the median figures of each variant; they take turns after one that warms the file cache."""
    variants: dict[str, Callable[[], Figures]] = {
        "floor": measure_floor,
        "ours": lambda: {**measure_hyperagent(HYPERAGENT), **measure_imports()},
    }
    if before is not None:
        variants["before"] = lambda: measure_hyperagent(before)
    found: dict[str, list[Figures]] = {name: [] for name in variants}
    for turn in range(turns + 1):
        for name, measure in variants.items():
            figures = measure()
            if turn > 0:
                found[name].append(figures)
    return {
        name: {key: round(statistics.median(figures[key] for figures in all_figures), 3) for key in all_figures[0]}
        for name, all_figures in found.items()
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--before", type=Path, help="the `hyperagent` of another checkout, to compare with")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see whether it runs")
    options = parser.parse_args()
    if options.smoke:
        options.turns = 1
    report = {
        "machine": {"device": _cpu_name(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "turns": options.turns,
        "bounds": BOUNDS,
        "results": compare(options.turns, options.before),
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['machine']}, Python {report['python']}, median of {options.turns} turns")
    for name, figures in report["results"].items():
        print(name)
        for key, value in figures.items():
            bound = f"   bound {BOUNDS[key]:g}" if name == "ours" and key in BOUNDS else ""
            print(f"  {key:30} {value:9.3f}{bound}")


if __name__ == "__main__":
    main()
