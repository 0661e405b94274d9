"""`hyperagent doctor`: check whether this machine is ready, and suggest a fix for each problem."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from hyperagent.cli.display import print_result
from hyperagent.errors import ConfigError
from hyperagent.services import Service

_PACKAGES = ("torch", "transformers", "safetensors", "grpcio", "fastapi", "uvicorn", "redis", "pyarrow", "peft")
_MIN_FREE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    state: Literal["ok", "note", "fail"]
    """Outcome; "note" means that an optional component is absent."""
    detail: str
    fix: str = ""
    """How to fix the problem; empty if there is none."""


def doctor(
    tokenizer: Annotated[Path | None, typer.Option(help="Also check this tokenizer folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check Python, packages, disk, ports, GPU, Redis and tokenizer; exit with 1 if something must be fixed."""
    checks = list(_checks(tokenizer))
    healthy = all(check.state != "fail" for check in checks)
    if as_json:
        print_result({"healthy": healthy, "checks": [asdict(check) for check in checks]}, as_json=True)
    else:
        table = Table(box=None)
        for heading in ("", "check", "found", "fix"):
            table.add_column(heading, overflow="fold")
        marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "fail": "[red]FAIL[/]"}
        for check in checks:
            table.add_row(marks[check.state], check.name, check.detail, check.fix)
        Console().print(table)
    if not healthy:
        raise typer.Exit(1)


def _checks(tokenizer: Path | None) -> Iterator[Check]:
    yield _python()
    for name in _PACKAGES:
        yield _package(name)
    yield _disk()
    for service in Service:
        yield _port(service, service.default_port)
    yield _gpu()
    yield _redis()
    yield _tokenizer(tokenizer)


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036  # reached from a checkout on PYTHONPATH, where pip checked nothing
        return Check("python", "fail", found, "install Python 3.11 or later and recreate the environment")
    return Check("python", "ok", found)


def _package(name: str) -> Check:
    try:
        return Check(name, "ok", version(name))
    except PackageNotFoundError:
        return Check(name, "fail", "not installed", "run `make setup`")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / 1e9:.1f} GB free here"
    if free < _MIN_FREE_BYTES:
        return Check("disk", "fail", detail, "free some space: the demo and its caches need 5 GB")
    return Check("disk", "ok", detail)


def _port(service: Service, port: int) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return Check(
                f"port {port}",
                "note",
                f"in use, by the {service} or by another program",
                f"for a second {service}, choose another port with `hyperagent serve {service} --port`",
            )
    return Check(f"port {port}", "ok", f"free for the {service}")


def _gpu() -> Check:
    try:
        import torch
    except ImportError:
        return Check("gpu", "note", "unknown without torch", "run `make setup`")
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Check("gpu", "ok", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    return Check("gpu", "note", "none: tiny models run on the CPU", "large models need a GPU machine")


def _redis() -> Check:
    url = os.environ.get("HYPERAGENT_REDIS_URL")
    if not url:
        return Check(
            "redis", "note", "not configured: the cache is read from disk", "set HYPERAGENT_REDIS_URL to use a hot tier"
        )
    import redis

    try:
        with redis.Redis.from_url(url, socket_connect_timeout=2, socket_timeout=2) as client:
            client.ping()
    except (redis.RedisError, ValueError) as error:
        return Check("redis", "fail", f"no answer: {error}", "start redis-server, or unset HYPERAGENT_REDIS_URL")
    return Check("redis", "ok", "answers")


def _tokenizer(folder: Path | None) -> Check:
    if folder is None:
        return Check("tokenizer", "note", "none given", "check one with `hyperagent doctor --tokenizer FOLDER`")
    from hyperagent.data.chat.tokenizer import ChatTokenizer

    try:
        tokenizer = ChatTokenizer(folder)
    except ConfigError as error:
        return Check("tokenizer", "fail", str(error), "give a folder with tokenizer.json and chat_template.jinja")
    return Check("tokenizer", "ok", f"{tokenizer.vocab_size:,} entries, {tokenizer.identity.tokenizer_sha256[:12]}")
