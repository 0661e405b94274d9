"""Test that the code blocks of the README and docs/data.md run unchanged and in order.

They run in a copy of the checkout with the smallest demo's configuration.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from doc_blocks import bash_blocks
from world import World

ROOT = Path(__file__).parents[2]
# Running the tests from within the tests would never end.
_NOT_RUN = {"make test\n"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_leads_to_a_served_adapter(world: World, environment: dict[str, str], tmp_path: Path) -> None:
    if not (ROOT / ".venv" / ".installed").is_file():
        pytest.fail("the README's commands need .venv: run `make setup`")
    for entry in ROOT.iterdir():
        if entry.name not in {"runs", ".git", "configs"}:
            (tmp_path / entry.name).symlink_to(entry)
    # A recipe's paths are relative to its real location.
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    # The files that the README expects the reader to have.
    shutil.copyfile(world.sample, tmp_path / "trajectories.parquet")
    if not (tmp_path / "tokenizer").exists():
        shutil.copytree(world.tokenizer, tmp_path / "tokenizer")

    blocks = [block for block in bash_blocks(ROOT / "README.md") if block not in _NOT_RUN]
    assert len(blocks) >= 4
    # The last demo is a different one, whose folder has no tokenizer.
    assert "make demo DATA=" in blocks[-1]
    blocks[-1:-1] = bash_blocks(ROOT / "docs" / "data.md")
    proof = "test -s runs/demo/my-adapter/adapter_model.safetensors\n"
    script = "\n".join(["set -euxo pipefail", blocks[0], proof, *blocks[1:]])
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=tmp_path,
            env={**environment, "HYPERAGENT_DEMO_CONFIG": "configs/demo_smoke.yaml"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = process.wait(800)
    finally:
        # Stop the services that the blocks have left running in the background.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, log.read_text(encoding="utf-8")[-4000:]
    assert (tmp_path / "runs/demo/report.png").is_file()
    assert list((tmp_path / "runs/steps/runs").glob("*/bundle/bundle.json"))
