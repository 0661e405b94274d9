"""`hyperagent adapter`: ask the adapter service for a LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hyperagent.cli.display import print_result
from hyperagent.errors import ConfigError

_READY_TIMEOUT_S = 20.0

app = typer.Typer(help="Ask the adapter service for adapters.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Ask the adapter service for adapters."""


@app.command()
def create(
    prompt: Annotated[str | None, typer.Argument(help="The task's text; or give --prompt-file.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the task's text from this file.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write the adapter to, for PEFT and vLLM.")] = Path("adapter"),
    server: Annotated[str, typer.Option(help="The adapter service's address.")] = "http://127.0.0.1:8703",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Turn a prompt into a LoRA adapter in PEFT's format."""
    from hyperagent.auth import read_token
    from hyperagent.files import new_directory
    from hyperagent.http.client import ApiClient

    text = _prompt_text(prompt, prompt_file)
    # A service that was started a moment ago, in the same script, is still loading, and may not have made the token yet.
    with ApiClient(server, token="") as client:
        client.wait_until_ready(_READY_TIMEOUT_S)
    with ApiClient(server, read_token()) as client:
        created = client.post_json("/v1/adapters", {"prompt": text})
        with new_directory(out) as aside:
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                (aside / name).write_bytes(client.get_bytes(f"/v1/adapters/{created['id']}/{name}"))
    print_result({**created, "folder": str(out)}, as_json=as_json)


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ConfigError("give the prompt either as an argument or with --prompt-file, and not both")
    if prompt is not None:
        return prompt
    assert prompt_file is not None
    try:
        return prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompt from {prompt_file}: {error}") from error
