"""Tests of the common REST application without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated

import httpx
import pytest
from fastapi import Query
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict

from hyperagent.errors import (
    Busy,
    ConfigError,
    Conflict,
    CorruptRecord,
    DataError,
    HyperagentError,
    IdentityMismatch,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    ServiceError,
    StorageError,
)
from hyperagent.http.app import create_app
from hyperagent.http.middleware import RequireHost
from hyperagent.http.problems import Problem, error_of

TOKEN = "secret"
MAX_BODY_BYTES = 2000

STATUSES = {
    NotFound: 404,
    Conflict: 409,
    IdentityMismatch: 409,
    LimitExceeded: 413,
    InvalidRequest: 422,
    ConfigError: 422,
    CorruptRecord: 500,
    ServiceError: 500,
    DataError: 500,
    Busy: 429,
    StorageError: 507,
}


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    prompt: str
    count: int = 0


class Raiser:
    """Holder of the error that the route /raise raises."""

    error: Exception


@pytest.fixture
def raiser() -> Raiser:
    return Raiser()


@pytest.fixture
def client(raiser: Raiser) -> Iterator[TestClient]:
    app = create_app(title="test", version="1", token=TOKEN, max_body_bytes=MAX_BODY_BYTES)

    @app.get("/raise")
    def raise_error() -> None:
        raise raiser.error

    @app.get("/raise/{name}")
    def get_named(name: str) -> str:
        return name

    @app.delete("/raise/{name}")
    def delete_named(name: str) -> str:
        return name

    @app.post("/things/{name}")
    def post_thing(name: str, body: Body, limit: Annotated[int, Query(ge=1)] = 1) -> dict[str, int]:
        return {"length": len(body.prompt)}

    with TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"}, raise_server_exceptions=False) as client:
        yield client


def problem_in(answer: object) -> dict[str, object]:
    """Return the response's problem details after checking the properties common to all of them."""
    assert answer.headers["Content-Type"] == "application/problem+json"  # type: ignore[attr-defined]
    problem: dict[str, object] = answer.json()  # type: ignore[attr-defined]
    assert set(problem) == {"type", "title", "status", "detail", "instance"}
    assert problem["status"] == answer.status_code  # type: ignore[attr-defined]
    assert isinstance(problem["detail"], str)
    assert "\n" not in problem["detail"]
    assert 10 < len(problem["detail"]) < 1200
    return problem


@pytest.mark.parametrize(("kind", "status"), STATUSES.items(), ids=lambda value: getattr(value, "__name__", str(value)))
def test_each_error_has_its_status_and_comes_back_as_itself(
    client: TestClient, raiser: Raiser, kind: type[HyperagentError], status: int
) -> None:
    raiser.error = kind("what happened, why,\nhow to fix it")
    answer = client.get("/raise")
    assert answer.status_code == status
    problem = problem_in(answer)
    assert problem["detail"] == "what happened, why, how to fix it"
    assert problem["instance"] == "/raise"
    back = error_of(Problem.model_validate(problem))
    assert type(back) is (ServiceError if kind is DataError else kind)
    assert str(back) == problem["detail"]
    assert ("Retry-After" in answer.headers) == (kind is Busy)


def test_a_defect_tells_nothing_of_itself(client: TestClient, raiser: Raiser) -> None:
    raiser.error = KeyError("internal name")
    answer = client.get("/raise")
    assert answer.status_code == 500
    assert "internal name" not in json.dumps(problem_in(answer))


def test_unknown_paths_and_methods_are_problems(client: TestClient) -> None:
    missing = client.get("/nothing/here")
    assert missing.status_code == 404
    assert "/nothing/here" in str(problem_in(missing)["detail"])
    wrong = client.get("/things/a")
    assert wrong.status_code == 405
    assert wrong.headers["Allow"] == "POST"
    assert client.put("/raise/a").headers["Allow"] == "DELETE, GET"
    problem_in(wrong)
    assert client.post("/things/a/", json={"prompt": "x"}).status_code == 404
    assert client.get("/docs").status_code == 404
    assert client.get("/openapi.json").json()["info"]["title"] == "test"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"count": 1}', "body.prompt"),
        ('{"prompt": 7}', "body.prompt"),
        ('{"prompt": "x", "count": "many"}', "body.count"),
        ('{"prompt": "x", "extra": 1}', "body.extra"),
        ('{"prompt": ', "body"),
        ("[]", "body"),
        ("", "body"),
    ],
)
def test_a_wrong_body_names_its_fields(client: TestClient, content: str, named: str) -> None:
    answer = client.post("/things/a", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert named in str(problem_in(answer)["detail"])


def test_a_wrong_query_is_named(client: TestClient) -> None:
    answer = client.post("/things/a?limit=0", json={"prompt": "x"})
    assert answer.status_code == 422
    assert "query.limit" in str(problem_in(answer)["detail"])


@pytest.mark.parametrize(
    "body",
    [{"prompt": ["secret-input" * 100]}, {"secret-input" * 100: 1}, {f"f{i}": "secret-input" for i in range(50)}],
    ids=["value", "name", "many"],
)
def test_what_a_caller_sent_is_not_sent_back_at_length(client: TestClient, body: dict[str, object]) -> None:
    answer = client.post("/things/a", json=body)
    assert answer.status_code == 422
    assert len(answer.content) < 1000
    assert len(client.get("/" + "x" * 5000).content) < 1000


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"\xff\xfe", 400), (b"[" * 1500, 400), (b'{"prompt": NaN}', 422)],
    ids=["not UTF-8", "deep", "NaN"],
)
def test_a_body_that_is_no_json_is_refused(client: TestClient, content: bytes, status: int) -> None:
    answer = client.post("/things/a", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (status, 422)
    problem_in(answer)


def test_a_body_up_to_the_limit_is_read(client: TestClient) -> None:
    room = MAX_BODY_BYTES - len(json.dumps({"prompt": ""}))
    content = json.dumps({"prompt": "x" * room}).encode()
    assert len(content) == MAX_BODY_BYTES
    headers = {"Content-Type": "application/json"}
    assert client.post("/things/a", content=content, headers=headers).json() == {"length": room}

    over = client.post("/things/a", content=content + b" ", headers=headers)
    assert over.status_code == 413
    assert str(MAX_BODY_BYTES) in str(problem_in(over)["detail"])


async def test_a_body_of_unsaid_length_is_cut_off(client: TestClient) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 100
            yield b"x" * 100

    # Starlette's test client would collect the whole body first.
    transport = httpx.ASGITransport(client.app)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as streaming:
        answer = await streaming.post("/things/a", content=chunks())
    assert answer.status_code == 413
    assert sent == MAX_BODY_BYTES + 100
    assert isinstance(error_of(Problem.model_validate(problem_in(answer))), LimitExceeded)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic c2VjcmV0"])
def test_only_health_is_told_without_the_token(client: TestClient, header: str | None) -> None:
    del client.headers["Authorization"]
    headers = {} if header is None else {"Authorization": header}
    for method, path in (
        ("GET", "/raise"),
        ("POST", "/things/a"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/nothing"),
        ("GET", "/healthz/../raise"),
        ("GET", "//healthz"),
    ):
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == 401, path
        assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
        problem_in(answer)
    assert client.get("/healthz", headers=headers).json() == {"status": "ok"}
    assert client.get("/readyz", headers=headers).json() == {"status": "ok"}


async def test_the_body_of_a_stranger_is_not_read(client: TestClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://test") as stranger:
        assert (await stranger.post("/things/a", content=chunks())).status_code == 401


def test_metrics_count_by_route_template(client: TestClient, raiser: Raiser) -> None:
    raiser.error = NotFound("there is no such thing; make one")
    for name in ("a", "b", "c"):
        client.post(f"/things/{name}", json={"prompt": "x"})
    client.get("/raise")
    client.get("/nothing/here")
    client.request("BREW", "/nothing/here")
    lines = client.get("/metrics").text.splitlines()
    assert 'hyperagent_http_requests_total{method="POST",route="/things/{name}",status="200"} 3.0' in lines
    assert 'hyperagent_http_requests_total{method="GET",route="/raise",status="404"} 1.0' in lines
    assert 'hyperagent_http_requests_total{method="GET",route="unmatched",status="404"} 1.0' in lines
    assert 'hyperagent_http_requests_total{method="other",route="unmatched",status="404"} 1.0' in lines
    assert 'hyperagent_http_request_seconds_count{method="POST",route="/things/{name}"} 3.0' in lines


@pytest.mark.parametrize(
    ("host", "on_loopback", "on_network"),
    [
        ("localhost", 200, 200),
        ("LOCALHOST:8703", 200, 200),
        ("127.0.0.1:8703", 200, 200),
        ("[::1]:8703", 200, 200),
        ("adapters.internal:8703", 200, 200),
        ("192.168.1.5:8703", 421, 200),
        ("evil.example", 421, 421),
        ("127.0.0.1.evil.example", 421, 421),
        ("localhost.evil.example:8703", 421, 421),
        ("[evil", 421, 421),
        ("", 421, 421),
    ],
)
def test_only_its_own_names_reach_a_service(host: str, on_loopback: int, on_network: int) -> None:
    app = create_app(title="test", version="1", token=TOKEN)
    for any_address, status in ((False, on_loopback), (True, on_network)):
        guarded = RequireHost(app, any_address=any_address, names=["Adapters.internal"])
        with TestClient(guarded) as client:
            answer = client.get("/healthz", headers={"Host": host})
        assert answer.status_code == status
        if status == 421:
            problem_in(answer)


def test_a_client_needs_no_server_and_neither_needs_torch(tmp_path: Path) -> None:
    for module, heavy in (
        ("hyperagent.http.client", ("torch", "transformers", "grpc", "fastapi", "uvicorn")),
        ("hyperagent.http.server", ("torch", "transformers", "grpc")),
        ("hyperagent.http.app", ("torch", "transformers", "grpc")),
    ):
        check = f"import sys, {module}; sys.exit([name for name in {heavy!r} if name in sys.modules] or 0)"
        subprocess.run([sys.executable, "-c", check], check=True)
