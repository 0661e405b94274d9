"""Tests of durable writes: a reader sees either the old content or the new one."""

from __future__ import annotations

import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hyperagent.errors import StorageError
from hyperagent.storage.files import is_temporary, new_directory, write_atomically, write_once


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_of_several_writers_of_one_name_one_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with ThreadPoolExecutor(8) as pool:
        wrote = list(pool.map(lambda number: write_once(path, bytes([number])), range(40)))
    assert wrote.count(True) == 1
    assert path.read_bytes() == bytes([wrote.index(True)])
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    with pytest.raises(StorageError, match="could not write"):
        write_once(path / "below", b"x")


def test_a_directory_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for name in ("old", "new"):
        with new_directory(target) as temporary:
            (temporary / name).write_text("x")
            assert is_temporary(temporary)
            assert not (target / name).exists()
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_failing_block_leaves_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with new_directory(target) as temporary:
        (temporary / "old").write_text("x")

    def fail_halfway() -> None:
        with new_directory(target) as temporary:
            (temporary / "half").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert [p.name for p in target.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_is_one_sentence_and_the_old_file_remains(tmp_path: Path) -> None:
    """A file size limit simulates a full disk: the write fails halfway in the same way."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from hyperagent.errors import StorageError; from hyperagent.storage.files import write_atomically\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_atomically(Path(sys.argv[1]), bytes(100_000))\n"
        "except StorageError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"could not write {path}: ")
    assert "raise it (ulimit -f)" in said
    assert len(said.splitlines()) == 1
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_path_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="could not write"):
        write_atomically(tmp_path / "file" / "below", b"x")


def test_a_directory_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="could not write"), new_directory(tmp_path / "file") as temporary:
        (temporary / "new").write_text("x")
    assert (tmp_path / "file").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
