"""Read certificates and keys from PEM files."""

from __future__ import annotations

from pathlib import Path

from hyperagent.errors import ConfigError


def read_pem(path: Path) -> bytes:
    """Return the content of a PEM file (RFC 7468).

    Raises:
        ConfigError: the file cannot be read or is not PEM.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a PEM file") from error
    if b"-----BEGIN " not in content:
        raise ConfigError(f"{path} is not a PEM file; give one that begins with -----BEGIN")
    return content
