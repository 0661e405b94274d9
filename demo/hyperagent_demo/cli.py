"""Command `hyperagent demo`."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from hyperagent_demo.samples import SampleName


def demo(
    data: Annotated[
        Path | None, typer.Option(help="Your trajectories (Parquet); by default a sample is generated.")
    ] = None,
    extra: Annotated[
        Path | None,
        typer.Option(help="Your extra texts (`hyperagent data extra`), which the teacher and the hypernetwork read."),
    ] = None,
    sample: Annotated[
        SampleName,
        typer.Option(help="Sample to generate: house rules that only the system prompt states, or tasks."),
    ] = "rules",
    tokenizer: Annotated[Path | None, typer.Option(help="Your tokenizer's folder; by default one is trained.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            envvar="HYPERAGENT_DEMO_CONFIG",
            help="YAML configuration; by default one of configs/demo*.yaml.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write to; by default runs/demo, or runs/demo-NAME for your data NAME."),
    ] = None,
    model_store: Annotated[Path, typer.Option(help="Folder to store the pre-trained models in.")] = Path("runs/models"),
    seed: Annotated[int | None, typer.Option(min=0, help="Override the configuration's seed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json on standard output.")] = False,
) -> None:
    """Run the whole loop on this machine: trajectories in, a prompt-conditioned LoRA out."""
    from rich.console import Console

    from hyperagent.cli.display import progress_bars, stderr
    from hyperagent.config import load_yaml
    from hyperagent_demo.config import DemoConfig
    from hyperagent_demo.loop import run_loop
    from hyperagent_demo.processes import PeakMemory
    from hyperagent_demo.report import build_report, print_report, write_plot, write_report
    from hyperagent_demo.stages import Stages

    out = out or Path("runs") / ("demo" if data is None else f"demo-{data.name.split('.')[0]}")
    own = "demo_own_data.yaml" if extra is None else "demo_extra.yaml"
    name = own if data is not None else "demo.yaml" if sample == "rules" else "demo_tasks.yaml"
    settings = load_yaml(config or Path("configs") / name, DemoConfig)
    if seed is not None:
        settings = settings.model_copy(update={"seed": seed})
    # Exit through SystemExit, so that the services started by the demo are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    with PeakMemory() as memory, progress_bars() as bars:
        stages = Stages(bars)
        result = run_loop(
            settings, data=data, extra=extra, tokenizer=tokenizer, out=out, model_store=model_store, stages=stages
        )
    seconds = {**stages.seconds, "total": round(time.monotonic() - started, 2)}
    report = build_report(settings, result, seconds=seconds, peak_rss_bytes=memory.peak_bytes)
    write_plot(out / "report.png", result.distilled.metrics, report)
    write_report(out / "report.json", report)
    console = stderr if as_json else Console()
    print_report(console, report, out=out)
    console.print(next_commands(out), highlight=False, markup=False, soft_wrap=True)
    if as_json:
        typer.echo((out / "report.json").read_text(encoding="utf-8"))


def next_commands(out: Path) -> str:
    """Return commands to try after the demo, with the condition of a held-out task."""
    files = {
        "--prompt-file": "task.txt",
        "--system-file": "system.txt",
        "--tools-file": "tools.json",
        "--extra-file": "extra.txt",
    }
    parts = {option: out / "example" / name for option, name in files.items()}
    options = " ".join(f"{option} {file}" for option, file in parts.items() if file.is_file())
    return f"""
Next, serve adapters (the access token is created on the first start):
    .venv/bin/hyperagent serve adapter-api --bundle {out}/bundle --store {out}/adapters
and, in another terminal, create one:
    .venv/bin/hyperagent adapter create {options} --out {out}/my-adapter"""
