"""`hyperagent adapter`: request LoRA adapters from the adapter service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hyperagent.cli.display import print_result
from hyperagent.errors import ConfigError
from hyperagent.services import Service

_READY_TIMEOUT_S = 20.0

app = typer.Typer(help="Request adapters from the adapter service.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Request adapters from the adapter service."""


@app.command()
def create(
    prompt: Annotated[str | None, typer.Argument(help="Text of the task; alternatively use --prompt-file.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the task's text from this file.")] = None,
    system_file: Annotated[Path | None, typer.Option(help="Read the system prompt from this file.")] = None,
    tools_file: Annotated[Path | None, typer.Option(help="Read the tools (a JSON list) from this file.")] = None,
    extra_file: Annotated[Path | None, typer.Option(help="Read further text, such as a repository map.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write the adapter to, for PEFT and vLLM.")] = Path("adapter"),
    server: Annotated[str, typer.Option(help="URL of the adapter service.")] = Service.ADAPTER_API.default_address,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Turn a prompt into a LoRA adapter in PEFT's format.

    Pass the system prompt, tools and extra text if and only if the hypernetwork was trained to read them.
    """
    from hyperagent.auth import read_token
    from hyperagent.config import parse
    from hyperagent.http.adapter_client import AdapterClient
    from hyperagent.http.adapter_models import PromptBody

    body: dict[str, Any] = {"prompt": _prompt_text(prompt, prompt_file)}
    for name, path in (("system", system_file), ("tools", tools_file), ("extra", extra_file)):
        if path is not None:
            body[name] = _tools(path) if name == "tools" else _text(path)
    request = parse(body, PromptBody, source="hyperagent adapter create")
    # A service that the same script has just started may still be loading, and may not have created its token yet.
    with AdapterClient(server, token="") as client:
        client.wait_until_ready(_READY_TIMEOUT_S)
    with AdapterClient(server, read_token()) as client:
        adapter = client.create(request)
        client.download(adapter, out)
    if (novelty := adapter.novelty) is not None and novelty.is_unusual:
        typer.echo(
            "warning: this prompt is unlike the prompts that the hypernetwork was trained on "
            f"(distance {novelty.distance:.3g}, usual up to {novelty.threshold:.3g}): the adapter may be worse than none",
            err=True,
        )
    print_result({**adapter.model_dump(mode="json"), "folder": str(out)}, as_json=as_json)


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ConfigError("give the prompt either as an argument or with --prompt-file, not both")
    if prompt is not None:
        return prompt
    assert prompt_file is not None
    return _text(prompt_file)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; give a text file") from error


def _tools(path: Path) -> list[Any]:
    try:
        tools = json.loads(_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}; give a JSON list of tools") from error
    if not isinstance(tools, list):
        raise ConfigError(f"{path} is not a JSON list; give the tools as in a chat completion")
    return tools
