"""Convert between the project's errors and gRPC status codes.

Codes follow https://grpc.io/docs/guides/status-codes/. A refusal also carries google.rpc.ErrorInfo, whose reason is
machine-readable, and google.rpc.RetryInfo if and only if retrying later can succeed (https://google.aip.dev/193; the
`grpc-status-details-bin` trailer).
"""

from __future__ import annotations

from typing import NamedTuple

import grpc
from google.protobuf.any_pb2 import Any as PackedMessage
from google.rpc import error_details_pb2, status_pb2

from hyperagent.errors import (
    BeyondEnd,
    Busy,
    ConfigError,
    CorruptRecord,
    DataError,
    HyperagentError,
    IdentityMismatch,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    NotServing,
    ServiceError,
    StorageError,
)


class _Answer(NamedTuple):
    error: type[HyperagentError]
    code: grpc.StatusCode
    reason: str
    retry_after_s: float | None = None


# The first matching class is used, so a class precedes its base.
_ANSWERS = (
    _Answer(Busy, grpc.StatusCode.RESOURCE_EXHAUSTED, "BUSY", 1.0),
    _Answer(NotServing, grpc.StatusCode.UNAVAILABLE, "NOT_SERVING", 2.0),
    # gRPC itself answers RESOURCE_EXHAUSTED for a message that is too large.
    _Answer(LimitExceeded, grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE"),
    _Answer(BeyondEnd, grpc.StatusCode.OUT_OF_RANGE, "BEYOND_END"),
    _Answer(InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    _Answer(DataError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_DATA"),
    _Answer(IdentityMismatch, grpc.StatusCode.FAILED_PRECONDITION, "IDENTITY_MISMATCH"),
    _Answer(NotFound, grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    _Answer(CorruptRecord, grpc.StatusCode.DATA_LOSS, "DAMAGED"),
    _Answer(StorageError, grpc.StatusCode.ABORTED, "STORAGE_REFUSED"),
    _Answer(ServiceError, grpc.StatusCode.INTERNAL, "FAILED"),
    _Answer(HyperagentError, grpc.StatusCode.INTERNAL, "FAILED"),
)

DOMAIN = "hyperagent"
_DETAILS = "grpc-status-details-bin"

# grpc.aio reports this instead of the real status if a call ends while a message is being sent (grpc/grpc#36066).
_BROKEN_OFF = "Internal error from Core"

_ERROR_OF_CODE: dict[grpc.StatusCode, type[HyperagentError]] = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitExceeded,
    grpc.StatusCode.OUT_OF_RANGE: BeyondEnd,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: IdentityMismatch,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.DATA_LOSS: CorruptRecord,
    grpc.StatusCode.ABORTED: StorageError,
    grpc.StatusCode.INTERNAL: ServiceError,
}


def refusal(error: HyperagentError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Return the status code, message and trailing metadata that report `error` to a caller."""
    answer = next(answer for answer in _ANSWERS if isinstance(error, answer.error))
    return answer.code, str(error), rich_details(answer.code, str(error), answer.reason, answer.retry_after_s)


def rich_details(
    code: grpc.StatusCode, message: str, reason: str, retry_after_s: float | None = None
) -> tuple[tuple[str, bytes], ...]:
    """Return trailing metadata with google.rpc.Status, in the format of grpcio-status."""
    status = status_pb2.Status(code=code.value[0], message=message)
    _pack(status, error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(retry_after_s * 1000))
        _pack(status, retry)
    return ((_DETAILS, status.SerializeToString()),)


def _pack(status: status_pb2.Status, detail: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> None:
    packed = PackedMessage()
    packed.Pack(detail)
    status.details.append(packed)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Return the reason in a refusal's details, or "" if they have none of this project's domain."""
    trailers = dict(list(error.trailing_metadata() or ()))
    info = error_details_pb2.ErrorInfo()
    for detail in status_pb2.Status.FromString(trailers.get(_DETAILS, b"")).details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            return str(info.reason)
    return ""


def to_domain_error(error: grpc.aio.AioRpcError, address: str) -> HyperagentError:
    """Convert a failed call to the teacher at `address` to the project's error."""
    code, details, reason = error.code(), " ".join((error.details() or "").split()), reason_of(error)
    if reason == "NOT_SERVING":
        return NotServing(details)
    if reason == "BUSY":
        return Busy(details)
    if code is grpc.StatusCode.UNAVAILABLE:
        return no_answer(address, details)
    if details == _BROKEN_OFF:
        return no_answer(address, "the connection broke off")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return ConfigError(
            f"the teacher at {address} rejects this access token; set HYPERAGENT_TOKEN to the teacher's token "
            "(stored in ~/.hyperagent/token on its machine)"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ServiceError(f"the teacher at {address} did not finish in time; give the call a longer timeout")
    if kind := _ERROR_OF_CODE.get(code):
        return kind(details)
    return ServiceError(f"the teacher at {address} failed with {code.name}: {details}; see its log")


def no_answer(address: str, reason: str) -> ServiceError:
    """Return the error for a teacher that cannot be reached or is not ready."""
    return ServiceError(
        f"no teacher answers at {address} ({reason}); start one with `hyperagent serve teacher`, "
        "or wait if it is starting"
    )
