"""Open data files: Parquet and JSON Lines, compressed or not, one file or a folder of shards."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3

from hyperagent.data.files.columns import columns_file
from hyperagent.errors import DataError
from hyperagent.identity import file_fingerprint

JSON_LINES = ".jsonl"
_JSON_LINES = (JSON_LINES, ".ndjson")
_COMPRESSED = (".gz", ".zst")
_BUFFER_BYTES = 1 << 20
# A row of 131,072 tokens has about half a megabyte; a longer line than this is never read into memory as a whole.
MAX_LINE_BYTES = 64 << 20
"""Longest line of JSON Lines."""


def is_json_lines(path: Path) -> bool:
    """Return whether a file's name says that it holds JSON Lines: `.jsonl` or `.ndjson`, also with `.gz` or `.zst`."""
    name = path.name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return name.endswith(_JSON_LINES)


def shards(path: Path) -> list[Path]:
    """Return the files of a data set in order: the file itself, or those of a folder, by name.

    Raises:
        DataError: there is no such file, or the folder holds no data file.
    """
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"there is no file {path}")
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and (is_json_lines(file) or file.suffix.lower() == ".parquet")
    )
    if not found:
        raise DataError(
            f"the folder {path} holds no *.parquet, *{JSON_LINES} or *.ndjson; give a data file, or a folder of shards"
        )
    return found


def fingerprint(path: Path) -> str:
    """Return the digest (hex) of a data set: of its file, or of its shards and the names of its columns.

    Raises:
        DataError: a file cannot be read.
    """
    files = shards(path)
    names = columns_file(path)
    if files == [path] and not names.is_file():
        return file_fingerprint(path)
    parts = [*files, *([names] if names.is_file() else [])]
    return blake3("".join(map(file_fingerprint, parts)).encode()).hexdigest()


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file for streaming.

    Raises:
        DataError: the file is missing or is not Parquet.
    """
    try:
        # pre_buffer would read whole column chunks and keep those of all row groups until the last one is read.
        return pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        hint = f"JSON Lines must be named *{JSON_LINES}"
        if path.name.lower().endswith(".json"):
            hint = f"a JSON array becomes JSON Lines with `jq -c '.[]' {path.name}`"
        raise DataError(f"{path} is not a Parquet file: {' '.join(str(error).split())}; {hint}") from error


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines that are not blank; a line that is too long is truncated to one byte more than the limit.

    Raises:
        DataError: the file is missing or damaged, or is not UTF-8 but UTF-16.
    """
    try:
        with _open(path) as file:
            first = True
            while line := file.readline(MAX_LINE_BYTES + 1):
                if first and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError(
                        f"{path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}"
                    )
                first = False
                if line.strip():
                    yield line
                while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (EOFError, gzip.BadGzipFile, pa.ArrowException) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}; copy it again") from error
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or ' '.join(str(error).split())}; check the path and its permissions"
        ) from error


def _open(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), _BUFFER_BYTES)
    return path.open("rb")
