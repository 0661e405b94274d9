"""All errors of the project that a caller can meet, in one tree; in parentheses the built-in class each also is.

    HyperagentError
    ├── ConfigError            a setting, a recipe or a command line is wrong       (ValueError)
    ├── DataError              a data file, or something in it, cannot be used      (ValueError)
    │   ├── TooLong            a trajectory has more tokens than asked for          (ValueError)
    │   ├── MaskDisagreement   the two masks of a trajectory differ                 (ValueError)
    │   └── RowRefused         one trajectory cannot be used; the error names it    (ValueError)
    ├── IdentityMismatch       two artifacts do not belong together                 (ValueError)
    ├── InvalidRequest         the arguments of a request are wrong                 (ValueError)
    │   ├── LimitExceeded      a request is larger than the service allows          (ValueError)
    │   └── BeyondEnd          a stream is resumed behind its end                   (ValueError)
    ├── NotFound               no such adapter, run or record                       (LookupError)
    ├── Conflict               the thing is there, but its state forbids the request  (Exception)
    ├── CorruptRecord          stored bytes are not the bytes that were written     (ValueError)
    ├── StorageError           the disk refused: full, read-only, failing           (OSError)
    └── ServiceError           a service could not start or be reached              (RuntimeError)
        ├── Busy               it holds as many requests as it accepts              (RuntimeError)
        ├── NotServing         it is starting, shutting down or without its engine  (RuntimeError)
        └── EngineHangs        only a new process of the teacher helps              (RuntimeError)

A message says in one line what happened, why, and how to fix it. The edges of the system (command line, gRPC, HTTP)
translate the classes above and nothing else; any other exception is a defect and surfaces as one.
"""

from __future__ import annotations


class HyperagentError(Exception):
    """Base of every error that a person can fix, as opposed to a defect."""


class ConfigError(HyperagentError, ValueError):
    """A setting, a recipe or a command line is wrong."""


class DataError(HyperagentError, ValueError):
    """A data file, or something in it, cannot be used."""


class TooLong(DataError):
    """A trajectory has more tokens than asked for."""


class MaskDisagreement(DataError):
    """The two ways to find what the assistant wrote differ."""


class RowRefused(DataError):
    """One trajectory cannot be used.

    Attributes:
        trajectory_id: the row's own id, or its number if it has none.
        reason: why, without the id.
        kind: class of the error behind it, to count by.
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
    """A stream is resumed behind its end."""


class NotFound(HyperagentError, LookupError):
    """No such adapter, run or cache record."""


class Conflict(HyperagentError):
    """The thing exists but is not in a state that allows the request."""


class CorruptRecord(HyperagentError, ValueError):
    """Stored bytes fail their checksum or their format."""


class StorageError(HyperagentError, OSError):
    """The file system refused a write or a read."""

    # OSError would render two arguments as "[Errno ..]"; a StorageError is always one sentence.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ServiceError(HyperagentError, RuntimeError):
    """A service could not be started or reached."""


class Busy(ServiceError):
    """The service holds as many requests as it accepts at once; asking again later helps."""


class NotServing(ServiceError):
    """The service is starting or shutting down, or its engine has stopped; the request has not been carried out."""


class EngineHangs(ServiceError):
    """The teacher's engine hangs inside the teacher's own process and cannot be started again there."""
