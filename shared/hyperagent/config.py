"""Configuration as frozen values that refuse what they do not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from hyperagent.errors import ConfigError


class StrictModel(BaseModel):
    """A frozen pydantic model; a string under each field is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


_Model = TypeVar("_Model", bound=BaseModel)


def load_yaml(path: Path, model: type[_Model], *, context: dict[str, Any] | None = None) -> _Model:
    """Read a YAML file into `model`; `context` reaches the model's validators.

    Raises:
        ConfigError: the file is missing or unreadable, is not YAML, or has an unknown or bad field; every bad field is named.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return parse(raw if raw is not None else {}, model, source=str(path), context=context)


def parse(raw: object, model: type[_Model], *, source: str, context: dict[str, Any] | None = None) -> _Model:
    """Validate `raw` as `model`; `source` names where it came from in the error.

    Raises:
        ConfigError: naming every bad field.
    """
    try:
        return model.model_validate(raw, context=context)
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe(error)}") from error


def describe(error: ValidationError) -> str:
    """One line that names every bad field of a validation error."""
    said = (f"{'.'.join(str(part) for part in e['loc']) or 'value'}: {e['msg']}" for e in error.errors())
    return " ".join("; ".join(said).split())
