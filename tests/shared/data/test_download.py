"""Tests of the real hub client against a local hub: complete files are kept, others are fetched again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_rows import many_rows
from local_hub import LocalHub, serving

from hyperagent.data.files.schema import DATASET_FILE, DATASET_REVISION, TRAJECTORY_SCHEMA

# The client reads its endpoint on import, so each download runs in its own process.
_PROGRAM = """
import json, sys
from pathlib import Path
from hyperagent.data.files.download import download_dataset
from hyperagent.errors import HyperagentError
try:
    done = download_dataset(Path(sys.argv[1]), expected_bytes=int(sys.argv[2]))
    print(json.dumps({"path": str(done.path), "bytes": done.bytes, "sha256": done.sha256, "revision": done.revision}))
except HyperagentError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""

Download = Callable[..., dict[str, Any]]


def parquet(rows: list[dict[str, Any]], schema: pa.Schema = TRAJECTORY_SCHEMA) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="none")
    content: bytes = sink.getvalue().to_pybytes()
    return content


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with serving(LocalHub(parquet(many_rows(3000)))) as hub:
        yield hub


@pytest.fixture
def download(hub: LocalHub, tmp_path: Path) -> Download:
    def download(*, expected_bytes: int | None = None, **environment: str) -> dict[str, Any]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        size = len(hub.content) if expected_bytes is None else expected_bytes
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(tmp_path / "data"), str(size)],
            env={**kept, **own, "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    return download


def test_what_arrives_is_what_the_hub_holds_and_is_fetched_once(
    hub: LocalHub, download: Download, tmp_path: Path
) -> None:
    expected = {
        "path": str(tmp_path / "data" / DATASET_FILE),
        "bytes": len(hub.content),
        "sha256": hashlib.sha256(hub.content).hexdigest(),
        "revision": DATASET_REVISION,
    }
    assert download() == expected
    assert (tmp_path / "data" / DATASET_FILE).read_bytes() == hub.content
    assert hub.starts == [0]
    assert download() == expected
    assert hub.starts == [0]


def test_a_connection_that_breaks_is_resumed_where_it_broke(hub: LocalHub, download: Download, tmp_path: Path) -> None:
    hub.cut_after = len(hub.content) // 2
    first = download()
    if "error" in first:
        assert first["error"] == "ServiceError"
        download()
    assert (tmp_path / "data" / DATASET_FILE).read_bytes() == hub.content
    assert hub.starts[0] == 0
    assert len(hub.starts) == 2
    # Bytes that already arrived are not fetched again, except for those that were still in a buffer.
    assert hub.starts[1] > len(hub.content) // 4


def test_bytes_that_are_not_the_stated_ones_are_removed(hub: LocalHub, download: Download, tmp_path: Path) -> None:
    whole = hub.content
    hub.content = whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:]
    refused = download()
    assert refused["error"] == "DataError"
    assert (
        f"but the hub states {len(whole)} and {hub.stated_sha256}; the file was removed, run the command again"
        in refused["message"]
    )
    assert not (tmp_path / "data" / DATASET_FILE).exists()
    hub.content = whole
    assert download()["sha256"] == hub.stated_sha256


def test_a_file_that_was_changed_on_disk_is_fetched_again(hub: LocalHub, download: Download, tmp_path: Path) -> None:
    download()
    path = tmp_path / "data" / DATASET_FILE
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    times = path.stat()
    path.write_bytes(content)
    # As on a failing disk, only the content shows the damage.
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert download().get("error") == "DataError"
    assert download()["sha256"] == hub.stated_sha256
    assert path.read_bytes() == hub.content


def test_a_hub_with_another_file_is_refused_before_anything_is_fetched(hub: LocalHub, download: Download) -> None:
    refused = download(expected_bytes=len(hub.content) + 1)
    assert refused["error"] == "DataError"
    assert f"of {len(hub.content)} bytes at revision" in refused["message"]
    hub.stated_sha256 = "abc"
    assert "states no SHA-256" in download()["message"]
    assert hub.starts == []


def test_another_schema_is_named(hub: LocalHub, download: Download) -> None:
    other = TRAJECTORY_SCHEMA.set(7, pa.field("resolved", pa.string()))
    hub.content = parquet([{**row, "resolved": "yes"} for row in many_rows(10)], other)
    hub.stated_sha256 = hashlib.sha256(hub.content).hexdigest()
    refused = download()
    assert refused["error"] == "DataError"
    assert "resolved is string, not integer" in refused["message"]


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:1"}, {"HF_HUB_OFFLINE": "1"}])
def test_a_hub_that_cannot_be_reached_is_one_line(download: Download, environment: dict[str, str]) -> None:
    refused = download(**environment)
    assert refused["error"] == "ServiceError"
    assert "could not fetch" in refused["message"]
    assert "HF_ENDPOINT" in refused["message"]
    assert "\n" not in refused["message"]


def test_a_hub_without_the_file_is_one_line(hub: LocalHub, download: Download) -> None:
    refused = download(HF_ENDPOINT=f"{hub.endpoint}/elsewhere")
    assert refused["error"] == "ServiceError"
    assert "\n" not in refused["message"]
