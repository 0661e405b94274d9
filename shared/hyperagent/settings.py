"""Derive a service's command-line options, environment variables and README table from one pydantic model.

Each field is a setting. The option is the field's name with dashes, the environment variable is the model's prefix
followed by the name in capitals, and the help text is the docstring under the field. `Setting` in the field's
annotation gives the group, and the option or the variable where they differ from this rule.
"""

from __future__ import annotations

import json
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from hyperagent.config import StrictModel

_BOUNDS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}


class ServiceSettings(StrictModel):
    """Base of the settings of one service."""

    variable_prefix: ClassVar[str]
    """Prefix of the names of the environment variables."""


@dataclass(frozen=True)
class Setting:
    """Annotation of a field that says how `--help` and the README show it."""

    group: str
    option: str | None = None
    """Name of the option if it is not derived from the field's name, such as "--allowed-host"."""
    variable: str | None = None
    """Name of the environment variable if it is shared with other programs, such as "HYPERAGENT_REDIS_URL"."""


@dataclass(frozen=True)
class SettingOption:
    """A setting in the form that the command line uses."""

    name: str
    """Name of the field."""
    option: str
    variable: str
    group: str
    help: str
    command_line_type: Any
    """Type that the option's text is parsed to; the model validates the value."""
    is_required: bool
    default: Any
    """Default that the command line shows; None if there is nothing to show."""
    values: str
    """Choices or bounds in readable form; empty if there are none."""


def options_of(model: type[ServiceSettings]) -> list[SettingOption]:
    """Return the options of a service, ordered by group.

    Raises:
        TypeError: a field has no docstring or no `Setting` in its annotation.
    """
    found = [_option(model, name, field) for name, field in model.model_fields.items()]
    groups = list(dict.fromkeys(option.group for option in found))
    return sorted(found, key=lambda option: groups.index(option.group))


def _option(model: type[ServiceSettings], name: str, field: FieldInfo) -> SettingOption:
    setting = next((item for item in field.metadata if isinstance(item, Setting)), None)
    if setting is None or not field.description:
        raise TypeError(f"{model.__name__}.{name} needs a docstring and a Setting in its annotation")
    return SettingOption(
        name=name,
        option=setting.option or f"--{name.replace('_', '-')}",
        variable=setting.variable or model.variable_prefix + name.upper(),
        group=setting.group,
        help=" ".join(field.description.split()),
        command_line_type=_command_line_type(field.annotation),
        is_required=field.is_required(),
        default=None if field.is_required() else _shown(field.get_default(call_default_factory=True)),
        values=_values(field),
    )


def _members(annotation: Any) -> list[Any]:
    """Return the members of a union without None, or the annotation alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for member in get_args(annotation) if member is not type(None)]
    return [annotation]


def _command_line_type(annotation: Any) -> Any:
    members = _members(annotation)
    if members == [tuple[str, ...]]:
        return list[str]  # given several times
    return members[0] if members[0] in (bool, int, float, Path) else str


def _shown(default: Any) -> Any:
    if isinstance(default, dict):
        return json.dumps(default)
    return None if default == () else default


def _values(field: FieldInfo) -> str:
    (first, *_) = _members(field.annotation)
    if get_origin(first) is Literal:
        return ", ".join(get_args(first))
    bounds = [item for item in field.metadata if type(item) in _BOUNDS]
    return ", ".join(f"{sign} {getattr(item, name):,}" for item in bounds for sign, name in [_BOUNDS[type(item)]])
