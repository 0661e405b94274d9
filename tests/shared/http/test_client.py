"""The clients against servers that are not ours: silence, nonsense, other people's errors."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, TypeVar

import pytest

from hyperagent.errors import ConfigError, CorruptRecord, HyperagentError, InvalidRequest, NotFound, ServiceError
from hyperagent.http.client import ApiClient, AsyncApiClient, Call

T = TypeVar("T")
GET = Call("GET", "/v1/runs", json.loads)


class DrivenAsyncClient:
    """The asynchronous client, driven call by call, so that every test runs over both clients."""

    def __init__(self, base_url: str, token: str) -> None:
        self._client = AsyncApiClient(base_url, token)
        self._loop = asyncio.Runner()

    def __enter__(self) -> Self:
        self._loop.run(self._client.__aenter__())
        return self

    def __exit__(self, *ended: Any) -> None:
        self._loop.run(self._client.__aexit__(*ended))
        self._loop.close()

    def send(self, call: Call[T]) -> T:
        return self._loop.run(self._client.send(call))

    def wait_until_ready(self, timeout_s: float) -> None:
        self._loop.run(self._client.wait_until_ready(timeout_s))


Client = type[ApiClient] | type[DrivenAsyncClient]


@pytest.fixture(params=[ApiClient, DrivenAsyncClient], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Client:
    client: Client = request.param
    return client


@dataclass
class Scripted:
    """A server that answers from a list, and what it was asked."""

    url: str
    answers: list[tuple[int, str, bytes]]
    asked: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def scripted(*answers: tuple[int, str, bytes]) -> Iterator[Scripted]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            script.asked.append(dict(self.headers))
            status, media_type, content = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            self.send_response(status)
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        script = Scripted(f"http://127.0.0.1:{server.server_port}", list(answers))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join()


def problem(status: int, **fields: Any) -> tuple[int, str, bytes]:
    body = {"title": "t", "status": status, "detail": "d", "instance": "/", **fields}
    return status, "application/problem+json", json.dumps(body).encode()


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (problem(500, type="urn:hyperagent:problem:corrupt-record", detail="a shard\nis damaged"), CorruptRecord, "a shard is"),
        (problem(404, type="about:blank"), NotFound, "d"),
        (problem(418, type="https://example.org/teapot"), InvalidRequest, "d"),
        (problem(502), ServiceError, "d"),
        ((404, "text/html", b"<h1>nothing</h1>"), ServiceError, "404"),
        ((500, "application/problem+json", b"{"), ServiceError, "500"),
        ((307, "text/html", b""), ServiceError, "307"),
        ((401, "text/html", b""), ConfigError, "HYPERAGENT_TOKEN"),
        ((200, "text/html", b"<h1>hello</h1>"), ServiceError, "did not answer with the expected JSON"),
        ((200, "application/json", b"{"), ServiceError, "did not answer with the expected JSON"),
    ],
)  # fmt: skip
def test_every_bad_answer_is_an_error_of_ours(
    connect: Client, answer: tuple[int, str, bytes], kind: type[HyperagentError], message: str
) -> None:
    with scripted(answer) as server, connect(server.url, "t") as client:
        with pytest.raises(kind, match=message) as raised:
            client.send(GET)
        assert type(raised.value) is kind
        assert "\n" not in str(raised.value)


def test_the_token_is_sent_and_an_empty_one_is_not(connect: Client) -> None:
    with scripted((200, "application/json", b"[1]")) as server:
        with connect(server.url, "t0k3n") as client:
            assert client.send(GET) == [1]
        with connect(server.url, "") as client:
            assert client.send(Call("GET", "/", bytes)) == b"[1]"
        assert [asked.get("Authorization") for asked in server.asked] == ["Bearer t0k3n", None]


def test_no_proxy_sees_what_is_sent(connect: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        scripted((200, "application/json", b'"proxy"')) as proxy,
        scripted((200, "application/json", b'"us"')) as server,
    ):
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        with connect(server.url, "t") as client:
            assert client.send(GET) == "us"
        assert proxy.asked == []


def refused_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_nobody_there_is_one_line_with_a_remedy(connect: Client) -> None:
    url = refused_address()
    for call in (GET, Call("POST", "/", json.loads, body={}), Call("GET", "/", bytes)):
        with (
            connect(url, "t") as client,
            pytest.raises(ServiceError, match=rf"nothing answers at {url}.*hyperagent serve"),
        ):
            client.send(call)


def test_who_hangs_up_is_a_service_error(connect: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65_536)

        thread = threading.Thread(target=hang_up)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with connect(url, "t") as client, pytest.raises(ServiceError, match=f"connection to {url}"):
            client.send(GET)
        thread.join()


@pytest.mark.parametrize("url", ["127.0.0.1:8703", "localhost", "ftp://localhost", "http://", "http://[::1", ""])
def test_what_is_no_address_is_refused_at_once(connect: Client, url: str) -> None:
    with pytest.raises(ConfigError, match="is not a valid address"):
        connect(url, "t")


def test_waiting_ends_when_the_service_is_ready(connect: Client) -> None:
    starting = problem(503, type="urn:hyperagent:problem:service-error")
    with scripted(starting, starting, (200, "application/json", b"{}")) as server, connect(server.url, "") as client:
        client.wait_until_ready(20)
        assert len(server.asked) == 3


def test_waiting_gives_up_and_says_why(connect: Client) -> None:
    url = refused_address()
    with (
        connect(url, "") as client,
        pytest.raises(ServiceError, match=rf"{url} was not ready within 0\.2 s: nothing"),
    ):
        client.wait_until_ready(0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with connect(url, "") as client, pytest.raises(ServiceError, match=r"within 0\.2 s: .*did not answer"):
            client.wait_until_ready(0.2)
