"""Definition of a task, and the parts that all tasks share: the prompt's opening and the initial files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hyperagent_demo.sample.assistant import CHECK, Assistant
from hyperagent_demo.sample.repositories import Repository
from hyperagent_demo.sample.workspace import SHOWN_ROOT


@dataclass(frozen=True)
class Task:
    """One task in one repository."""

    prompt: str
    files: Mapping[str, str]
    """Initial files of the repository, by path."""
    solve: Callable[[Assistant], None]
    acceptance: str = CHECK
    """Command that fails at the start and succeeds at the end."""


def start_files(repository: Repository, check: str) -> dict[str, str]:
    """Return the package's files and the check's source, by path."""
    return {**repository.files(), "check.py": check}


def full_prompt(repository: Repository, request: str) -> str:
    """Return the request between a sentence about the repository and one about its check."""
    modules = ", ".join(repository.modules)
    return (
        f"The repository in {SHOWN_ROOT} holds the package `{repository.package}` with the modules {modules}.\n\n"
        f"{request} In the end `{CHECK}` must pass."
    )
