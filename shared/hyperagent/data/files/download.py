"""Download the data set at its pinned revision and verify it against the hub's size and SHA-256."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hyperagent.data.files.schema import DATASET, DATASET_BYTES, DATASET_FILE, DATASET_REVISION, schema_differences
from hyperagent.errors import DataError, ServiceError, StorageError
from hyperagent.progress import Progress, no_progress

_TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 22
_SHA256_DIGITS = 64


@dataclass(frozen=True)
class DownloadedDataset:
    """A downloaded file, verified to be identical to the hub's."""

    path: Path
    bytes: int
    sha256: str
    revision: str


def download_dataset(
    folder: Path,
    *,
    expected_bytes: int = DATASET_BYTES,
    progress: Progress = no_progress,
) -> DownloadedDataset:
    """Fetch the data set's file into `folder`, resuming where an earlier call stopped.

    The hub's client shows its own progress bar on standard error and resumes a partial file. A complete file is
    verified and not fetched again. The environment variable `HF_ENDPOINT` selects a mirror.

    Args:
        expected_bytes: size of the file at the pinned revision.
        progress: called with (bytes checked, bytes to check).

    Raises:
        ServiceError: the hub cannot be reached or does not hold the file.
        DataError: the hub's file is not the pinned one, or the downloaded file differs from the hub's or from the
            locked schema. A file that differs from the hub's is removed, so that the next call fetches it again.
        StorageError: a file system operation failed.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    # HTTPError comes from whichever HTTP library the client is built on; it is not re-exported.
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    try:
        url = hf_hub_url(DATASET, DATASET_FILE, repo_type="dataset", revision=DATASET_REVISION)
        stated = get_hf_file_metadata(url, timeout=_TIMEOUT_S)
        _require_stated(stated.size, stated.etag, expected_bytes)
        path = Path(
            hf_hub_download(
                DATASET,
                DATASET_FILE,
                repo_type="dataset",
                revision=DATASET_REVISION,
                local_dir=folder,
                etag_timeout=_TIMEOUT_S,
            )
        )
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise _unreachable(error) from error
    except OSError as error:
        if error.errno is None:
            # The client's network errors are OSErrors without an errno.
            raise _unreachable(error) from error
        raise StorageError(
            f"could not write to {folder}: {error.strerror}; free some space or choose another"
        ) from error
    assert stated.etag is not None
    _require_same_bytes(path, size=expected_bytes, sha256=stated.etag, progress=progress)
    _require_schema(path)
    return DownloadedDataset(path, expected_bytes, stated.etag, DATASET_REVISION)


def _require_stated(size: int | None, etag: str | None, expected_bytes: int) -> None:
    """Require that the hub holds the pinned file and states its SHA-256 (the ETag of a file in large file storage)."""
    if size != expected_bytes:
        raise DataError(
            f"the hub holds {DATASET_FILE} of {size} bytes at revision {DATASET_REVISION}, not of {expected_bytes}; "
            "check the mirror that HF_ENDPOINT names"
        )
    if etag is None or len(etag) != _SHA256_DIGITS:
        raise DataError(f"the hub states no SHA-256 of {DATASET_FILE}, so it cannot be verified; try another mirror")


def _require_same_bytes(path: Path, *, size: int, sha256: str, progress: Progress) -> None:
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress(done, size)
    if done != size or digest.hexdigest() != sha256:
        path.unlink()
        raise DataError(
            f"{path} had {done} bytes with SHA-256 {digest.hexdigest()}, but the hub states {size} and {sha256}; "
            "the file was removed, run the command again"
        )


def _require_schema(path: Path) -> None:
    try:
        differences = schema_differences(pq.read_schema(path))
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file: {' '.join(str(error).split())}") from error
    if differences:
        raise DataError(f"{path} is not in the locked schema: {'; '.join(differences)}; use a release that knows it")


def _unreachable(error: Exception) -> ServiceError:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return ServiceError(
        f"could not fetch {DATASET} from the hub: {why}; check the network, select a mirror with HF_ENDPOINT, or copy "
        f"{DATASET_FILE} here by other means"
    )
