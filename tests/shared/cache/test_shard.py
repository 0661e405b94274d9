"""Tests of a shard's writer when the system writes fewer bytes than requested, or fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hyperagent.cache.format.shard import SHARD_HEADER_BYTES, ShardWriter, fingerprint_of, scan
from hyperagent.errors import CorruptRecord

FINGERPRINT = "ab" * 32


def refuse(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_write_that_the_system_cuts_short_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, offset: pwrite(file, content[:7], offset))
    writer = ShardWriter.create(tmp_path, FINGERPRINT)
    content = bytes(range(256))
    assert writer.append(content) == SHARD_HEADER_BYTES
    assert writer.end == SHARD_HEADER_BYTES + len(content)
    writer.close()
    assert writer.path.read_bytes()[SHARD_HEADER_BYTES:] == content
    assert fingerprint_of(writer.path) == FINGERPRINT


def test_a_shard_that_cannot_be_made_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        ShardWriter.create(tmp_path, FINGERPRINT)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_cannot_be_sealed_is_told_and_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ShardWriter.create(tmp_path, FINGERPRINT)
    before = writer.path.read_bytes()
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        writer.seal()
    assert writer.path.read_bytes() == before
    assert list(scan(writer.path, start=SHARD_HEADER_BYTES, end=len(before))) == []


@pytest.mark.parametrize("content", [b"", b"HATKSHD2", b"X" * SHARD_HEADER_BYTES])
def test_what_is_no_shard_is_told_from_a_damaged_one(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.shard"
    path.write_bytes(content)
    with pytest.raises(CorruptRecord, match="does not begin like a shard"):
        fingerprint_of(path)
