"""Tests that a demo removes nothing of a former one, and nothing of its user's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hyperagent.errors import ConfigError
from hyperagent_demo.folder import keep_former_results, move_into, require_demo_folder, temporary_folder

CONFIG = Path(__file__).parents[2] / "configs" / "demo_smoke.yaml"
WRITTEN = {
    "report.json": "first",
    "demo.json": "{}",
    "adapter/adapter_config.json": "{}",
    "logs/teacher.txt": "",
    "bundle/bundle.json": "{}",
}
OWN = {
    "my-adapter/adapter_model.safetensors": "mine", "adapters/0123456789abcdef/id/adapter.json": "{}", "notes.txt": "mine",
    "foreign-notes.txt": "mine",
}  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    out = tmp_path / "demo"
    for name, content in {**WRITTEN, **OWN}.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
    (tmp_path / "models" / "teacher").mkdir(parents=True)
    (out / "teacher").symlink_to("../models/teacher")
    return out


def test_what_a_former_demo_wrote_is_kept_and_the_users_files_stay(out: Path) -> None:
    for number in (1, 2):
        require_demo_folder(out)
        with temporary_folder(beside=out) as place:
            (place / "tokens.parquet").write_text(f"run {number}")
            keep_former_results(out)
            move_into(out, place)
        assert not place.exists()
        assert (out / "tokens.parquet").read_text() == f"run {number}"
        (out / "demo.json").write_text("{}")
        assert {name: (out / name).read_text() for name in OWN} == OWN
    first, second = sorted((out / "previous").iterdir())
    assert {name: (first / name).read_text() for name in WRITTEN} == WRITTEN
    assert (first / "teacher").resolve() == (out.parent / "models" / "teacher").resolve()
    assert (second / "tokens.parquet").read_text() == "run 1"


def test_a_folder_of_somebody_elses_is_refused(tmp_path: Path) -> None:
    require_demo_folder(tmp_path / "missing")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files than a demo's"):
        require_demo_folder(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        require_demo_folder(tmp_path / "thesis.txt")


@pytest.mark.parametrize("content", ["", "{not json\n", '{"messages": [{"role": "user", "content": "no answer"}]}\n'])
def test_data_that_cannot_be_used_changes_nothing(content: str, out: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    before = {path: path.read_text() for path in out.rglob("*") if path.is_file()}
    command = [
        sys.executable,
        "-m",
        "hyperagent",
        "demo",
        "--config",
        str(CONFIG),
        "--data",
        str(tmp_path / "bad.jsonl"),
    ]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert {path: path.read_text() for path in out.rglob("*") if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "models", "bad.jsonl"}
