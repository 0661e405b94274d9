"""Invent repositories: a package of two modules that compute, one that reports, and a check that runs them.

All repositories have this structure. The seed selects the functions, constants, numbers and names of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from hyperagent_demo.sample.functions import ALGORITHMS, Function

_PACKAGES = (
    "bakery",
    "depot",
    "garden",
    "harbour",
    "kitchen",
    "library",
    "market",
    "museum",
    "orchard",
    "station",
    "studio",
    "workshop",
)
_GOODS = (
    "apple",
    "bolt",
    "book",
    "brick",
    "candle",
    "cup",
    "jar",
    "lamp",
    "map",
    "pen",
    "plate",
    "rope",
    "seed",
    "stamp",
    "tile",
    "tin",
)
_CONTAINERS = ("bag", "basket", "bin", "case", "cart", "crate", "drawer", "pallet", "rack", "sack", "tray", "van")


@dataclass(frozen=True)
class Unit:
    """A constant (how many of one thing fit in another) and the function that multiplies by it."""

    good: str
    container: str
    value: int

    @property
    def constant(self) -> str:
        return f"{self.good}s_per_{self.container}".upper()

    @property
    def function(self) -> str:
        return f"{self.good}s_in_{self.container}s"

    @property
    def other_function(self) -> str:
        """New name of the function in a rename task."""
        return f"{self.good}s_for_{self.container}s"

    @property
    def source(self) -> str:
        """Source text of the function's definition."""
        return (
            f"def {self.function}({self.container}s):\n"
            f'    """Return how many {self.good}s that many {self.container}s hold."""\n'
            f"    return {self.container}s * {self.constant}\n"
        )


@dataclass(frozen=True)
class Repository:
    """An invented repository."""

    name: str
    """Repository name, such as "sample/garden-3"."""
    package: str
    module: str
    """Module of `functions`, a key of `ALGORITHMS`."""
    functions: tuple[Function, ...]
    absent: Function
    """Function of the same kind that the module lacks."""
    units: tuple[Unit, ...]

    @property
    def modules(self) -> list[str]:
        """Names of the package's modules, sorted."""
        return sorted(("report", "units", self.module))

    def path(self, module: str) -> str:
        """Return a module's path from the root of the repository."""
        return f"{self.package}/{module}.py"

    def with_value(self, unit: Unit, value: int) -> Repository:
        """Return the same repository with another value of one unit's constant."""
        units = tuple(replace(each, value=value) if each == unit else each for each in self.units)
        return replace(self, units=units)

    def files(self) -> dict[str, str]:
        """Return the package's files by path, without the check, which belongs to a task."""
        first = self.units[0]
        constants = "".join(f"{unit.constant} = {unit.value}\n" for unit in self.units)
        return {
            self.path("__init__"): f'"""The {self.package}."""\n',
            self.path(self.module): _module(
                f"What the {self.package} computes.", "", *(function.source for function in self.functions)
            ),
            self.path("report"): _module(
                "Lines for people to read.",
                f"from {self.package}.units import {first.constant}\n",
                f'def label():\n    """Return a line about {first.container}s."""\n'
                f'    return f"{{{first.constant}}} {first.good}s per {first.container}"\n',
            ),
            self.path("units"): _module("How much holds what.", constants, *(unit.source for unit in self.units)),
        }

    def cases(self, *, functions: Sequence[Function] = (), units: Sequence[Unit] = ()) -> list[tuple[str, str]]:
        """Return expressions and expected results, as source text; all of the repository's if none are given."""
        if not functions and not units:
            functions, units = self.functions, self.units
        computed = [
            (f"{self.module}.{function.name}({arguments})", expected)
            for function in functions
            for arguments, expected in function.cases
        ]
        return computed + [(f"units.{unit.function}(3)", str(3 * unit.value)) for unit in units]

    def label_case(self) -> tuple[str, str]:
        """Return the case of the report, which is about the first unit."""
        unit = self.units[0]
        return ("report.label()", f'"{unit.value} {unit.good}s per {unit.container}"')

    def check(self, cases: Sequence[tuple[str, str]], *, written: Sequence[tuple[str, str]] = ()) -> str:
        """Return the source of `check.py`, which prints a line per failure and fails if there is any.

        Args:
            cases: expressions and expected results, as source text.
            written: files that the task requires, and their text.
        """
        lines = [f"    ({_quoted(expression)}, {expression}, {expected})," for expression, expected in cases]
        lines += [f"    ({_quoted(name)}, read({_quoted(name)}), {_quoted(text)})," for name, text in written]
        reader = (
            "def read(name):\n"
            '    """Return the text of a file, or None if there is no such file."""\n'
            "    try:\n"
            "        with open(name) as file:\n"
            "            return file.read().strip()\n"
            "    except FileNotFoundError:\n"
            "        return None\n\n\n"
        )
        return (
            '"""Check the package; one line per failure."""\n\n'
            f"from {self.package} import {', '.join(self.modules)}\n\n"
            + (f"\n{reader}" if written else "")
            + "cases = [\n"
            + "".join(f"{line}\n" for line in lines)
            + "]\n"
            + "failed = [case for case in cases if case[1] != case[2]]\n"
            + "for name, found, expected in failed:\n"
            + '    print(f"FAIL {name}: expected {expected!r}, got {found!r}")\n'
            + 'print(f"{len(cases) - len(failed)} of {len(cases)} checks passed")\n'
            + "raise SystemExit(bool(failed))\n"
        )


def invent_repositories(count: int, *, seed: int) -> list[Repository]:
    """Invent `count` repositories with different names."""
    return [_invent(index, Random(f"{seed}/repository/{index}")) for index in range(count)]


def _invent(index: int, random: Random) -> Repository:
    round_number, place = divmod(index, len(_PACKAGES))
    package = _PACKAGES[place]
    module = random.choice(sorted(ALGORITHMS))
    *functions, absent = random.sample(ALGORITHMS[module], k=4)
    goods = random.sample(_GOODS, k=2)
    containers = random.sample(_CONTAINERS, k=2)
    return Repository(
        name=f"sample/{package}-{round_number + 1}",
        package=package,
        module=module,
        functions=tuple(functions),
        absent=absent,
        units=tuple(
            Unit(good, container, random.randint(3, 48)) for good, container in zip(goods, containers, strict=True)
        ),
    )


def _module(summary: str, head: str, *definitions: str) -> str:
    parts = [f'"""{summary}"""\n' + (f"\n{head}" if head else ""), *definitions]
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
