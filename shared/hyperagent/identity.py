"""Who made what: fingerprints that an artifact carries and every reader compares.

A fingerprint is a lower-case hexadecimal digest of content, never of a path or a date, so that two
machines with the same files agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from blake3 import blake3

from hyperagent.errors import ConfigError, DataError, IdentityMismatch


@dataclass(frozen=True)
class TokenizerIdentity:
    """What decides which ids a conversation becomes."""

    tokenizer_sha256: str
    """Of the canonical form of `tokenizer.json` (see `tokenizer_sha256`)."""
    template_sha256: str
    """Of the chat template's UTF-8 text."""


@dataclass(frozen=True)
class DataIdentity:
    """What decides the ids, positions and views of a tokens file; everything made from the file carries it on."""

    tokenizer: TokenizerIdentity
    source: str
    """`file_fingerprint` of the data file."""
    settings: Mapping[str, Any]
    """Every setting of tokenizing it, as JSON values; joined files stand in it by their fingerprints."""

    @property
    def fingerprint(self) -> str:
        """Digest of every field."""
        return blake3(canonical_json(asdict(self))).hexdigest()

    def to_json(self) -> bytes:
        """Canonical JSON of every field."""
        return canonical_json(asdict(self))

    @classmethod
    def from_json(cls, content: bytes | str) -> DataIdentity:
        """The identity that `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        fields = json.loads(content)
        settings = dict(fields["settings"])
        return cls(TokenizerIdentity(**fields["tokenizer"]), str(fields["source"]), settings)


@dataclass(frozen=True)
class TeacherIdentity:
    """What decides which numbers a teacher answers; rows of two identities are never mixed."""

    model: str
    """Name of the model, for people."""
    weights: str
    """`weights_fingerprint` of the model's folder."""
    dtype: str
    """The weights' dtype at run time, such as "float32" or "bfloat16"."""
    backend: str
    """What computed the rows, with its version, such as "transformers-5.23.0"."""
    tokenizer_sha256: str
    template_sha256: str
    vocab_size: int
    """Number of real vocabulary entries; ids at or above it are padding rows and never appear."""
    top_k: int
    """Ids kept per row."""
    temperatures: tuple[float, ...] = ()
    """Those besides 1 at which rows can be had without error, rising."""

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> TeacherIdentity:
        """The identity whose `asdict` went through JSON.

        Raises:
            TypeError, KeyError: it is none.
        """
        return cls(**{**fields, "temperatures": tuple(fields["temperatures"])})

    @property
    def tokenizer(self) -> TokenizerIdentity:
        """Whose ids it takes."""
        return TokenizerIdentity(self.tokenizer_sha256, self.template_sha256)

    @property
    def fingerprint(self) -> str:
        """Digest of every field except the display name."""
        content = asdict(self)
        del content["model"]
        return blake3(canonical_json(content)).hexdigest()


def require_same(what: str, *, expected: object, found: object, remedy: str) -> None:
    """Refuse to go on when two identities differ.

    Raises:
        IdentityMismatch: showing both side by side; for dataclasses, only the fields that differ.
    """
    if expected == found:
        return
    if type(expected) is type(found) and hasattr(expected, "__dataclass_fields__"):
        names = [f.name for f in fields(expected) if getattr(expected, f.name) != getattr(found, f.name)]  # type: ignore[arg-type]
        expected = ", ".join(f"{name}={getattr(expected, name)}" for name in names)
        found = ", ".join(f"{name}={getattr(found, name)}" for name in names)
    raise IdentityMismatch(f"{what} does not match: expected {expected}, found {found}; {remedy}")


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no spaces, in UTF-8: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def tokenizer_sha256(folder: Path) -> str:
    """Digest of what `tokenizer.json` does to text: vocabulary, merges, added tokens, normalizer, splitter.

    Truncation and padding are left out: they are settings of a caller and this project never uses them.

    Raises:
        ConfigError: the folder has no readable `tokenizer.json`.
    """
    path = folder / "tokenizer.json"
    try:
        content = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"cannot read a tokenizer from {path}: {error}; give a folder that holds tokenizer.json"
        ) from error
    content.pop("truncation", None)
    content.pop("padding", None)
    return hashlib.sha256(canonical_json(content)).hexdigest()


def file_fingerprint(path: Path) -> str:
    """BLAKE3 (hex) of a file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error


def weights_fingerprint(folder: Path) -> str:
    """Digest of a model folder's `config.json` and every `*.safetensors` byte.

    Raises:
        ConfigError: the folder holds no config, a broken one, or no safetensors weights.
    """
    config = folder / "config.json"
    shards = sorted(folder.glob("*.safetensors"))
    if not config.is_file() or not shards:
        raise ConfigError(f"{folder} is not a model folder: it needs config.json and *.safetensors weights")
    try:
        digest = blake3(canonical_json(json.loads(config.read_bytes())))
    except ValueError as error:
        raise ConfigError(f"{config} is not JSON: {error}; copy the model again") from error
    for shard in shards:
        digest.update(shard.name.encode())
        digest.update(blake3(max_threads=blake3.AUTO).update_mmap(shard).digest())
    return digest.hexdigest()
