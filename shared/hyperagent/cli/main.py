"""Root of the `hyperagent` command: collects the subcommands and turns an error into one line and exit code 1.

Other packages register through two entry point groups: `hyperagent.serve` (a function per service) and
`hyperagent.commands` (a function per command). This package therefore depends on no service.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from hyperagent import __version__
from hyperagent.cli import adapter, cache, data, runs, teacher_check
from hyperagent.cli.display import stderr
from hyperagent.cli.doctor import doctor
from hyperagent.cli.serving.check_serving import check_serving
from hyperagent.cli.train import train
from hyperagent.cli.wait import wait
from hyperagent.errors import HyperagentError


class _InstalledServices(TyperGroup):
    """Group of the installed packages' `serve` commands; a service is imported only when its command is looked up."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002  # the signature is typer's
        return sorted(entry_points(group="hyperagent.serve").names)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        for point in entry_points(group="hyperagent.serve", name=cmd_name):
            service = typer.Typer(add_completion=False)
            service.command(name=cmd_name)(point.load())
            return get_command(service)
        return None


_serve = typer.Typer(
    cls=_InstalledServices,
    help="Start a service and stay in the foreground until SIGTERM or Ctrl-C.",
    no_args_is_help=True,
)


def build_app() -> typer.Typer:
    """Return the whole command tree, including the commands of installed packages."""
    app = typer.Typer(callback=_root, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
    app.add_typer(data.app, name="data")
    app.add_typer(cache.app, name="cache")
    app.add_typer(teacher_check.app, name="teacher-check")
    app.command()(train)
    app.add_typer(runs.app, name="runs")
    app.add_typer(adapter.app, name="adapter")
    app.command()(wait)
    app.command()(doctor)
    app.command()(check_serving)
    app.add_typer(_serve, name="serve")
    for point in sorted(entry_points(group="hyperagent.commands"), key=lambda point: point.name):
        app.command(name=point.name)(point.load())
    return app


def main() -> None:
    """Entry point of the `hyperagent` command."""
    try:
        build_app()()
    except HyperagentError as error:
        stderr.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Distill a large teacher into prompt-conditioned LoRA adapters."""
