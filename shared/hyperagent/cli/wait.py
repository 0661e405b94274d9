"""`hyperagent wait`: block until a service is ready; for scripts and container health checks."""

from __future__ import annotations

from typing import Annotated

import typer

from hyperagent.services import Service


def wait(
    service: Annotated[Service, typer.Argument(help="Service to wait for.")],
    address: Annotated[str | None, typer.Option(help="host:port of the teacher, or URL of another service.")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, help="Give up after this many seconds.")] = 60.0,
) -> None:
    """Block until a service is ready; exit with 1 if it is not ready within the timeout."""
    address = address or service.default_address
    # Health checks need no token.
    if service is Service.TEACHER:
        import asyncio

        from hyperagent.wire.client import TeacherClient

        async def wait_for_teacher() -> None:
            async with TeacherClient(address, token="") as teacher:
                await teacher.wait_until_serving(timeout_s)

        asyncio.run(wait_for_teacher())
    else:
        from hyperagent.http.client import ApiClient

        with ApiClient(address, token="") as client:
            client.wait_until_ready(timeout_s)
