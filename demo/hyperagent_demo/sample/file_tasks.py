"""Tasks whose answer is a file: write settings, count, find."""

from __future__ import annotations

import re
from random import Random

from hyperagent_demo.sample.assistant import Assistant
from hyperagent_demo.sample.repositories import Repository
from hyperagent_demo.sample.task import Task, full_prompt, start_files


def write_settings(repository: Repository, random: Random) -> Task:
    """Make a task to write the constants of a module to a settings file."""
    path = repository.path("units")
    name = f"{repository.package}.cfg"
    text = "".join(f"{unit.constant.lower()} = {unit.value}\n" for unit in repository.units)
    request = random.choice(
        (
            f"Write a file {name} with one line `name = value` for every constant of {path}, in the same order, "
            "the names in lower case.",
            f"We need the constants of {path} as a file {name}: a line `name = value` for each, "
            "with lower-case names, in the same order.",
        )
    )
    files = start_files(repository, repository.check([repository.label_case()], written=[(name, text.strip())]))

    def solve(assistant: Assistant) -> None:
        say = assistant.random.choice
        assistant.bash(say(("Which constants are there?", "First the constants.")), f'grep "^[A-Z]" {path}')
        assistant.create(say((f"I will write {name}.", f"These go to {name} in lower case.")), name, text)
        assistant.check()
        assistant.finish(f"I wrote the {len(repository.units)} constants of {path} to {name}; the check passes.")

    return Task(full_prompt(repository, request), files, solve)


def count_lines(repository: Repository, random: Random) -> Task:
    """Make a task to count something in a module and write the number to a file."""
    module = random.choice(("units", repository.module))
    path = repository.path(module)
    source = repository.files()[path]
    what, pattern = random.choice((("functions", "^def "), ("lines with a `return`", "return "), ("lines", "")))
    count = sum(re.search(pattern, line) is not None for line in source.splitlines())
    name = random.choice(("count.txt", "answer.txt", "number.txt"))
    request = random.choice(
        (
            f"How many {what} does {path} have? Write the number to {name}.",
            f"Count the {what} of {path} and write the number to {name}.",
        )
    )
    files = start_files(repository, repository.check([repository.label_case()], written=[(name, str(count))]))

    def solve(assistant: Assistant) -> None:
        say = assistant.random.choice
        remark = say((f"I will count the {what}.", f"`grep -c` counts the {what}."))
        printed = assistant.bash(remark, f'grep -c "{pattern}" {path}').strip()
        assistant.bash(say((f"There are {printed}.", f"That makes {printed}.")), f"echo {printed} > {name}")
        assistant.check()
        assistant.finish(f"{path} has {printed} {what}; the number is in {name}.")

    return Task(full_prompt(repository, request), files, solve)


def find_definition(repository: Repository, random: Random) -> Task:
    """Make a task to find the file that defines a function and write its path to a file."""
    homes = {function.name: repository.module for function in repository.functions}
    homes |= {unit.function: "units" for unit in repository.units} | {"label": "report"}
    function = random.choice(sorted(homes))
    answer = repository.path(homes[function])
    name = random.choice(("where.txt", "answer.txt", "place.txt"))
    request = random.choice(
        (
            f"Which file of the package defines `{function}`? Write its path to {name}.",
            f"Find the file that defines the function `{function}` and write its path to {name}.",
        )
    )
    files = start_files(repository, repository.check([repository.label_case()], written=[(name, answer)]))

    def solve(assistant: Assistant) -> None:
        say = assistant.random.choice
        printed = assistant.bash(
            say((f"I will look for `{function}`.", f"Where is `{function}` defined?")),
            f'grep -n "def {function}(" {repository.package}/*.py',
        )
        found = printed.partition(":")[0]
        assistant.bash(say((f"It is in {found}.", f"{found} defines it.")), f"echo {found} > {name}")
        assistant.check()
        assistant.finish(f"`{function}` is defined in {found}; the path is in {name}.")

    return Task(full_prompt(repository, request), files, solve)
