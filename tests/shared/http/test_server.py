"""Tests of serving on a real port in a separate process."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from hyperagent.errors import ConfigError, Conflict, LimitExceeded, NotFound, ServiceError
from hyperagent.http.client import ApiClient, Call
from hyperagent.http.server import listening

SERVICE = Path(__file__).parents[1] / "http_service.py"
HEADERS = {"Authorization": "Bearer secret"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def service() -> Iterator[tuple[subprocess.Popen[str], str]]:
    port = free_port()
    process = subprocess.Popen([sys.executable, str(SERVICE), str(port)], stderr=subprocess.PIPE, text=True)
    try:
        with ApiClient(f"http://127.0.0.1:{port}", "") as client:
            client.wait_until_ready(30)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with service() as (_, url):
        yield url


async def test_answers_are_sent_at_once() -> None:
    """asyncio, on which uvicorn runs, must find a socket on which it disables Nagle's algorithm."""
    delays: asyncio.Queue[int] = asyncio.Queue()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted: socket.socket = writer.get_extra_info("socket")
        delays.put_nowait(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    port = free_port()
    with listening(host="127.0.0.1", port=port, allow_remote=False) as listener:
        server = await asyncio.start_server(answer, sock=listener)
        async with server:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await delays.get() == 1
            writer.close()


def test_the_client_speaks_to_a_real_service(url: str) -> None:
    with ApiClient(url + "/", "secret") as client:
        assert client.send(Call("POST", "/length", json.loads, body={"a": 1})) == {"length": 7}
        assert b"hyperagent_http_requests_total" in client.send(Call("GET", "/metrics", bytes))
        with pytest.raises(Conflict, match=r"^the run is not stopped; stop it first$"):
            client.send(Call("GET", "/conflict", json.loads))
        with pytest.raises(NotFound, match="/nothing"):
            client.send(Call("GET", "/nothing", json.loads))
        with pytest.raises(LimitExceeded, match="1000 bytes"):
            client.send(Call("POST", "/length", json.loads, body="x" * 5_000_000))
    with ApiClient(url, "wrong") as client, pytest.raises(ConfigError, match="HYPERAGENT_TOKEN"):
        client.send(Call("GET", "/conflict", json.loads))


def test_a_long_upload_of_unsaid_length_gets_its_413(url: str) -> None:
    chunks = (b"x" * 65_536 for _ in range(320))
    with httpx.Client(base_url=url, headers=HEADERS, trust_env=False) as client:
        answer = client.post("/length", content=chunks)
        assert (answer.status_code, answer.json()["status"]) == (413, 413)
        assert client.post("/length", content=b"1234").json() == {"length": 4}


def test_a_rebound_name_does_not_reach_a_loopback_service(url: str) -> None:
    with httpx.Client(base_url=url, headers=HEADERS, trust_env=False) as client:
        answer = client.get("/conflict", headers={"Host": "evil.example"})
        assert answer.status_code == 421
        assert "server" not in answer.headers
        port = httpx.URL(url).port
        assert client.get("/healthz", headers={"Host": f"localhost:{port}"}).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_request_in_progress_end(number: int) -> None:
    answers: list[httpx.Response] = []
    with service() as (process, url):
        asked = threading.Thread(
            target=lambda: answers.append(httpx.get(f"{url}/slow", headers=HEADERS, trust_env=False))
        )
        asked.start()
        assert process.stderr is not None
        while "slow has begun" not in process.stderr.readline():
            pass
        process.send_signal(number)
        asked.join(20)
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert answers[0].json() == {"slow": "done"}
    assert "Traceback" not in log


def test_a_taken_port_is_one_line_before_anything_starts(url: str) -> None:
    port = httpx.URL(url).port
    assert port is not None

    with (
        pytest.raises(ServiceError, match=rf"127\.0\.0\.1:{port}: the port is taken; .*--port") as refused,
        listening(host="127.0.0.1", port=port, allow_remote=False),
    ):
        pytest.fail("the port was had twice")
    assert "\n" not in str(refused.value)


def test_a_port_is_held_from_the_start() -> None:
    with listening(host="localhost", port=0, allow_remote=False) as first:
        port = first.getsockname()[1]
        with pytest.raises(ServiceError, match="taken"), listening(host="localhost", port=port, allow_remote=False):
            pass
    with listening(host="localhost", port=port, allow_remote=False):
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_need_permission(host: str) -> None:
    with (
        pytest.raises(ConfigError, match="--allow-remote") as refused,
        listening(host=host, port=0, allow_remote=False),
    ):
        pass
    assert "\n" not in str(refused.value)


def test_with_permission_every_address_is_listened_on() -> None:
    with listening(host="0.0.0.0", port=0, allow_remote=True) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_an_unknown_host_is_a_configuration_error() -> None:
    for host in ("no-such-host.invalid", "x" * 64):
        with pytest.raises(ConfigError, match=host), listening(host=host, port=0, allow_remote=True):
            pass
    with (
        pytest.raises(ServiceError, match="not this machine's"),
        listening(host="192.0.2.1", port=0, allow_remote=True),
    ):
        pass


def test_a_signal_while_the_application_loads_ends_cleanly() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, listening(host="127.0.0.1", port=0, allow_remote=False):
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_application_that_cannot_start_does_not_seem_to_have_run() -> None:
    code = (
        "from contextlib import asynccontextmanager\n"
        "from fastapi import FastAPI\n"
        "from hyperagent.http.server import listening, run\n"
        "@asynccontextmanager\n"
        "async def lifespan(app):\n"
        "    raise RuntimeError('cannot start')\n"
        "    yield\n"
        "with listening(host='127.0.0.1', port=0, allow_remote=False) as listener:\n"
        "    run(FastAPI(lifespan=lifespan), listener)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode != 0
    assert "cannot start" in process.stderr
