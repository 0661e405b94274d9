"""`hyperagent serve adapter-api`: run the adapter service."""

from __future__ import annotations

from hyperagent.auth import ensure_token
from hyperagent.cli.service_command import service_command
from hyperagent.logs import configure_logging
from hyperagent.services import Service
from hyperagent_adapter_api.config import AdapterApiSettings

_GRACE_S = 120
"""Seconds that accepted prompts have to get their adapters after SIGTERM; a full queue of large ones takes about a minute."""


@service_command(Service.ADAPTER_API, AdapterApiSettings)
def serve(settings: AdapterApiSettings) -> None:
    """Serve a bundle over REST, turning prompts into LoRA adapters in PEFT's format."""
    from hyperagent.http.server import listening, run

    configure_logging(service="adapter-api")
    # The port is bound before torch is imported, so that a busy port is reported at once.
    with listening(host=settings.host, port=settings.port, allow_remote=settings.allow_remote) as listener:
        from hyperagent_adapter_api.app import build_app

        run(
            build_app(settings, token=ensure_token()),
            listener,
            allowed_hosts=settings.allowed_hosts,
            grace_s=_GRACE_S,
        )
