"""Export of a cache's trajectories to a folder of files, and import.

FOLDER/export.json         format, the teacher's identity and fingerprint, the data's identity
FOLDER/<key>.<suffix>      one trajectory; see `hyperagent.export.formats`
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hyperagent.cache.local import LocalCache
from hyperagent.data.files.tokens_file import count_tokens_rows, read_data_identity, read_tokens
from hyperagent.errors import ConfigError, CorruptRecord, DataError, HyperagentError, NotFound
from hyperagent.export.formats import FORMATS, ExportedTrajectory
from hyperagent.identity import DataIdentity, TeacherIdentity
from hyperagent.progress import Progress, no_progress
from hyperagent.storage.files import write_atomically

DESCRIPTION = "export.json"


@dataclass(frozen=True)
class ExchangeReport:
    """Counts of an export or import."""

    trajectories: int
    supervised_tokens: int
    bytes: int


@dataclass(frozen=True)
class ExportDescription:
    """Contents of `export.json`."""

    format: str
    identity: TeacherIdentity
    data: DataIdentity


def export(
    cache: LocalCache, tokens: Path, folder: Path, *, file_format: str, progress: Progress = no_progress
) -> ExchangeReport:
    """Write the trajectories of a tokens file with their rows; a rerun writes the same files again.

    Raises:
        IdentityMismatch: the cache was not populated from this tokens file.
        ConfigError: the folder holds another export.
        DataError: the cache lacks a trajectory; the message names it.
        CorruptRecord: a record is damaged; the message says which and how to restore it.
        StorageError: a file operation failed; files written before are kept.
    """
    data = read_data_identity(tokens)
    cache.require_data(data)
    description = {
        "format": file_format,
        "identity": asdict(cache.identity),
        "fingerprint": cache.identity.fingerprint,
        "data": json.loads(data.to_json()),
    }
    content = json.dumps(description, indent=2).encode() + b"\n"
    if (folder / DESCRIPTION).exists() and (folder / DESCRIPTION).read_bytes() != content:
        raise ConfigError(f"{folder} holds the export of another cache, data or format; choose another folder")
    write_atomically(folder / DESCRIPTION, content)
    target = FORMATS[file_format]
    total, rows, size = count_tokens_rows(tokens), 0, 0
    for done, trajectory in enumerate(read_tokens(tokens)):
        progress(done, total)
        key = cache.key(trajectory.token_ids, trajectory.positions)
        try:
            record = cache.get(key)
        except NotFound as error:
            raise DataError(
                f"the cache lacks trajectory {trajectory.trajectory_id!r}; run `hyperagent cache populate` first"
            ) from error
        encoded = target.encode(ExportedTrajectory(trajectory.token_ids, record.rows))
        write_atomically(folder / f"{key}{target.suffix}", encoded)
        rows += record.rows.num_rows
        size += len(encoded)
    progress(total, total)
    return ExchangeReport(total, rows, size)


def read_description(folder: Path) -> ExportDescription:
    """Read the description of a folder written by `export`.

    Raises:
        ConfigError: the folder has no description.
        CorruptRecord: the description is damaged.
    """
    path = folder / DESCRIPTION
    try:
        content = json.loads(path.read_bytes())
        identity = TeacherIdentity.from_fields(content["identity"])
        data = DataIdentity.from_json(json.dumps(content["data"]))
        file_format = content["format"]
        is_whole = identity.fingerprint == content["fingerprint"] and file_format in FORMATS
    except OSError as error:
        raise ConfigError(f"{folder} is neither a cache nor an export: {error.strerror}: {path.name}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptRecord(f"{path} is damaged: {' '.join(str(error).split())}; export again") from error
    if not is_whole:
        raise CorruptRecord(f"{path} is damaged: its fingerprint or format is wrong; export again")
    return ExportDescription(file_format, identity, data)


def import_files(folder: Path, cache: LocalCache, progress: Progress = no_progress) -> ExchangeReport:
    """Import every trajectory of an exported folder into the cache of its teacher; existing ones are kept.

    Raises:
        DataError: a file is damaged or its rows are not distributions; the message names it. Earlier imports are kept.
        StorageError: a file operation failed; trajectories imported before are kept.
    """
    description = read_description(folder)
    source = FORMATS[description.format]
    paths = sorted(folder.glob(f"*{source.suffix}"))
    rows = size = 0
    for done, path in enumerate(paths):
        progress(done, len(paths))
        try:
            content = path.read_bytes()
            trajectory = source.decode(content, cache.identity.top_k)
            trajectory.rows.validate(
                num_tokens=len(trajectory.token_ids),
                vocab_size=cache.identity.vocab_size,
                temperatures=cache.identity.temperatures,
            )
            key = cache.key(trajectory.token_ids, trajectory.rows.positions)
            if key != path.stem:
                raise DataError(f"its tokens and positions belong to {key}")
        except (HyperagentError, OSError) as error:
            raise DataError(f"{path} was not imported: {error}; export it again, or remove it") from error
        cache.put(trajectory.token_ids, trajectory.rows)
        rows += trajectory.rows.num_rows
        size += len(content)
    # Recorded last, once the import is complete.
    cache.record_data(description.data)
    progress(len(paths), len(paths))
    return ExchangeReport(len(paths), rows, size)
