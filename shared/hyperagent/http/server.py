"""Serve an application: bind the port first, then start the application, and shut down cleanly on SIGTERM.

The socket is bound and listening before anything else starts, so a busy port is reported at once; connections wait
until the application is ready.
"""

from __future__ import annotations

import errno
import ipaddress
import signal
import socket
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType

import structlog
import uvicorn
from fastapi.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from hyperagent.errors import ServiceError
from hyperagent.http.connection import TimedConnection
from hyperagent.http.middleware import RequireHost
from hyperagent.net import listening_ip

_BACKLOG = 128
_STOP_GRACE_S = 10
"""Seconds that requests in progress have to finish after SIGTERM."""

_log = structlog.get_logger()


@contextmanager
def listening(*, host: str, port: int, allow_remote: bool) -> Iterator[socket.socket]:
    """Bind a listening socket for the block, in which SIGTERM and SIGINT exit with code 0.

    Args:
        allow_remote: permit addresses that are reachable from other machines.

    Raises:
        ConfigError: the address does not exist, or it is reachable from other machines and that is not permitted.
        ServiceError: the port is not available.
    """

    def leave(_number: int, _frame: FrameType | None) -> None:
        sys.exit(0)

    with _listen(host, port, allow_remote=allow_remote) as listener:
        before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield listener
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(
    app: ASGIApp,
    listener: socket.socket,
    *,
    allowed_hosts: Collection[str] = (),
    grace_s: int = _STOP_GRACE_S,
    on_stop: Callable[[], None] | None = None,
) -> None:
    """Serve on a listening socket until a signal arrives, then finish the requests in progress.

    Args:
        allowed_hosts: host names accepted in addition to localhost and IP addresses.
        grace_s: seconds that the requests in progress have to finish.
        on_stop: called once after the signal, in a thread and before the requests in progress are waited for.
    """
    address = listener.getsockname()
    any_address = not ipaddress.ip_address(address[0]).is_loopback
    config = uvicorn.Config(
        RequireHost(app, any_address=any_address, names=allowed_hosts),
        http=TimedConnection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=grace_s,
    )
    _log.info("listening", address=_url(address))
    _Server(config, on_stop).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Server that calls `on_stop` first when it shuts down; the application's lifespan ends only after the last request."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._on_stop is not None:
            await run_in_threadpool(self._on_stop)
        await super().shutdown(sockets)


def _listen(host: str, port: int, *, allow_remote: bool) -> socket.socket:
    ip = listening_ip(host, allow_remote=allow_remote)
    address = (str(ip), port)
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    # asyncio sets TCP_NODELAY only on sockets whose protocol is given. Without it, an answer of two packets waits for the
    # client's delayed acknowledgment: 44 ms on a connection that is kept alive.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # Allows binding while old connections are still closing, but never while another listener has the port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = {
            errno.EADDRINUSE: "the port is taken; stop the other process, or give another --port",
            errno.EACCES: "the port is reserved for the system; give another --port",
            errno.EADDRNOTAVAIL: "the address is not this machine's; give another --host",
        }.get(error.errno or 0, str(error.strerror))
        raise ServiceError(f"cannot listen on {_url(address)}: {reason}") from error
    return listener


def _url(address: tuple[object, ...]) -> str:
    host, port = address[:2]
    return f"http://[{host}]:{port}" if ":" in str(host) else f"http://{host}:{port}"
