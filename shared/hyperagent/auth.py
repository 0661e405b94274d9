"""Read, create and check the bearer token that all services require.

`HYPERAGENT_TOKEN` takes precedence. Otherwise the token is read from a file (`HYPERAGENT_TOKEN_FILE`, by default
`~/.hyperagent/token`), which the first service to start creates, readable by its owner only. On one machine nothing has
to be configured; in a deployment every container gets the same secret file.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import tempfile
from pathlib import Path

from hyperagent.errors import ConfigError

BEARER = "Bearer "


def token_file() -> Path:
    """Return the path of the token's file.

    Raises:
        ConfigError: it is not set, and there is no home directory to keep it in.
    """
    if chosen := os.environ.get("HYPERAGENT_TOKEN_FILE"):
        return Path(chosen).expanduser()
    try:
        return Path.home() / ".hyperagent" / "token"
    except RuntimeError:
        raise ConfigError(
            "there is no home directory to keep the access token in; set HYPERAGENT_TOKEN, HYPERAGENT_TOKEN_FILE or HOME"
        ) from None


def read_token() -> str:
    """Return the token that a client sends.

    Raises:
        ConfigError: there is no token, it cannot be read, or a request cannot carry it.
    """
    token, source = os.environ.get("HYPERAGENT_TOKEN", "").strip(), "HYPERAGENT_TOKEN"
    if not token:
        token, source = _read_token_file(), str(token_file())
    if token and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigError(
            f"the access token in {source} has characters that a request cannot carry; use letters, digits and -_.~+/ only"
        )
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
    if not os.environ.get("HYPERAGENT_TOKEN", "").strip() and not token_file().exists():
        try:
            _make_token_file()
        except OSError as error:
            raise ConfigError(
                f"cannot create {token_file()}: {error.strerror}; set HYPERAGENT_TOKEN, or HYPERAGENT_TOKEN_FILE to a "
                "writable path"
            ) from error
    return read_token()


def _read_token_file() -> str:
    """Return the token in the file, which may begin with the mark that some editors write; "" without a file."""
    try:
        return token_file().read_bytes().decode("utf-8-sig").strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except UnicodeDecodeError:
        raise ConfigError(f"{token_file()} is not text in UTF-8; write the access token into it again") from None
    except OSError as error:
        raise ConfigError(
            f"cannot read the access token in {token_file()}: {error.strerror}; run as its owner, or set HYPERAGENT_TOKEN"
        ) from error


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
