"""Load YAML configuration into frozen pydantic models that reject unknown fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from hyperagent.errors import ConfigError


class StrictModel(BaseModel):
    """Frozen pydantic model that rejects unknown fields; the string under each field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _UniqueKeysLoader(yaml.SafeLoader):
    """Refuses a key that occurs twice; YAML's last one would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} occurs twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Model = TypeVar("_Model", bound=BaseModel)


def load_yaml(path: Path, model: type[_Model], *, context: dict[str, Any] | None = None) -> _Model:
    """Read a YAML file into `model`; `context` is passed to the model's validators.

    Raises:
        ConfigError: the file is missing or unreadable, is not YAML, or has unknown or invalid fields; the message names
            every one of them.
    """
    try:
        # A safe loader too, which only builds plain values.
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeysLoader)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return parse(raw if raw is not None else {}, model, source=str(path), context=context)


def parse(raw: object, model: type[_Model], *, source: str, context: dict[str, Any] | None = None) -> _Model:
    """Validate `raw` as `model`; `source` names its origin in error messages.

    Raises:
        ConfigError: fields are unknown or invalid; the message names every one of them.
    """
    try:
        return model.model_validate(raw, context=context)
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe(error)}") from error


def describe(error: ValidationError) -> str:
    """Describe a validation error in one line that names every invalid field."""
    said = (f"{'.'.join(str(part) for part in e['loc']) or 'value'}: {e['msg']}" for e in error.errors())
    return " ".join("; ".join(said).split())
