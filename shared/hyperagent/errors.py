"""Every error a caller can meet, in one tree.

    HyperagentError
    ├── ConfigError            a setting or a recipe is wrong                      (ValueError)
    ├── DataError              a data file, or something in it, is wrong           (ValueError)
    │   ├── TooLong            ... because it has more tokens than asked for       (ValueError)
    │   ├── MaskDisagreement   ... because its two masks differ                    (ValueError)
    │   └── RowRefused         one trajectory cannot be used; names it             (ValueError)
    ├── IdentityMismatch       two artifacts do not belong together                (ValueError)
    ├── InvalidRequest         a request's arguments are wrong                     (ValueError)
    │   └── LimitExceeded      ... because it is larger than the service allows    (ValueError)
    ├── NotFound               no such adapter, run or record                      (LookupError)
    ├── Conflict               the thing is there, but not in the state asked for  (HyperagentError)
    ├── CorruptRecord          stored bytes are not the bytes that were written    (ValueError)
    ├── StorageError           the disk refused: full, read-only, failing          (OSError)
    └── ServiceError           a service could not start or be reached             (RuntimeError)

A message says what happened, why, and how to mend it, in one line. The edges of the system (command
line, gRPC, HTTP) translate the classes above and nothing else; any other exception is a defect and is
left to surface as one.
"""

from __future__ import annotations


class HyperagentError(Exception):
    """Base of every error that is a person's to mend rather than a defect."""


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
