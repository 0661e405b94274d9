"""Calling one of the REST services; its problems come back as the errors they were raised as."""

from __future__ import annotations

import time
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

import httpx
from pydantic import ValidationError

from hyperagent.errors import ConfigError, HyperagentError, ServiceError
from hyperagent.http.problems import MEDIA_TYPE, Problem, error_of

_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 600.0
"""Making an adapter of a long prompt takes minutes on a busy CPU, and nothing is sent meanwhile."""
_POLL_S = 0.1
_POLL_TIMEOUT_S = 2.0


class ApiClient:
    """A connection to one service; a context manager, for one thread.

    Every method raises, besides the errors it names, what the service answered with, and:
        ServiceError: nothing answers, or what answers is no such service.
        ConfigError: the service does not know the token.
    """

    def __init__(self, base_url: str, token: str) -> None:
        """Remember where the service is; `token` may be empty for `wait_until_ready`.

        Raises:
            ConfigError: the address is not an http or https URL.
        """
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{base_url!r} is not an address: {error}; use one like http://127.0.0.1:8703") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"{base_url!r} is not an address; use one like http://127.0.0.1:8703")
        self._url = str(url).rstrip("/")
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            trust_env=False,  # a proxy named in the environment must not see loopback traffic and its token
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def get_json(self, path: str) -> Any:
        """The JSON value at `path`."""
        return self._json(self._send("GET", path))

    def post_json(self, path: str, body: object) -> Any:
        """Send a JSON value; returns the one answered."""
        return self._json(self._send("POST", path, body=body))

    def get_bytes(self, path: str) -> bytes:
        """The content at `path`."""
        return self._send("GET", path).content

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return once the service says that it is ready.

        Raises:
            ServiceError: it was not within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            remaining_s = deadline - time.monotonic()
            try:
                self._send("GET", "/readyz", timeout_s=min(max(remaining_s, _POLL_S), _POLL_TIMEOUT_S))
            except HyperagentError as error:
                if remaining_s <= _POLL_S:
                    raise ServiceError(f"{self._url} was not ready within {timeout_s:g} s: {error}") from error
                time.sleep(_POLL_S)
            else:
                return

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise ServiceError(
                f"{response.url} answered something that is not JSON; check that {self._url} is the right service"
            ) from error

    def _send(
        self, method: str, path: str, *, body: object = None, timeout_s: float = _ANSWER_TIMEOUT_S
    ) -> httpx.Response:
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))
        try:
            response = self._client.request(method, path, json=body, timeout=timeout)
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
        if response.is_success:
            return response
        raise self._error(response)

    def _error(self, response: httpx.Response) -> HyperagentError:
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            return ConfigError(
                f"{self._url} does not know this access token; set HYPERAGENT_TOKEN to the service's "
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
