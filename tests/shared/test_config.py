"""Tests that configuration rejects unknown fields, in one line that names each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, ValidationError, ValidationInfo, field_validator

from hyperagent.config import StrictModel, load_yaml, parse
from hyperagent.errors import ConfigError


class Inner(StrictModel):
    rate: float = Field(0.5, gt=0)


class Outer(StrictModel):
    size: int
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()

    @field_validator("size")
    @classmethod
    def _at_most(cls, size: int, info: ValidationInfo) -> int:
        limit = (info.context or {}).get("limit", 100)
        if size > limit:
            raise ValueError(f"{size} is more than\nthe {limit} allowed")
        return size


def test_values_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Inner().rate = 1.0  # type: ignore[misc]


def test_a_bad_field_is_named_by_its_path() -> None:
    with pytest.raises(ConfigError) as refused:
        parse({"size": "x", "inner": {"rat": 1}, "many": [{}, {"rate": 0}]}, Outer, source="here")
    message = str(refused.value)
    assert message.startswith("here: ")
    for part in ("size: Input should be a valid integer", "inner.rat: Extra inputs", "many.1.rate: Input should be"):
        assert part in message


@pytest.mark.parametrize("raw", [None, [], "text", 3])
def test_what_is_no_mapping_is_refused(raw: object) -> None:
    with pytest.raises(ConfigError, match=r"^here: value: Input should be a valid dictionary"):
        parse(raw, Outer, source="here")


def test_the_context_reaches_the_validators_and_the_message_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("size: 7\n")
    assert load_yaml(path, Outer, context={"limit": 7}).size == 7
    with pytest.raises(ConfigError, match=r"c\.yaml: size: Value error, 7 is more than the 6 allowed$"):
        load_yaml(path, Outer, context={"limit": 6})


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: [1", b"a: !!python/object/apply:os.system [true]\n"])
def test_what_is_not_plain_yaml_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="is not YAML") as refused:
        load_yaml(tmp_path / "c.yaml", Outer)
    assert "\n" not in str(refused.value)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot read {tmp_path}: Is a directory; give a YAML file"):
        load_yaml(tmp_path, Outer)


class Settings(StrictModel):
    size: int = Field(ge=1)
    name: str = "x"


def test_configuration_names_every_bad_field(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("size: 2\n")
    assert load_yaml(path, Settings) == Settings(size=2)
    for text, message in (
        ("size: 0\nnaem: y\n", r"size: .*greater than or equal to 1; naem: Extra inputs"),
        ("size: [", "is not YAML"),
        ("", "size: Field required"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as refused:
            load_yaml(path, Settings)
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="there is no file"):
        load_yaml(tmp_path / "none", Settings)
