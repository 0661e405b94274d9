"""Manifest of a cache: the teacher's identity and the storage settings."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import pydantic
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field

from hyperagent.cache.format.codecs import CODECS, COMPACT, Codec
from hyperagent.errors import ConfigError, CorruptRecord, StorageError
from hyperagent.identity import TeacherIdentity
from hyperagent.storage.files import write_once

FORMAT_VERSION = 2
_NAME = "manifest.json"


class CacheSettings(BaseModel):
    """Storage settings of a cache, fixed at its creation and common to all of its records."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    codec: Annotated[str, Field(pattern=f"^({'|'.join(CODECS)})$")] = COMPACT.name
    """Codec of the rows: exact, compact or archive; see `hyperagent.cache.format.codecs`."""
    kept_mass: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability mass to keep per row: the most likely ids that reach it are kept; 1 keeps all that the teacher gave."""
    min_k: Annotated[int, Field(ge=1)] = 8
    """Minimum number of ids to keep per row, if the teacher gave that many."""
    block_tokens: Annotated[int, Field(ge=16, le=8192)] = 1024
    """Tokens per record; records are the unit of sharing, checking and resuming."""

    @property
    def row_codec(self) -> Codec:
        """Codec with the name `codec`."""
        return CODECS[self.codec]

    def digest(self) -> str:
        """Return the digest (hex) of all settings."""
        return blake3(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """Identity and storage settings of a cache."""

    identity: TeacherIdentity
    settings: CacheSettings


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write the manifest of a new cache; do nothing if there already is one.

    Raises:
        StorageError: the file system refused.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "identity": asdict(manifest.identity),
        "fingerprint": manifest.identity.fingerprint,
        "settings": manifest.settings.model_dump(),
    }
    # If two teachers start at once, only one creates the cache.
    write_once(manifest_path(root), json.dumps(content, indent=2).encode() + b"\n")


def read_manifest(root: Path) -> Manifest:
    """Read the manifest of an existing cache.

    Raises:
        ConfigError: there is no manifest, or its format version is unknown.
        CorruptRecord: the manifest is damaged.
        StorageError: the file system refused.
    """
    path = manifest_path(root)
    try:
        return parse_manifest(path.read_bytes(), str(root))
    except FileNotFoundError:
        raise ConfigError(f"there is no cache in {root}; fill one with `hyperagent cache populate`") from None
    except OSError as error:
        raise StorageError(f"could not read {path}: {error.strerror}; check the disk and its permissions") from error


def parse_manifest(content: bytes, name: str) -> Manifest:
    """Parse the manifest of the cache `name` from its bytes.

    Raises:
        ConfigError: its format version is unknown.
        CorruptRecord: the manifest is damaged.
    """
    try:
        fields = json.loads(content)
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"the cache in {name} has format version {version}, but this release reads {FORMAT_VERSION}; populate a new one"
            )
        identity = TeacherIdentity.from_fields(fields["identity"])
        settings = CacheSettings(**fields["settings"])
        is_whole = identity.fingerprint == fields["fingerprint"]
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, pydantic.ValidationError) as error:
        reason = " ".join(str(error).split())
        raise CorruptRecord(f"{name}/{_NAME} is damaged: {reason}; restore it, or populate a new cache") from error
    if not is_whole:
        raise CorruptRecord(
            f"{name}/{_NAME} is damaged: its fingerprint is not that of its identity; restore it, or populate a new cache"
        )
    return Manifest(identity, settings)


def manifest_path(root: Path) -> Path:
    """Return the path of a cache's manifest."""
    return root / _NAME
