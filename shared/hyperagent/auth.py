"""Read, create and check the bearer token that all services require.

`HYPERAGENT_TOKEN` takes precedence. Otherwise the token is read from a file (`HYPERAGENT_TOKEN_FILE`, by default
`~/.hyperagent/token`), which the first service to start creates, readable by its owner only. On one machine nothing has
to be configured; in a deployment every container gets the same secret file.
"""

from __future__ import annotations

import hmac
import os
import secrets
import tempfile
from pathlib import Path

from hyperagent.errors import ConfigError

BEARER = "Bearer "


def token_file() -> Path:
    return Path(os.environ.get("HYPERAGENT_TOKEN_FILE") or Path.home() / ".hyperagent" / "token")


def read_token() -> str:
    """Return the token that a client sends.

    Raises:
        ConfigError: there is no token.
    """
    token = os.environ.get("HYPERAGENT_TOKEN", "").strip()
    if not token and token_file().is_file():
        token = token_file().read_text(encoding="ascii").strip()
    if not token:
        raise ConfigError(
            f"there is no access token: start a service on this machine, or set HYPERAGENT_TOKEN (looked in {token_file()})"
        )
    return token


def ensure_token() -> str:
    """Return the token that a service requires, and create its file if there is none.

    Raises:
        ConfigError: the file cannot be created.
    """
    if not os.environ.get("HYPERAGENT_TOKEN", "").strip() and not token_file().is_file():
        try:
            _make_token_file()
        except OSError as error:
            raise ConfigError(
                f"cannot create {token_file()}: {error.strerror}; set HYPERAGENT_TOKEN, or HYPERAGENT_TOKEN_FILE to a "
                "writable path"
            ) from error
    return read_token()


def _make_token_file() -> None:
    token_file().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(dir=token_file().parent)  # mode 0600
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    try:
        # link(2) fails where rename(2) would replace, so two services that start at once end up with the same token.
        os.link(temporary, token_file())
    except FileExistsError:
        pass
    finally:
        Path(temporary).unlink()


def is_authorized(header: str | None, token: str) -> bool:
    """Return whether an `Authorization` header carries the token (RFC 6750), compared in constant time."""
    # The scheme's case does not matter (RFC 9110, section 11.1).
    if header is None or header[: len(BEARER)].lower() != BEARER.lower():
        return False
    return hmac.compare_digest(header[len(BEARER) :].encode(), token.encode())
