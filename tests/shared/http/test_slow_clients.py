"""Tests that clients which send slowly, or nothing, lose their connection instead of holding it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn

from hyperagent.http import connection, middleware
from hyperagent.http.app import create_app
from hyperagent.http.connection import TimedConnection

LIMIT_S = 1.5


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", LIMIT_S)
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", LIMIT_S)
    app = create_app(title="t", version="0", token="secret")

    @app.post("/v1/echo")
    async def echo(body: dict[str, str]) -> dict[str, str]:
        return body

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, http=TimedConnection, log_config=None, lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        yield client


HEADER = (
    b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
)


def rest(client: socket.socket) -> bytes:
    """Return everything until the server closes the connection."""
    return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost:"])
def test_a_header_that_does_not_arrive_ends_the_connection(sent: bytes, port: int) -> None:
    with connected(port) as client:
        client.sendall(sent)
        assert rest(client) == b""


def test_a_second_request_has_the_same_limit(port: int) -> None:
    with connected(port) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /heal")
        assert rest(client) in (b"", b'{"status":"ok"}')


def test_a_body_that_trickles_is_refused(port: int) -> None:
    with connected(port) as client:
        client.sendall(HEADER + b"Content-Length: 100\r\n\r\n{")
        assert client.recv(65536).startswith(b"HTTP/1.1 408")


def test_a_body_in_pieces_within_the_time_is_read(port: int) -> None:
    with connected(port) as client:
        client.sendall(HEADER + b"Content-Length: 10\r\n\r\n")
        for piece in (b'{"a"', b': "', b'b"}'):
            client.sendall(piece)
            time.sleep(0.02)
        client.shutdown(socket.SHUT_WR)
        assert rest(client).endswith(b'{"a":"b"}')
