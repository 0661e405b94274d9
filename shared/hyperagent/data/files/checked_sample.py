"""Identity of the two samples of the teacher check: drawn from which tokens file, under whose condition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hyperagent.errors import IdentityMismatch
from hyperagent.identity import DataIdentity

SampleCondition = Literal["own", "foreign"]

_NAME = "teacher_check"


@dataclass(frozen=True)
class SampleSettings:
    """What determines a sample, besides the tokens file that it is drawn from."""

    rows: int
    """Maximum number of trajectories."""
    seed: int
    split: str
    """Split that the trajectories are drawn from."""


def sample_identity(identity: DataIdentity, settings: SampleSettings, *, condition: SampleCondition) -> DataIdentity:
    """Return the identity of a sample of the tokens file with `identity`."""
    mark = {
        "tokens": identity.fingerprint,
        "condition": condition,
        "rows": settings.rows,
        "seed": settings.seed,
        "split": settings.split,
    }
    return replace(identity, settings={**identity.settings, _NAME: mark})


def origin(identity: DataIdentity) -> str:
    """Return the fingerprint of the tokens file that a sample was drawn from; a file's own if it is no sample."""
    return str(identity.settings[_NAME]["tokens"]) if _NAME in identity.settings else identity.fingerprint


def require_counterparts(own: DataIdentity, foreign: DataIdentity) -> None:
    """Require that `foreign` is a sample under a foreign condition, and that `own` holds its trajectories unchanged.

    Raises:
        IdentityMismatch: they are something else.
    """
    for identity, wanted, what in ((own, "own", "--tokens"), (foreign, "foreign", "--foreign-tokens")):
        found = identity.settings[_NAME]["condition"] if _NAME in identity.settings else "own"
        if found != wanted:
            raise IdentityMismatch(
                f"the file of {what} shows the teacher every trajectory under its {found} condition, not under the "
                f"{wanted} one; give the file that `hyperagent data tokenize` wrote as --tokens and the one that "
                "`hyperagent teacher-check tokens` wrote as --foreign-tokens"
            )
    if origin(own) != origin(foreign):
        raise IdentityMismatch(
            f"the foreign tokens file was made from tokens {origin(foreign)}, not from {origin(own)}; make it again "
            "with `hyperagent teacher-check tokens`"
        )
