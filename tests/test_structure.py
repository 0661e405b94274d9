"""The shape of the code: short files, short functions, small folders, tests where their packages are, plain words."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_MODULES, MAX_FILE_LINES, MAX_FUNCTION_LINES = 16, 400, 70
PACKAGES = {
    "shared": ROOT / "shared/hyperagent",
    "teacher": ROOT / "services/teacher/hyperagent_teacher",
    "trainer": ROOT / "services/trainer/hyperagent_trainer",
    "adapter_api": ROOT / "services/adapter_api/hyperagent_adapter_api",
    "demo": ROOT / "demo/hyperagent_demo",
}
# These test several members together.
OTHER_TESTS = {"integration", "proto", "vllm"}
# Triton compiles a kernel as one function.
KERNEL_FILES = {PACKAGES["trainer"] / "loss/kernels.py"}
FORBIDDEN_WORDS = re.compile(r"\b(aside|wishes|told|mended|be had|for company)\b")
PROSE = ("*.py", "*.md", "*.toml", "*.yaml", "*.yml", "*.js", "*.html", "Makefile")


def sources() -> list[Path]:
    """Return every module of the packages that people write."""
    return [path for package in PACKAGES.values() for path in sorted(package.rglob("*.py")) if "_pb2" not in path.name]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def long_functions(source: str, name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{name}: {node.name} has {lines} lines"


def test_no_folder_has_more_than_16_modules() -> None:
    counts = Counter(path.parent for path in sources() if path.name != "__init__.py")
    assert len(counts) > 20
    assert {relative(folder): count for folder, count in counts.items() if count > MAX_MODULES} == {}


def test_no_file_has_more_than_400_lines() -> None:
    files = [*sources(), *(ROOT / "benchmarks").glob("*.py")]
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_has_more_than_70_lines() -> None:
    files = [path for path in sources() if path not in KERNEL_FILES]
    assert [line for path in files for line in long_functions(path.read_text(encoding="utf-8"), relative(path))] == []


def test_a_function_of_71_lines_is_noticed() -> None:
    body = "    x = 1\n"
    assert list(long_functions("def f():\n" + body * 69, "a.py")) == []
    assert list(long_functions("class A:\n    async def f():\n" + f"    {body}" * 70, "a.py")) == [
        "a.py: f has 71 lines"
    ]


@pytest.mark.parametrize("member", PACKAGES)
def test_the_tests_mirror_the_packages(member: str) -> None:
    tests = ROOT / "tests" / member
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    packages = {path.parent.relative_to(PACKAGES[member]) for path in PACKAGES[member].rglob("*.py")}
    assert folders
    assert folders - packages == set()


def test_every_folder_of_tests_belongs_to_a_member() -> None:
    folders = {path.parent.relative_to(ROOT / "tests").parts for path in (ROOT / "tests").rglob("test_*.py")}
    assert {parts[0] for parts in folders if parts} == {*PACKAGES, *OTHER_TESTS}


def prose() -> Iterator[tuple[str, int, str]]:
    """Yield file, number and text of every line of code and docs."""
    folders = ["shared", "services", "demo", "tests", "benchmarks", "configs", "docs", "proto"]
    files = [path for folder in folders for pattern in PROSE for path in (ROOT / folder).rglob(pattern)]
    # What the generated sample's agents say is data: another word would be another data set.
    exceptions = {Path(__file__), PACKAGES["demo"] / "sample" / "code_tasks.py"}
    for path in sorted({*files, *(path for pattern in PROSE for path in ROOT.glob(pattern))} - exceptions):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            yield relative(path), number, line


def test_code_and_docs_use_none_of_the_forbidden_words() -> None:
    found = [f"{name}:{number}: {line.strip()}" for name, number, line in prose() if FORBIDDEN_WORDS.search(line)]
    assert found == []
