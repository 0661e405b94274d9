"""Choose the address that a service listens on: the loopback interface unless remote access is allowed."""

from __future__ import annotations

import ipaddress
import socket

from hyperagent.errors import ConfigError


def listening_ip(host: str, *, allow_remote: bool) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the IP address of `host`; if a name has several, return the first.

    Args:
        allow_remote: allow an address that other machines can reach.

    Raises:
        ConfigError: there is no such address, or other machines could reach it and that is not allowed.
    """
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4][0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"there is no address {host!r} to listen on: {error}; use 127.0.0.1") from error
    ip = ipaddress.ip_address(address)
    if not allow_remote and not ip.is_loopback:
        raise ConfigError(
            f"other machines can reach {host}, and traffic is not encrypted; "
            "listen on 127.0.0.1, or give --allow-remote on a private network"
        )
    return ip
