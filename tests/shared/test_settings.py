"""A service's settings: options, environment variables and README tables made from one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import settings_tables
import typer
from pydantic import Field, Json
from typer.testing import CliRunner, Result

from hyperagent.cli.service_command import service_command
from hyperagent.errors import ConfigError
from hyperagent.services import Service
from hyperagent.settings import ServiceSettings, Setting, options_of

FILES, OTHER = Setting("Files"), Setting("Other")


class Example(ServiceSettings):
    variable_prefix: ClassVar[str] = "EXAMPLE_"

    folder: Annotated[Path, FILES]
    """Folder to read."""
    num_items: Annotated[int, OTHER] = Field(3, ge=1, le=5000)
    """Items to read."""
    rate: Annotated[float | None, OTHER] = Field(None, gt=0)
    """Items per second."""
    kind: Annotated[Literal["fast", "exact"], FILES] = "fast"
    """How to read."""
    names: Annotated[tuple[str, ...], Setting("Other", option="--name")] = ()
    """A name; may be given several times."""
    shared: Annotated[str | None, Setting("Other", variable="SHARED_URL")] = None
    """A setting of other programs, too."""
    extra: Annotated[Json[dict[str, Any]] | dict[str, Any], OTHER] = Field(default_factory=dict)
    """Further arguments."""
    strict: Annotated[bool, OTHER] = False
    """Refuse what is unknown."""


def invoke(*arguments: str, **environment: str) -> tuple[Result, list[Example]]:
    served: list[Example] = []

    @service_command(Service.TRAINER, Example)
    def serve(settings: Example) -> None:
        """Serve the example."""
        served.append(settings)

    app = typer.Typer(add_completion=False)
    app.command()(serve)
    environment = {"COLUMNS": "200", "NO_COLOR": "1", **environment}
    return CliRunner().invoke(app, list(arguments), env=environment, terminal_width=200), served


def test_without_options_the_settings_are_the_models_defaults() -> None:
    assert invoke("--folder", "f")[1] == [Example(folder=Path("f"))]


def test_every_option_and_every_variable_reaches_its_field() -> None:
    expected = Example(
        folder=Path("f"), num_items=7, rate=0.5, kind="exact", names=("a", "b"), shared="s", extra={"x": 1}, strict=True
    )
    by_option = [
        "--folder", "f", "--num-items", "7", "--rate", "0.5", "--kind", "exact", "--name", "a", "--name", "b",
        "--shared", "s", "--extra", '{"x": 1}', "--strict",
    ]  # fmt: skip
    by_variable = {
        "EXAMPLE_FOLDER": "f", "EXAMPLE_NUM_ITEMS": "7", "EXAMPLE_RATE": "0.5", "EXAMPLE_KIND": "exact",
        "EXAMPLE_NAMES": "a b", "SHARED_URL": "s", "EXAMPLE_EXTRA": '{"x": 1}', "EXAMPLE_STRICT": "true",
    }  # fmt: skip
    assert invoke(*by_option)[1] == invoke(**by_variable)[1] == [expected]


def test_an_option_wins_over_its_variable_and_an_empty_variable_counts_as_none() -> None:
    assert invoke("--folder", "f", "--num-items", "1", EXAMPLE_NUM_ITEMS="2")[1][0].num_items == 1
    assert invoke("--folder", "f", EXAMPLE_NUM_ITEMS="", EXAMPLE_NAMES="")[1] == [Example(folder=Path("f"))]


def test_what_the_model_refuses_is_an_error_that_names_the_command_and_every_field() -> None:
    result, served = invoke("--folder", "f", "--num-items", "0", "--kind", "odd")
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("hyperagent serve trainer: num_items: ")
    assert "kind: Input should be 'fast' or 'exact'" in str(result.exception)
    assert served == []


def test_a_required_setting_that_is_missing_is_named() -> None:
    result, served = invoke()
    assert (result.exit_code, served) == (2, [])
    assert "--folder" in result.output
    assert "EXAMPLE_FOLDER" in result.output


def test_the_help_shows_groups_choices_bounds_defaults_and_variables() -> None:
    text = invoke("--help")[0].output
    for part in (
        "Serve the example.", "Files", "Other", "fast, exact", "≥ 1, ≤ 5,000", "default: 3", "EXAMPLE_NUM_ITEMS",
        "SHARED_URL", "default: {}",
    ):  # fmt: skip
        assert part in text, part
    assert text.index("--kind") < text.index("Other") < text.index("--num-items")


def test_a_setting_without_a_docstring_is_a_defect() -> None:
    class Silent(ServiceSettings):
        variable_prefix: ClassVar[str] = "SILENT_"
        port: Annotated[int, OTHER] = 1

    with pytest.raises(TypeError, match=r"Silent\.port needs a docstring"):
        options_of(Silent)


def test_the_readmes_show_every_setting_as_it_is() -> None:
    assert settings_tables.outdated() == []
    for path, settings in settings_tables.READMES.items():
        text = path.read_text()
        for option in options_of(settings):
            assert f"| `{option.option}` | `{option.variable}` |" in text


def test_a_table_that_is_out_of_date_is_replaced_and_nothing_else() -> None:
    stale = f"before\n{settings_tables.BEGIN}\n| old |\n{settings_tables.END}\nafter\n"
    fresh = settings_tables.with_table(stale, Example)
    assert fresh.startswith("before\n")
    assert fresh.endswith("\nafter\n")
    assert "| old |" not in fresh
    assert "| `--num-items` | `EXAMPLE_NUM_ITEMS` | `3` | Items to read. (≥ 1, ≤ 5,000) |" in fresh
    with pytest.raises(ValueError, match="each once"):
        settings_tables.with_table("no marker", Example)
