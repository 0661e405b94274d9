"""Clients of the REST services; problem details are raised as the errors that caused them.

A request is described once, as a `Call`, and sent by `ApiClient` or `AsyncApiClient`. The clients of the two services,
`run_client` and `adapter_client`, are built on them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from hyperagent.errors import ConfigError, HyperagentError, ServiceError
from hyperagent.http.problems import MEDIA_TYPE, Problem, error_of

_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 600.0
"""Generating an adapter for a long prompt takes minutes on a busy CPU, during which nothing is sent."""
_POLL_S = 0.1
_POLL_TIMEOUT_S = 2.0

_Answer = TypeVar("_Answer")
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class Call(Generic[_Answer]):
    """A request and the function that parses its response."""

    method: str
    path: str
    read: Callable[[bytes], _Answer]
    """Function that parses the response body; raises ValueError if the body is not as expected."""
    body: object = None
    """Request body, sent as JSON; None for no body."""
    query: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


def json_of(model: type[_Model]) -> Callable[[bytes], _Model]:
    """Return a `read` function for a JSON response of the given model."""
    return model.model_validate_json


_READY = Call("GET", "/readyz", bytes)


class _Connection:
    """Shared part of both clients: URL, token and interpretation of responses."""

    def __init__(self, base_url: str, token: str) -> None:
        """Set up the URL and the token; the token may be empty for `wait_until_ready`.

        Raises:
            ConfigError: `base_url` is not an http or https URL.
        """
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise ConfigError(
                f"{base_url!r} is not a valid address: {error}; use one like http://127.0.0.1:8703"
            ) from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"{base_url!r} is not a valid address; use one like http://127.0.0.1:8703")
        self._url = str(url).rstrip("/")
        self._options: dict[str, Any] = {
            "base_url": url,
            "headers": {"Authorization": f"Bearer {token}"} if token else {},
            "trust_env": False,  # A proxy from the environment must not see loopback traffic and its token.
        }

    @contextmanager
    def _transport_errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise ServiceError(
                f"nothing answers at {self._url} ({error}); "
                "start the service with `hyperagent serve`, or correct the address"
            ) from error
        except httpx.TimeoutException as error:
            raise ServiceError(f"{self._url} did not answer in time; look at its log, and try again") from error
        except httpx.TransportError as error:
            raise ServiceError(
                f"the connection to {self._url} failed: {error}; check that it is the right service, and its log"
            ) from error

    def _read(self, call: Call[_Answer], response: httpx.Response) -> _Answer:
        if not response.is_success:
            raise self._error(response)
        try:
            return call.read(response.content)
        except ValueError as error:
            raise ServiceError(
                f"{response.url} did not answer with the expected JSON; check that {self._url} is the right service "
                "and release"
            ) from error

    def _error(self, response: httpx.Response) -> HyperagentError:
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            return ConfigError(
                f"{self._url} does not accept this access token; set HYPERAGENT_TOKEN to the service's "
                "(it keeps its own in ~/.hyperagent/token)"
            )
        if response.headers.get("Content-Type", "") == MEDIA_TYPE:
            try:
                return error_of(Problem.model_validate_json(response.content))
            except ValidationError:
                pass
        return ServiceError(
            f"{response.url} answered {response.status_code} {response.reason_phrase}; "
            f"check that {self._url} is the right service"
        )


class ApiClient(_Connection):
    """Connection to one service; a context manager; not thread-safe.

    In addition to the errors it documents, every method raises the error that the service reported, and:
        ServiceError: nothing answers, or the server is not such a service.
        ConfigError: the service does not accept the token.
    """

    def __enter__(self) -> Self:
        self._client = httpx.Client(**self._options)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def send(self, call: Call[_Answer], *, timeout_s: float = _ANSWER_TIMEOUT_S) -> _Answer:
        """Send a request and return its parsed response."""
        with self._transport_errors():
            response = self._client.send(_build(self._client, call, timeout_s))
        return self._read(call, response)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the service reports that it is ready.

        Raises:
            ServiceError: it was not ready within `timeout_s` seconds.
        """
        waiting = _Waiting(self._url, timeout_s)
        while True:
            try:
                self.send(_READY, timeout_s=waiting.attempt_timeout_s())
            except HyperagentError as error:
                waiting.require_time_left(error)
                time.sleep(_POLL_S)
            else:
                return


class AsyncApiClient(_Connection):
    """Asynchronous version of `ApiClient`; an async context manager."""

    async def __aenter__(self) -> Self:
        self._client = httpx.AsyncClient(**self._options)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def send(self, call: Call[_Answer], *, timeout_s: float = _ANSWER_TIMEOUT_S) -> _Answer:
        """Send a request and return its parsed response."""
        with self._transport_errors():
            response = await self._client.send(_build(self._client, call, timeout_s))
        return self._read(call, response)

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the service reports that it is ready.

        Raises:
            ServiceError: it was not ready within `timeout_s` seconds.
        """
        waiting = _Waiting(self._url, timeout_s)
        while True:
            try:
                await self.send(_READY, timeout_s=waiting.attempt_timeout_s())
            except HyperagentError as error:
                waiting.require_time_left(error)
                await asyncio.sleep(_POLL_S)
            else:
                return


class _Waiting:
    """Deadline for a service to become ready."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s

    def attempt_timeout_s(self) -> float:
        """Return the timeout in seconds of the next attempt."""
        self._left_s = self._deadline - time.monotonic()
        return min(max(self._left_s, _POLL_S), _POLL_TIMEOUT_S)

    def require_time_left(self, error: HyperagentError) -> None:
        """Raise ServiceError with the last attempt's error as the reason if no time is left for another one."""
        if self._left_s <= _POLL_S:
            raise ServiceError(f"{self._url} was not ready within {self._timeout_s:g} s: {error}") from error


def _build(client: httpx.Client | httpx.AsyncClient, call: Call[Any], timeout_s: float) -> httpx.Request:
    return client.build_request(
        call.method,
        call.path,
        json=call.body,
        params=dict(call.query) or None,
        headers=dict(call.headers),
        timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S)),
    )
