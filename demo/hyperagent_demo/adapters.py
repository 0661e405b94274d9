"""Request adapters for held-out tasks from the adapter service, as a user would, and download them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hyperagent.data.chat.messages import Dialogue, dialogue_of
from hyperagent.data.files.reader import read_rows
from hyperagent.data.files.side_tables import read_joined
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


def request_adapters(
    config: DemoConfig, *, source: Path, extra: Path | None, tokens: Path, run: Path, out: Path, token: str
) -> Example:
    """Serve the bundle, turn two held-out conditions into adapters over REST, and download them.

    The first condition is the one that the training process wrote its probe for; its parts are also written to OUT/example,
    for the commands that the demo prints.

    Args:
        source: trajectories that the tokens file was made from.
        extra: file of extra texts that it was made from, if any.
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
    rows = {row["trajectory_id"]: row for row in read_rows(source)}
    texts = {} if extra is None else read_joined(extra, "text")
    dialogue = dialogue_of(rows[probed])
    bodies = {
        name: _body(config, dialogue_of(rows[name]), texts.get(str(rows[name]["instance_id"])))
        for name in (probed, other.trajectory_id)
    }
    _write_example(out / "example", bodies[probed])
    port = free_port()
    arguments = ["--bundle", str(out / "bundle"), "--store", str(out / "adapters"), "--port", str(port)]
    # The check against PEFT is one of the numbers, not of their rounding to bfloat16.
    arguments += ["--dtype", "float32"]
    with (
        service("adapter-api", arguments, log=out / "logs" / "adapter-api.txt", token=token) as process,
        AdapterClient(f"http://127.0.0.1:{port}", token) as client,
    ):
        process.wait_until_ready(client.wait_until_ready)
        client.download(client.create(bodies[probed]), out / "adapter")
        client.download(client.create(bodies[other.trajectory_id]), out / "other-adapter")
    return Example(trajectory, dialogue, other.repo, out / "adapter", out / "other-adapter")


def _body(config: DemoConfig, dialogue: Dialogue, extra: str | None) -> PromptBody:
    """Return the request of a condition: exactly the parts that the hypernetwork reads."""
    parts: dict[str, Any] = {"prompt": dialogue.task}
    if "system" in config.views.condition:
        parts["system"] = dialogue.system
    if "tools" in config.views.condition:
        parts["tools"] = list(dialogue.tools)
    if "extra" in config.views.condition:
        parts["extra"] = extra
    return PromptBody(**parts)


def _write_example(folder: Path, body: PromptBody) -> None:
    write_atomically(folder / "task.txt", body.prompt.encode())
    if body.system is not None:
        write_atomically(folder / "system.txt", body.system.encode())
    if body.extra is not None:
        write_atomically(folder / "extra.txt", body.extra.encode())
    if body.tools is not None:
        write_atomically(folder / "tools.json", json.dumps(body.tools, indent=2).encode())
