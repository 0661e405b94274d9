"""Fingerprints that identify what an artifact was made from; every reader compares them.

A fingerprint is a lower-case hexadecimal digest of content, never of a path or a date, so it is the same on two
machines with the same files.
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
    """Identity of a tokenizer: everything that determines the token ids of a conversation."""

    tokenizer_sha256: str
    """SHA-256 of the canonical form of `tokenizer.json` (see `tokenizer_sha256`)."""
    template_sha256: str
    """SHA-256 of the chat template's UTF-8 text."""


@dataclass(frozen=True)
class DataIdentity:
    """Identity of a tokens file: everything that determines its ids, positions and views.

    Every artifact made from the file records it.
    """

    tokenizer: TokenizerIdentity
    source: str
    """`file_fingerprint` of the data file."""
    settings: Mapping[str, Any]
    """All settings of the tokenization, as JSON values; joined files are represented by their fingerprints."""

    @property
    def fingerprint(self) -> str:
        """Digest (hex) of every field."""
        return blake3(canonical_json(asdict(self))).hexdigest()

    def to_json(self) -> bytes:
        """Return canonical JSON of every field."""
        return canonical_json(asdict(self))

    @classmethod
    def from_json(cls, content: bytes | str) -> DataIdentity:
        """Return the identity that `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: `content` is not such an identity.
        """
        fields = json.loads(content)
        settings = dict(fields["settings"])
        return cls(TokenizerIdentity(**fields["tokenizer"]), str(fields["source"]), settings)


@dataclass(frozen=True)
class TeacherIdentity:
    """Identity of a teacher: everything that determines its rows; rows of two identities are never mixed."""

    model: str
    """Display name of the model."""
    weights: str
    """`weights_fingerprint` of the model's folder."""
    dtype: str
    """The weights' dtype at run time, such as "float32" or "bfloat16"."""
    backend: str
    """Inference engine with its version, such as "transformers-5.23.0"."""
    tokenizer_sha256: str
    template_sha256: str
    vocab_size: int
    """Number of real vocabulary entries; ids at or above it are padding rows and never appear."""
    top_k: int
    """Number of ids kept per row."""
    temperatures: tuple[float, ...] = ()
    """Temperatures other than 1 at which rows are exact, in ascending order."""

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> TeacherIdentity:
        """Restore an identity from its `asdict` after a round trip through JSON.

        Raises:
            TypeError, KeyError: `fields` are not those of an identity.
        """
        return cls(**{**fields, "temperatures": tuple(fields["temperatures"])})

    @property
    def tokenizer(self) -> TokenizerIdentity:
        """Tokenizer whose ids the teacher accepts."""
        return TokenizerIdentity(self.tokenizer_sha256, self.template_sha256)

    @property
    def fingerprint(self) -> str:
        """Digest (hex) of every field except the display name."""
        content = asdict(self)
        del content["model"]
        return blake3(canonical_json(content)).hexdigest()


def require_same(what: str, *, expected: object, found: object, remedy: str) -> None:
    """Raise an error if two identities differ.

    Raises:
        IdentityMismatch: they differ; the message shows both, for dataclasses only the fields that differ.
    """
    if expected == found:
        return
    if type(expected) is type(found) and hasattr(expected, "__dataclass_fields__"):
        names = [f.name for f in fields(expected) if getattr(expected, f.name) != getattr(found, f.name)]  # type: ignore[arg-type]
        expected = ", ".join(f"{name}={getattr(expected, name)}" for name in names)
        found = ", ".join(f"{name}={getattr(found, name)}" for name in names)
    raise IdentityMismatch(f"{what} does not match: expected {expected}, found {found}; {remedy}")


def canonical_json(value: object) -> bytes:
    """Return JSON with sorted keys and no spaces, in UTF-8; equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def tokenizer_sha256(serialized: str) -> str:
    """Return a digest of everything in a loaded tokenizer that affects the ids of a text.

    This covers vocabulary, merges, added tokens, normalizer and splitter, whichever files they came from and however these
    were written. Truncation and padding are left out, since they are settings of a caller and this project never uses them,
    and so is what is absent, false or empty, since releases of the library differ in whether they write it.

    Args:
        serialized: the tokenizer as `tokenizers.Tokenizer.to_str` writes it.
    """
    content = dict(json.loads(serialized))
    for name in ("version", "truncation", "padding"):
        content.pop(name, None)
    return hashlib.sha256(canonical_json(_without_empty(content))).hexdigest()


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        # A vocabulary maps tokens to numbers, of which 0 is one.
        cleaned = {key: _without_empty(item) for key, item in value.items()}
        return {
            key: item
            for key, item in cleaned.items()
            if item is not None and item is not False and item not in ({}, [])
        }
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def file_fingerprint(path: Path) -> str:
    """Return the BLAKE3 digest (hex) of a file's bytes.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error


def weights_fingerprint(folder: Path) -> str:
    """Return a digest of a model folder's `config.json` and all bytes of its `*.safetensors` files.

    Raises:
        ConfigError: the folder has no config, a broken one, or no safetensors weights.
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
