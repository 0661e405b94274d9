"""Define all errors that callers of the project can get, in one tree. Each also has the built-in base in parentheses.

    HyperagentError
    ├── ConfigError            a setting, a recipe or a command line is wrong       (ValueError)
    ├── DataError              a data file, or something in it, cannot be used      (ValueError)
    │   ├── TooLong            a trajectory has more tokens than the limit          (ValueError)
    │   ├── MaskDisagreement   the two masks of a trajectory differ                 (ValueError)
    │   └── RowRefused         one trajectory cannot be used; the error names it    (ValueError)
    ├── IdentityMismatch       two artifacts do not belong together                 (ValueError)
    ├── InvalidRequest         the arguments of a request are wrong                 (ValueError)
    │   ├── LimitExceeded      a request is larger than the service allows          (ValueError)
    │   └── BeyondEnd          a stream is resumed after its end                    (ValueError)
    ├── NotFound               no such adapter, run or record                       (LookupError)
    ├── Conflict               the object exists, but its state forbids the request  (Exception)
    ├── CorruptRecord          stored bytes are not the bytes that were written     (ValueError)
    ├── StorageError           the file system refused: full, read-only, failing    (OSError)
    └── ServiceError           a service could not start or be reached              (RuntimeError)
        ├── Busy               the service holds as many requests as it accepts     (RuntimeError)
        ├── NotServing         it is starting, shutting down or has no engine       (RuntimeError)
        └── EngineHangs        the teacher needs a new process                      (RuntimeError)

A message says in one line what happened, why, and how to fix it. The command line, gRPC and HTTP translate only the
classes above; any other exception is a defect and is reported as one.
"""

from __future__ import annotations


class HyperagentError(Exception):
    """Base of every error that the user can fix, as opposed to a defect."""


class ConfigError(HyperagentError, ValueError):
    """A setting, a recipe or a command line is wrong."""


class DataError(HyperagentError, ValueError):
    """A data file, or something in it, cannot be used."""


class TooLong(DataError):
    """A trajectory has more tokens than the limit."""


class MaskDisagreement(DataError):
    """The two masks of the assistant's tokens in a trajectory differ."""


class RowRefused(DataError):
    """One trajectory cannot be used.

    Attributes:
        trajectory_id: the row's own id, or its number if it has none.
        reason: why the trajectory cannot be used, without the id.
        kind: class of the underlying error, used for counting.
    """

    def __init__(self, trajectory_id: str, reason: str, kind: type[DataError] = DataError) -> None:
        super().__init__(trajectory_id, reason, kind)
        self.trajectory_id = trajectory_id
        self.reason = reason
        self.kind = kind

    def __str__(self) -> str:
        return f"trajectory {self.trajectory_id!r}: {self.reason}"


class IdentityMismatch(HyperagentError, ValueError):
    """Two artifacts were made for different models, tokenizers or settings."""


class InvalidRequest(HyperagentError, ValueError):
    """The arguments of a request are wrong."""


class LimitExceeded(InvalidRequest):
    """A request is larger than the service allows."""


class BeyondEnd(InvalidRequest):
    """A stream is resumed after its end."""


class NotFound(HyperagentError, LookupError):
    """There is no such adapter, run or cache record."""


class Conflict(HyperagentError):
    """The thing exists but is not in a state that allows the request."""


class CorruptRecord(HyperagentError, ValueError):
    """Stored bytes do not match their checksum or their format."""


class StorageError(HyperagentError, OSError):
    """The file system refused a write or a read."""

    # OSError renders two arguments as "[Errno ..]"; a StorageError always has one sentence.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ServiceError(HyperagentError, RuntimeError):
    """A service could not be started or reached."""


class Busy(ServiceError):
    """The service holds as many requests as it accepts at once; a later retry helps.

    Attributes:
        retry_after_s: seconds after which a retry is likely to be accepted.
    """

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotServing(ServiceError):
    """The service is starting or shutting down, or its engine has stopped; the request was not carried out."""


class EngineHangs(ServiceError):
    """The teacher's engine hangs inside the teacher's own process and cannot be restarted there."""
