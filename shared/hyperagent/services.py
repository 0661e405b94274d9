"""Define the three services: their names on the command line and their default addresses on this machine."""

from __future__ import annotations

from enum import StrEnum


class Service(StrEnum):
    """A service. Its value is its name in `hyperagent serve NAME`."""

    TEACHER = "teacher"
    TRAINER = "trainer"
    ADAPTER_API = "adapter-api"

    @property
    def default_port(self) -> int:
        """Port that the service listens on by default."""
        return _DEFAULT_PORTS[self]

    @property
    def default_address(self) -> str:
        """Default address on this machine: `host:port` for the teacher, which speaks gRPC, and a URL for the others."""
        address = f"127.0.0.1:{self.default_port}"
        return address if self is Service.TEACHER else f"http://{address}"


_DEFAULT_PORTS = {Service.TEACHER: 8701, Service.TRAINER: 8702, Service.ADAPTER_API: 8703}
