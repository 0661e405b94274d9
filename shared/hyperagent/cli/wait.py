"""`hyperagent wait`: block until a service is ready; for scripts and container health checks."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import Annotated

import typer


class Service(StrEnum):
    """A service and, as its value, its name on the command line."""

    TEACHER = "teacher"
    TRAINER = "trainer"
    ADAPTER_API = "adapter-api"


_ADDRESSES = {
    Service.TEACHER: "127.0.0.1:8701",
    Service.TRAINER: "http://127.0.0.1:8702",
    Service.ADAPTER_API: "http://127.0.0.1:8703",
}


def wait(
    service: Annotated[Service, typer.Argument(help="Which service to wait for.")],
    address: Annotated[str | None, typer.Option(help="host:port of the teacher, or the other services' URL.")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, help="Give up after this many seconds.")] = 60.0,
) -> None:
    """Block until a service is ready; exits 1 when it is not within the timeout."""
    from hyperagent.http.client import ApiClient
    from hyperagent.wire.client import TeacherClient

    address = address or _ADDRESSES[service]
    # Health is the one thing that a service tells without a token.
    if service is Service.TEACHER:

        async def wait_for_teacher() -> None:
            async with TeacherClient(address, token="") as teacher:
                await teacher.wait_until_serving(timeout_s)

        asyncio.run(wait_for_teacher())
    else:
        with ApiClient(address, token="") as client:
            client.wait_until_ready(timeout_s)
