"""Tests of the service as a real process with a port and a token; PEFT loads the downloaded adapter."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import typer
from adapter_stores import adapter_folder
from peft import PeftModel
from transformers import PreTrainedModel, Qwen3NextForCausalLM
from typer.testing import CliRunner

from hyperagent.cli.main import build_app
from hyperagent.http.adapter_client import AdapterClient
from hyperagent.http.adapter_models import PromptBody
from hyperagent.model.adapter import LoRAPair
from hyperagent.model.bundle import load_bundle
from hyperagent.model.lora import HookBasedLoRAInjector
from hyperagent_adapter_api.cli import serve
from hyperagent_adapter_api.generator import AdapterGenerator

PROMPT = "fix the failing test in the parser"
# Equivalent to `hyperagent serve adapter-api`, but does not need the package to be installed.
COMMAND = """
import sys, typer
from hyperagent.errors import HyperagentError
from hyperagent_adapter_api.cli import serve
app = typer.Typer()
app.command()(serve)
try:
    app()
except HyperagentError as error:
    sys.exit(f"error: {error}")
"""


def start(arguments: Sequence[str | Path], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        env={**os.environ, "HYPERAGENT_TOKEN": "secret", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@torch.inference_mode()
def test_a_downloaded_adapter_does_to_the_student_what_the_hypernetwork_meant(
    tmp_path: Path, bundle_folder: Path, student_folder: Path, student: PreTrainedModel
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = start(["--bundle", bundle_folder, "--port", port], HYPERAGENT_ADAPTER_API_STORE=str(tmp_path / "store"))
    try:
        with AdapterClient(f"http://127.0.0.1:{port}", "secret") as client:
            client.wait_until_ready(60)
            adapter = client.create(PromptBody(prompt=PROMPT))
            folder = tmp_path / "downloaded"
            client.download(adapter, folder)
            assert client.adapters().adapters == [adapter]
        process.send_signal(signal.SIGTERM)
        output, log = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, output) == (0, "")
    assert "Traceback" not in log

    torch.manual_seed(3)
    token_ids = torch.randint(3, 259, (1, 24))
    bundle = load_bundle(bundle_folder)
    weights = bundle.generate(AdapterGenerator(bundle).encode({"task": PROMPT}))
    # The file holds bfloat16; what it says is exact from there on.
    rounded = {name: (pair.a.bfloat16().float(), pair.b.bfloat16().float()) for name, pair in weights.items()}
    batched = {name: LoRAPair(a[None], b[None]) for name, (a, b) in rounded.items()}
    bare = student(input_ids=token_ids).logits
    with HookBasedLoRAInjector(student, scale=8.0 / 4).inject(batched):
        meant = student(input_ids=token_ids).logits
    assert (meant - bare).abs().max() > 1e-2
    for source in (folder, adapter_folder(tmp_path / "store", adapter.id)):
        fresh = Qwen3NextForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(fresh, source).eval()(input_ids=token_ids).logits
        torch.testing.assert_close(adapted, meant, atol=1e-5, rtol=0)


def test_the_command_warns_in_one_line_and_writes_the_adapter(tmp_path: Path, watchful_bundle_folder: Path) -> None:
    usual, unusual = "fix the failing test 155 in the parser", "@@ ZZ ## QQ || %% XX && WW"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = f"http://127.0.0.1:{port}"
    process = start(["--bundle", watchful_bundle_folder, "--port", port, "--store", tmp_path / "s"])
    try:
        with AdapterClient(server, "secret") as client:
            client.wait_until_ready(60)
        shown = {
            prompt: CliRunner().invoke(
                build_app(),
                ["adapter", "create", prompt, "--server", server, "--out", str(tmp_path / str(place)), "--json"],
                env={"HYPERAGENT_TOKEN": "secret"},
            )
            for place, prompt in enumerate((usual, unusual))
        }
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    for place, prompt in enumerate((usual, unusual)):
        assert shown[prompt].exit_code == 0, shown[prompt].output
        assert (tmp_path / str(place) / "adapter_model.safetensors").is_file()
    assert shown[usual].stderr == ""
    novelty = json.loads(shown[unusual].stdout)["novelty"]
    assert novelty["is_unusual"]
    assert shown[unusual].stderr == (
        "warning: this prompt is unlike the prompts that the hypernetwork was trained on "
        f"(distance {novelty['distance']:.3g}, usual up to {novelty['threshold']:.3g}): the adapter may be worse than none\n"
    )
    assert log.count("the prompt is unlike the training prompts") == 1


def test_a_taken_port_is_one_line(tmp_path: Path, bundle_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(["--bundle", bundle_folder, "--store", tmp_path / "store", "--port", port])
        output, log = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    assert log.splitlines() == [
        f"error: cannot listen on http://127.0.0.1:{port}: the port is taken; stop the other process, or give another --port"
    ]
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--bundle", "none", "--port", "0"], "error: none is not a bundle: "),
        (["--bundle", "none", "--max-store-mib", "0"], "error: hyperagent serve adapter-api: max_store_mib: "),
        (["--bundle", "none", "--host", "0.0.0.0"], "error: other machines can reach 0.0.0.0"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path: Path, arguments: list[str], line: str) -> None:
    process = start([*arguments, "--store", tmp_path / "store"])
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(log.splitlines()) == 1
    assert log.startswith(line)


def test_the_command_documents_every_option_and_needs_no_torch_for_it() -> None:
    command = typer.Typer(add_completion=False)
    command.command()(serve)
    text = CliRunner().invoke(command, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}, terminal_width=200).output
    for name in (
        "BUNDLE", "STORE", "HOST", "PORT", "ALLOW_REMOTE", "ALLOWED_HOSTS", "DTYPE", "MAX_STORE_MIB", "ADAPTER_TTL_S", "MAX_PENDING_REQUESTS",
    ):  # fmt: skip
        assert f"HYPERAGENT_ADAPTER_API_{name}" in text
    lean = "import sys, hyperagent_adapter_api.cli; sys.exit('torch' in sys.modules or 'fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", lean], check=False).returncode == 0
