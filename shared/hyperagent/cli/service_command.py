"""Build `hyperagent serve NAME` from a service's settings, with one option per field, grouped in `--help`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from hyperagent.config import parse
from hyperagent.services import Service
from hyperagent.settings import ServiceSettings, SettingOption, options_of

_Settings = TypeVar("_Settings", bound=ServiceSettings)


def service_command(
    service: Service, settings: type[_Settings]
) -> Callable[[Callable[[_Settings], None]], Callable[..., None]]:
    """Return a decorator that turns a function of the settings into a command with one option per setting.

    The command raises ConfigError, which lists every invalid option, if validation of the settings fails.
    """

    def decorate(serve: Callable[[_Settings], None]) -> Callable[..., None]:
        def command(**options: Any) -> None:
            given = {name: value for name, value in options.items() if value is not None}
            serve(parse(given, settings, source=f"hyperagent serve {service}"))

        parameters = [_parameter(option) for option in options_of(settings)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__doc__ = serve.__doc__
        return command

    return decorate


def _parameter(option: SettingOption) -> inspect.Parameter:
    declared = typer.Option(
        option.option,
        help=option.help + (f" ({option.values})" if option.values else ""),
        envvar=option.variable,
        rich_help_panel=option.group,
    )
    kind = option.command_line_type if option.is_required else option.command_line_type | None
    default = inspect.Parameter.empty if option.is_required else option.default
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared]
    )
