"""Request adapters for held-out tasks from the adapter service, as a user would, and download them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hyperagent.data.chat.messages import Dialogue, dialogue_of
from hyperagent.data.files.reader import read_rows
from hyperagent.data.files.tokens_file import HELD_OUT, TokenizedTrajectory, read_tokens
from hyperagent.http.adapter_client import AdapterClient
from hyperagent.http.adapter_models import PromptBody
from hyperagent.storage.files import write_atomically
from hyperagent_demo.config import DemoConfig
from hyperagent_demo.processes import free_port, service


@dataclass(frozen=True, eq=False)
class Example:
    """A held-out trajectory, the adapter of its condition, and that of another repository's."""

    trajectory: TokenizedTrajectory
    dialogue: Dialogue
    other_repo: str
    adapter: Path
    """Folder of the adapter."""
    other_adapter: Path


def request_adapters(config: DemoConfig, *, source: Path, tokens: Path, run: Path, out: Path, token: str) -> Example:
    """Serve the bundle, turn two held-out conditions into adapters over REST, and download them.

    The first condition is the one that the training process wrote its probe for; its parts are also written to OUT/example,
    for the commands that the demo prints.

    Args:
        source: trajectories that the tokens file was made from.
        run: folder of the hypernetwork's run.
        token: access token for the adapter service.

    Raises:
        ServiceError: the service has ended, is not ready in time, or refuses a request.
    """
    with safe_open(run / "probe.safetensors", framework="np") as probe:
        probed = probe.metadata()["trajectory_id"]
    held_out = {t.trajectory_id: t for t in read_tokens(tokens, split=HELD_OUT)}
    trajectory = held_out[probed]
    other = next((t for t in held_out.values() if t.repo != trajectory.repo), None) or trajectory
    dialogues = {
        row["trajectory_id"]: dialogue_of(row)
        for row in read_rows(source)
        if row["trajectory_id"] in (probed, other.trajectory_id)
    }
    bodies = {name: _body(config, dialogues[name]) for name in (probed, other.trajectory_id)}
    _write_example(out / "example", bodies[probed])
    port = free_port()
    arguments = ["--bundle", str(out / "bundle"), "--store", str(out / "adapters"), "--port", str(port)]
    with (
        service("adapter-api", arguments, log=out / "logs" / "adapter-api.txt", token=token) as process,
        AdapterClient(f"http://127.0.0.1:{port}", token) as client,
    ):
        process.wait_until_ready(client.wait_until_ready)
        client.download(client.create(bodies[probed]), out / "adapter")
        client.download(client.create(bodies[other.trajectory_id]), out / "other-adapter")
    return Example(trajectory, dialogues[probed], other.repo, out / "adapter", out / "other-adapter")


def _body(config: DemoConfig, dialogue: Dialogue) -> PromptBody:
    """Return the request of a condition: exactly the parts that the hypernetwork reads."""
    parts: dict[str, Any] = {"prompt": dialogue.task}
    if "system" in config.views.condition:
        parts["system"] = dialogue.system
    if "tools" in config.views.condition:
        parts["tools"] = list(dialogue.tools)
    return PromptBody(**parts)


def _write_example(folder: Path, body: PromptBody) -> None:
    write_atomically(folder / "task.txt", body.prompt.encode())
    if body.system is not None:
        write_atomically(folder / "system.txt", body.system.encode())
    if body.tools is not None:
        write_atomically(folder / "tools.json", json.dumps(body.tools, indent=2).encode())
