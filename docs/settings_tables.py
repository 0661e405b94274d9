"""Write the tables of options into the services' READMEs: `python docs/settings_tables.py [--check]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hyperagent.settings import ServiceSettings, SettingOption, options_of
from hyperagent_adapter_api.config import AdapterApiSettings
from hyperagent_teacher.config import TeacherSettings
from hyperagent_trainer.control.settings import ControlSettings

SERVICES = Path(__file__).resolve().parents[1] / "services"
READMES: dict[Path, type[ServiceSettings]] = {
    SERVICES / "teacher" / "README.md": TeacherSettings,
    SERVICES / "trainer" / "README.md": ControlSettings,
    SERVICES / "adapter_api" / "README.md": AdapterApiSettings,
}
BEGIN = "<!-- settings: begin; written by `make docs` -->"
END = "<!-- settings: end -->"


def table(settings: type[ServiceSettings]) -> str:
    """Return the Markdown table of a service's options, group by group."""
    lines = ["| option | variable | default | |", "| --- | --- | --- | --- |"]
    group = ""
    for option in options_of(settings):
        if option.group != group:
            group = option.group
            lines.append(f"| **{group}** | | | |")
        values = f" ({option.values})" if option.values else ""
        lines.append(f"| `{option.option}` | `{option.variable}` | {_default(option)} | {option.help}{values} |")
    return "\n".join(lines)


def with_table(text: str, settings: type[ServiceSettings]) -> str:
    """Return a README's text with the table between its markers replaced.

    Raises:
        ValueError: the text does not have each marker once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the README needs the lines {BEGIN!r} and {END!r}, each once")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(settings)}\n{END}{after}"


def outdated() -> list[Path]:
    """Return the READMEs whose table is not that of the settings."""
    return [path for path, settings in READMES.items() if with_table(text := path.read_text(), settings) != text]


def _default(option: SettingOption) -> str:
    if option.is_required:
        return "required"
    if option.command_line_type is bool:
        return "off"
    if option.default is None:
        return ""
    return f"`{option.default:g}`" if isinstance(option.default, float) else f"`{option.default}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is out of date")
    if parser.parse_args().check:
        if found := outdated():
            sys.exit(
                f"out of date, run `make docs`: {', '.join(str(path.relative_to(SERVICES.parent)) for path in found)}"
            )
        return
    for path, settings in READMES.items():
        path.write_text(with_table(path.read_text(), settings))


if __name__ == "__main__":
    main()
