"""`hyperagent serve adapter-api`: the adapter service, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    bundle: Annotated[
        Path, typer.Option(help="Folder of the bundle to serve.", envvar="HYPERAGENT_ADAPTER_API_BUNDLE")
    ],
    store: Annotated[
        Path, typer.Option(help="Folder that gets a folder per adapter.", envvar="HYPERAGENT_ADAPTER_API_STORE")
    ] = Path("adapters"),
    host: Annotated[
        str, typer.Option(help="Address to listen on.", envvar="HYPERAGENT_ADAPTER_API_HOST")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", envvar="HYPERAGENT_ADAPTER_API_PORT")
    ] = 8703,
    allow_remote: Annotated[
        bool,
        typer.Option(
            "--allow-remote",
            help="Permit an address that other machines can reach; traffic is not encrypted.",
            envvar="HYPERAGENT_ADAPTER_API_ALLOW_REMOTE",
        ),
    ] = False,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            help="A name the service answers to besides localhost and IP addresses; may be given several times.",
            envvar="HYPERAGENT_ADAPTER_API_ALLOWED_HOSTS",
        ),
    ] = None,
    max_adapters: Annotated[
        int, typer.Option(help="Most adapters kept in the store.", envvar="HYPERAGENT_ADAPTER_API_MAX_ADAPTERS")
    ] = 1000,
    max_pending_requests: Annotated[
        int,
        typer.Option(
            help="Most prompts waiting or in progress; more are turned away.",
            envvar="HYPERAGENT_ADAPTER_API_MAX_PENDING_REQUESTS",
        ),
    ] = 8,
) -> None:
    """Serve a bundle over REST: a prompt in, a LoRA adapter in PEFT's format out."""
    given = {**locals(), "allowed_hosts": allowed_hosts or ()}
    from hyperagent.auth import ensure_token
    from hyperagent.config import parse
    from hyperagent.http.server import listening, run
    from hyperagent.logs import configure_logging
    from hyperagent_adapter_api.config import AdapterApiSettings

    configure_logging(service="adapter-api")
    settings = parse(given, AdapterApiSettings, source="hyperagent serve adapter-api")
    # The port is taken before torch is imported, so that a busy one is known at once.
    with listening(host=settings.host, port=settings.port, allow_remote=settings.allow_remote) as listener:
        from hyperagent_adapter_api.app import build_app

        run(build_app(settings, token=ensure_token()), listener, allowed_hosts=settings.allowed_hosts)
