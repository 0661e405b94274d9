"""The one table between the project's errors and gRPC's status codes.

Codes follow https://grpc.io/docs/guides/status-codes/: what a caller may simply try again later is
UNAVAILABLE or RESOURCE_EXHAUSTED, and nothing else is.
"""

from __future__ import annotations

import grpc

from hyperagent.errors import (
    ConfigError,
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


class Busy(LimitExceeded):
    """The service holds as many requests as it accepts at once."""


class NotServing(ServiceError):
    """The service is starting or shutting down."""


# The first class that fits decides, so a class stands before its base.
_CODE_OF_ERROR: tuple[tuple[type[HyperagentError], grpc.StatusCode], ...] = (
    (Busy, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NotServing, grpc.StatusCode.UNAVAILABLE),
    (LimitExceeded, grpc.StatusCode.OUT_OF_RANGE),
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (DataError, grpc.StatusCode.INVALID_ARGUMENT),
    (IdentityMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (CorruptRecord, grpc.StatusCode.DATA_LOSS),
    (StorageError, grpc.StatusCode.ABORTED),
    (HyperagentError, grpc.StatusCode.INTERNAL),
)

# What grpc.aio says, in place of the real status, when a call ends while a message is being sent (grpc/grpc#36066).
_BROKEN_OFF = "Internal error from Core"

_ERROR_OF_CODE: dict[grpc.StatusCode, type[HyperagentError]] = {
    # gRPC itself answers RESOURCE_EXHAUSTED too, for a message that is too large.
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitExceeded,
    grpc.StatusCode.OUT_OF_RANGE: LimitExceeded,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: IdentityMismatch,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.DATA_LOSS: CorruptRecord,
    grpc.StatusCode.ABORTED: StorageError,
    grpc.StatusCode.INTERNAL: ServiceError,
}


def status_code(error: HyperagentError) -> grpc.StatusCode:
    """The code that tells a caller of `error`."""
    return next(code for kind, code in _CODE_OF_ERROR if isinstance(error, kind))


def to_domain_error(error: grpc.aio.AioRpcError, address: str) -> HyperagentError:
    """The error that a teacher's answer, or its silence, stands for."""
    code, details = error.code(), " ".join((error.details() or "").split())
    if code is grpc.StatusCode.UNAVAILABLE:
        return no_answer(address, details)
    if details == _BROKEN_OFF:
        return no_answer(address, "the connection broke off")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return ConfigError(
            f"the teacher at {address} does not know this access token; set HYPERAGENT_TOKEN to the teacher's "
            "(it keeps its own in ~/.hyperagent/token)"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ServiceError(f"the teacher at {address} did not finish in time; give the call a longer timeout")
    if kind := _ERROR_OF_CODE.get(code):
        return kind(details)
    return ServiceError(f"the teacher at {address} failed with {code.name}: {details}; its log says more")


def no_answer(address: str, reason: str) -> ServiceError:
    """The error of a teacher that cannot be reached or is not ready."""
    return ServiceError(
        f"no teacher answers at {address} ({reason}); start one with `hyperagent serve teacher`, "
        "or wait if it is starting"
    )
