"""Tasks that change the package: fix, add, rename, and set.

The assistant's phrasing varies a little but its procedure does not, so that a model of a few million parameters can
learn it from about a hundred trajectories.
"""

from __future__ import annotations

from random import Random

from hyperagent_demo.sample.assistant import CHECK, Assistant
from hyperagent_demo.sample.functions import Function
from hyperagent_demo.sample.repositories import Repository
from hyperagent_demo.sample.task import Task, full_prompt, start_files

_HASTY_SHARE = 0.5
"""Fraction of tasks in which the first repair of a function is wrong, which the check then reveals."""


def fix_function(repository: Repository, random: Random) -> Task:
    """Make a task to fix a fault in one function, which the check reveals."""
    function = random.choice(repository.functions)
    hasty = random.random() < _HASTY_SHARE
    path = repository.path(repository.module)
    arguments, expected = function.cases[0]
    request = random.choice(
        (
            f"`{function.name}` in {path} is broken: it {function.symptom}. For example, "
            f"{function.name}({arguments}) should give {expected}. Mend it.",
            f"The check fails because `{function.name}` in {path} {function.symptom}. It should return "
            f"{function.summary}. Please mend it.",
            f"Please mend `{function.name}`, which should return {function.summary}. "
            f"The fault is in {path}: the function {function.symptom}.",
        )
    )
    files = start_files(repository, repository.check([*repository.cases(), repository.label_case()]))
    files[path] = files[path].replace(function.right, function.wrong)
    right, wrong, near_miss = (
        _line(function, fragment) for fragment in (function.right, function.wrong, function.near_miss)
    )

    def solve(assistant: Assistant) -> None:
        say = assistant.random.choice
        assistant.check()
        assistant.view(say((f"The fault is in {path}.", f"I will look at `{function.name}`.")), path)
        remark = say((f"`{function.name}` {function.symptom}.", f"Here `{function.name}` {function.symptom}."))
        if hasty:
            assistant.replace(remark, path, wrong, near_miss)
            assistant.check()
            assistant.think(f"That repair was hasty: {function.name}({arguments}) should give {expected}.")
            assistant.replace("I will mend it properly.", path, near_miss, right)
        else:
            assistant.replace(remark, path, wrong, right)
        assistant.check()
        assistant.finish(f"I mended `{function.name}` in {path}; the check passes.")

    return Task(full_prompt(repository, request), files, solve)


def add_function(repository: Repository, random: Random) -> Task:
    """Make a task to add a function that the check already calls."""
    function = repository.absent
    hasty = random.random() < _HASTY_SHARE
    path = repository.path(repository.module)
    arguments, expected = function.cases[0]
    request = random.choice(
        (
            f"Add a function `{function.name}({function.parameters})` to {path}. It should return "
            f"{function.summary}: {function.name}({arguments}) gives {expected}.",
            f"{path} lacks `{function.name}({function.parameters})`, which should return {function.summary}. "
            f"Please add it. For example, {function.name}({arguments}) is {expected}.",
        )
    )
    files = start_files(
        repository, repository.check([*repository.cases(functions=[function]), repository.label_case()])
    )
    written = function.source.replace(function.right, function.near_miss) if hasty else function.source

    def solve(assistant: Assistant) -> None:
        say = assistant.random.choice
        assistant.bash(
            say(("First the functions that are there.", f"I will see what {path} defines.")), f'grep -n "^def " {path}'
        )
        assistant.bash(
            say((f"I will add `{function.name}` at the end.", f"`{function.name}` goes to the end of {path}.")),
            f"cat >> {path} <<'EOF'\n\n\n{written}EOF",
        )
        assistant.check()
        if hasty:
            assistant.think(f"That was hasty: {function.name}({arguments}) should give {expected}.")
            near_miss, right = (_line(function, f) for f in (function.near_miss, function.right))
            assistant.replace("I will mend it properly.", path, near_miss, right)
            assistant.check()
        assistant.finish(f"I added `{function.name}` to {path}; the check passes.")

    return Task(full_prompt(repository, request), files, solve)


def change_constant(repository: Repository, random: Random) -> Task:
    """Make a task to set a constant to a new value, which the check already expects."""
    unit = random.choice(repository.units)
    value = random.choice([number for number in range(3, 49) if number != unit.value])
    changed = repository.with_value(unit, value)
    path = repository.path("units")
    request = random.choice(
        (
            f"A {unit.container} now holds {value} {unit.good}s instead of {unit.value}. "
            f"Change {unit.constant} in {path}.",
            f"Set {unit.constant} in {path} to {value}: a {unit.container} no longer holds {unit.value} {unit.good}s.",
        )
    )
    files = start_files(repository, changed.check([*changed.cases(units=changed.units), changed.label_case()]))

    def solve(assistant: Assistant) -> None:
        say = assistant.random.choice
        assistant.bash(
            say((f"Where does {unit.constant} stand?", f"I will look for {unit.constant}.")),
            f"grep -n {unit.constant} {repository.package}/*.py",
        )
        old, new = f"{unit.constant} = {unit.value}", f"{unit.constant} = {value}"
        assistant.replace(say((f"It is set in {path}.", f"It should be {value}.")), path, old, new)
        assistant.check()
        assistant.finish(f"{unit.constant} is now {value}; the check passes.")

    return Task(full_prompt(repository, request), files, solve)


def rename_function(repository: Repository, random: Random) -> Task:
    """Make a task to rename a function in the module and in the check."""
    names = [(repository.module, function.name, function.other_name) for function in repository.functions]
    names += [("units", unit.function, unit.other_function) for unit in repository.units]
    module, old, new = random.choice(names)
    path = repository.path(module)
    request = random.choice(
        (
            f"Rename the function `{old}` of {path} to `{new}`, in check.py too.",
            f"`{old}` in {path} should be called `{new}`. Rename it everywhere, also in check.py.",
        )
    )
    where = f"{repository.package}/*.py check.py"

    def solve(assistant: Assistant) -> None:
        say = assistant.random.choice
        search = f'grep -n "{old}(" {where}'
        assistant.bash(say((f"Where is `{old}` used?", f"I will look for every use of `{old}`.")), search)
        assistant.bash(
            say((f"I will write `{new}` in both files.", f"Both files should say `{new}`.")),
            f'sed -i.bak "s/{old}(/{new}(/g" {path} check.py && rm {path}.bak check.py.bak',
        )
        assistant.bash(say(("Is any left?", f"Is `{old}` gone?")), search)
        assistant.check()
        assistant.finish(f"I renamed `{old}` to `{new}` in {path} and check.py.")

    return Task(
        full_prompt(repository, request),
        start_files(repository, repository.check([*repository.cases(), repository.label_case()])),
        solve,
        acceptance=f'{CHECK} && ! grep -q "{old}(" {where}',
    )


def fix_import(repository: Repository, random: Random) -> Task:
    """Make a task to fix the import of a module that does not exist."""
    path = repository.path("report")
    constant = repository.units[0].constant
    wrong = random.choice(("constants", "measures", "numbers", "unit"))
    wrong_line, right_line = (f"from {repository.package}.{module} import {constant}" for module in (wrong, "units"))
    request = random.choice(
        (
            f"{path} cannot be imported: it takes {constant} from a module that does not exist. Mend the import.",
            f"The check stops with an ImportError, because {path} looks for {constant} in the wrong module. Mend it.",
        )
    )
    files = start_files(
        repository, repository.check([*repository.cases(units=repository.units), repository.label_case()])
    )
    files[path] = files[path].replace(right_line, wrong_line)

    def solve(assistant: Assistant) -> None:
        say = assistant.random.choice
        assistant.bash(say(("What is the error?", "First the error.")), f"{CHECK} 2>&1 | tail -n 1")
        assistant.bash(
            say((f"Which module has {constant}?", f"I will look for {constant}.")),
            f'grep -n "^{constant}" {repository.package}/*.py',
        )
        remark = say((f"It is in {repository.path('units')}.", "It stands in the module `units`."))
        assistant.replace(remark, path, wrong_line, right_line)
        assistant.check()
        assistant.finish(f"{path} now imports {constant} from `{repository.package}.units`; the check passes.")

    return Task(full_prompt(repository, request), files, solve)


def _line(function: Function, fragment: str) -> str:
    """Return the line of a function that contains `fragment` in place of the right one."""
    source = function.source.replace(function.right, fragment)
    return next(line.strip() for line in source.splitlines() if fragment in line)
