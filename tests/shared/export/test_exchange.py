"""Tests of export and import of a cache's rows, and of merging caches."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from cache_rows import IDENTITY, random_rows
from data_identity import data_identity

from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.cache.local import LocalCache
from hyperagent.cache.maintenance.merge import merge
from hyperagent.cache.maintenance.verify import verify
from hyperagent.data.files.tokens_file import TRAIN, TokenizedTrajectory, read_data_identity, write_tokens
from hyperagent.errors import ConfigError, CorruptRecord, DataError, HyperagentError, IdentityMismatch
from hyperagent.export.formats import FORMATS
from hyperagent.export.transfer import export, import_files, read_description
from hyperagent.topk import TopKRows

EXACT = CacheSettings(codec="exact", block_tokens=16)
WAYS = [EXACT, CacheSettings(codec="compact", kept_mass=0.7, min_k=1, block_tokens=16)]
NUMBERS = range(3)


def token_ids(number: int) -> np.ndarray:
    return np.arange(40, dtype=np.uint32) + number


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.parquet"
    with write_tokens(path, data_identity(IDENTITY.tokenizer)) as writer:
        for number in NUMBERS:
            ids, positions = token_ids(number), random_rows(15, 8).positions
            trajectory = TokenizedTrajectory(
                f"t{number}", f"repo-{number}", TRAIN, token_ids=ids, positions=positions, prompt_ids=ids[:1],
                student_ids=ids, student_positions=positions,
            )  # fmt: skip
            writer.write(trajectory)
    return path


def populate(root: Path, tokens: Path, settings: CacheSettings, numbers: Any = NUMBERS) -> list[str]:
    with LocalCache.create_or_open(root, IDENTITY, settings=settings) as cache:
        keys = [cache.put(token_ids(number), random_rows(15, 8, seed=number)) for number in numbers]
        cache.record_data(read_data_identity(tokens))
    return keys


def assert_same(found: TopKRows, meant: TopKRows, *, atol: float) -> None:
    np.testing.assert_array_equal(found.positions, meant.positions)
    np.testing.assert_array_equal(found.tail_logmass, meant.tail_logmass)
    np.testing.assert_array_equal(found.target_logprob, meant.target_logprob)
    for row, count in enumerate(meant.counts):
        theirs = dict(zip(found.ids[row, :count].tolist(), found.logprobs[row, :count].tolist(), strict=True))
        ours = dict(zip(meant.ids[row, :count].tolist(), meant.logprobs[row, :count].tolist(), strict=True))
        assert theirs == pytest.approx(ours, abs=atol)
    np.testing.assert_array_equal(found.counts, meant.counts)


@pytest.mark.parametrize("settings", WAYS, ids=lambda settings: settings.codec)
@pytest.mark.parametrize("file_format", FORMATS)
def test_what_is_exported_can_be_imported(
    tokens: Path, tmp_path: Path, file_format: str, settings: CacheSettings
) -> None:
    keys = populate(tmp_path / "cache", tokens, settings)
    with LocalCache.open(tmp_path / "cache") as cache:
        report = export(cache, tokens, tmp_path / "out", file_format=file_format)
        assert (report.trajectories, report.supervised_tokens) == (3, 45)
        assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob(f"*.{file_format}"))
        # A rerun gives the same result.
        assert export(cache, tokens, tmp_path / "out", file_format=file_format) == report
        meant = [cache.get(key).rows for key in keys]

    identity = read_description(tmp_path / "out").identity
    with LocalCache.create_or_open(tmp_path / "back", identity, settings=EXACT) as back:
        assert import_files(tmp_path / "out", back).supervised_tokens == 45
        assert back.trajectory_keys() == sorted(keys)
        back.require_data(read_data_identity(tokens))
        for key, rows in zip(keys, meant, strict=True):
            # The new cache and .npz round to float16, with a step of 4e-3 at -8 and smaller steps above.
            assert_same(back.get(key).rows, rows, atol=0 if settings is EXACT else 8e-3)


def test_the_files_are_what_other_tools_read(tokens: Path, tmp_path: Path) -> None:
    (key, *_) = populate(tmp_path / "cache", tokens, EXACT)
    with LocalCache.open(tmp_path / "cache") as cache:
        for file_format in FORMATS:
            export(cache, tokens, tmp_path / file_format, file_format=file_format)
        rows = cache.get(key).rows
    with np.load(tmp_path / "npz" / f"{key}.npz", allow_pickle=False) as arrays:
        assert arrays["indices"].dtype == np.int32
        assert arrays["values"].dtype == np.float16
        np.testing.assert_array_equal(arrays["indices"], rows.ids)
        np.testing.assert_array_equal(arrays["values"], rows.logprobs)
        np.testing.assert_array_equal(arrays["token_ids"], token_ids(0))
    tensors = safetensors.numpy.load_file(tmp_path / "safetensors" / f"{key}.safetensors")
    np.testing.assert_array_equal(tensors["values"], rows.logprobs)
    table = pq.read_table(tmp_path / "parquet" / f"{key}.parquet").to_pylist()
    assert [row["token_id"] for row in table] == token_ids(0).tolist()
    assert [place for place, row in enumerate(table) if row["indices"] is not None] == rows.positions.tolist()
    assert table[rows.positions[3]]["indices"] == rows.ids[3].tolist()
    assert table[rows.positions[3]]["tail_logmass"] == rows.tail_logmass[3]
    assert table[rows.positions[3]]["tail_logsumexps"] == rows.tail_logsumexps[3].tolist()
    assert table[0] == {
        "token_id": 0, "indices": None, "values": None, "tail_logmass": None, "target_logprob": None,
        "tail_logsumexps": None,
    }  # fmt: skip


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_damaged_file_is_named_and_nothing_of_it_is_taken(tokens: Path, tmp_path: Path, file_format: str) -> None:
    keys = sorted(populate(tmp_path / "cache", tokens, EXACT))
    with LocalCache.open(tmp_path / "cache") as cache:
        export(cache, tokens, tmp_path / "out", file_format=file_format)
    damaged = tmp_path / "out" / f"{keys[1]}.{file_format}"
    whole = damaged.read_bytes()
    other = (tmp_path / "out" / f"{keys[0]}.{file_format}").read_bytes()
    for content in (b"", whole[:100], whole[:-40], other):
        damaged.write_bytes(content)
        with LocalCache.create_or_open(tmp_path / "back", IDENTITY, settings=EXACT) as back:
            with pytest.raises(DataError, match=rf"{keys[1]}.{file_format} was not imported: .*; export it again"):
                import_files(tmp_path / "out", back)
            assert back.trajectory_keys() == keys[:1]
            with pytest.raises(IdentityMismatch):
                back.require_data(read_data_identity(tokens))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tail_logmass": None}, "there is no array 'tail_logmass'"),
        ({"positions": np.zeros(15, np.float32)}, "'positions' is of type float32"),
        ({"indices": np.zeros(15, np.int32)}, r"'indices' is of type int32 and shape \(15,\)"),
        ({"indices": np.full((15, 8), -1, np.int32)}, "'indices' has the negative number -1"),
        ({"values": np.zeros((15, 7), np.float16)}, "disagree in shape"),
        ({"values": np.zeros((15, 8), np.float16)}, "sum to"),
        ({"indices": np.full((15, 8), 5, np.int32)}, "twice|order"),
        ({"indices": np.full((15, 8), 300, np.int32)}, "outside the vocabulary"),
    ],
)
def test_arrays_that_are_no_rows_are_refused(
    tokens: Path, tmp_path: Path, change: dict[str, np.ndarray | None], reason: str
) -> None:
    (key, *_) = populate(tmp_path / "cache", tokens, EXACT, [0])
    with LocalCache.open(tmp_path / "cache") as cache, pytest.raises(DataError, match="lacks trajectory 't1'"):
        export(cache, tokens, tmp_path / "out", file_format="npz")
    path = tmp_path / "out" / f"{key}.npz"
    with np.load(path, allow_pickle=False) as arrays:
        content = {**arrays, **change}
    np.savez(path, **{name: array for name, array in content.items() if array is not None})
    with LocalCache.create_or_open(tmp_path / "back", IDENTITY) as back:
        with pytest.raises(DataError, match=reason):
            import_files(tmp_path / "out", back)
        assert back.trajectory_keys() == []


def test_a_table_whose_rows_have_tails_at_different_temperatures_is_refused(tokens: Path, tmp_path: Path) -> None:
    key = populate(tmp_path / "cache", tokens, EXACT)[0]
    with LocalCache.open(tmp_path / "cache") as cache:
        export(cache, tokens, tmp_path / "out", file_format="parquet")
    path = tmp_path / "out" / f"{key}.parquet"
    table = pq.read_table(path)
    tails = table["tail_logsumexps"].to_pylist()
    first = next(place for place, row in enumerate(tails) if row is not None)
    tails[first] = tails[first][:1]
    column = table.schema.get_field_index("tail_logsumexps")
    pq.write_table(table.set_column(column, "tail_logsumexps", [tails]), path)
    with (
        LocalCache.create_or_open(tmp_path / "back", IDENTITY) as back,
        pytest.raises(DataError, match="rows have tails at 1 to 2 temperatures"),
    ):
        import_files(tmp_path / "out", back)


def test_what_is_no_export_is_refused(tokens: Path, tmp_path: Path) -> None:
    populate(tmp_path / "cache", tokens, EXACT)
    with pytest.raises(ConfigError, match="neither a cache nor an export"):
        read_description(tmp_path)
    with LocalCache.open(tmp_path / "cache") as cache:
        export(cache, tokens, tmp_path / "out", file_format="npz")
        with pytest.raises(ConfigError, match="holds the export of another cache, data or format"):
            export(cache, tokens, tmp_path / "out", file_format="parquet")
    description = tmp_path / "out" / "export.json"
    content = json.loads(description.read_bytes())
    for damage in ({"fingerprint": "0" * 64}, {"format": "csv"}, {"data": {}}, {"identity": {}}):
        description.write_text(json.dumps({**content, **damage}))
        with pytest.raises(CorruptRecord, match="is damaged"):
            read_description(tmp_path / "out")


def test_caches_of_two_machines_become_one(tokens: Path, tmp_path: Path) -> None:
    first, second = populate(tmp_path / "a", tokens, WAYS[1], [0, 1]), populate(tmp_path / "b", tokens, WAYS[1], [1, 2])
    with LocalCache.open(tmp_path / "a") as target, LocalCache.open(tmp_path / "b") as source:
        report = merge(source, target)
        assert (report.trajectories, report.already_there) == (2, 1)
        assert target.trajectory_keys() == sorted({*first, *second})
        for key in second:
            assert target.stored_digest(key) == source.stored_digest(key)
        assert verify(target).damaged == ()
        assert target.data_identities() == [read_data_identity(tokens)]
        assert merge(source, target).already_there == 2


def test_exact_rows_become_compact_ones(tokens: Path, tmp_path: Path) -> None:
    keys = populate(tmp_path / "exact", tokens, EXACT)
    populate(tmp_path / "meant", tokens, WAYS[1])
    with (
        LocalCache.open(tmp_path / "exact") as source,
        LocalCache.open(tmp_path / "meant") as meant,
        LocalCache.create_or_open(tmp_path / "compact", IDENTITY, settings=WAYS[1]) as target,
    ):
        merge(source, target)
        for key in keys:
            found, expected = target.get(key).rows, meant.get(key).rows
            np.testing.assert_allclose(np.exp(found.logprobs[:, 0]), np.exp(expected.logprobs[:, 0]), atol=5e-3)
            assert np.abs(found.counts - expected.counts).max() <= 1
            assert found.counts.min() < 8
        # Rounded rows are not rounded again.
        with pytest.raises(ConfigError, match="would be rounded again"):
            merge(target, source)


def test_what_cannot_become_one_is_refused(tokens: Path, tmp_path: Path) -> None:
    (key, *_) = populate(tmp_path / "a", tokens, EXACT)
    with LocalCache.open(tmp_path / "a") as source:
        other = replace(IDENTITY, weights="9" * 64)
        with (
            LocalCache.create_or_open(tmp_path / "other", other) as target,
            pytest.raises(IdentityMismatch, match=r"weights=9.*weights=1"),
        ):
            merge(source, target)
        wide = CacheSettings(codec="exact", block_tokens=32)
        with (
            LocalCache.create_or_open(tmp_path / "wide", IDENTITY, settings=wide) as target,
            pytest.raises(ConfigError, match="blocks of 16 tokens cannot become blocks of 32"),
        ):
            merge(source, target)
        block = source.trajectory(key).blocks[0].key
        at = source.index.find(block)
    assert at is not None
    shutil.copytree(tmp_path / "a", tmp_path / "damaged")
    (shard,) = (tmp_path / "damaged" / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    content[at.offset + 120] ^= 1
    shard.write_bytes(content)
    data = next((tmp_path / "damaged" / "data").iterdir())
    with (
        LocalCache.open(tmp_path / "damaged") as source,
        LocalCache.create_or_open(tmp_path / "target", IDENTITY, settings=EXACT) as target,
    ):
        with pytest.raises(CorruptRecord, match="is damaged"):
            merge(source, target)
        assert key not in target.trajectory_keys()
        for wrong in (b"{}", data.read_bytes().replace(b'"source":"', b'"source":"x')):
            data.write_bytes(wrong)
            with pytest.raises(CorruptRecord, match="remove it"):
                merge(source, target)


def test_no_import_error_is_another_than_ours(tokens: Path, tmp_path: Path) -> None:
    """With any byte of a file flipped, import returns the original rows or other valid rows, or refuses the file."""
    populate(tmp_path / "cache", tokens, EXACT, [0])
    with LocalCache.open(tmp_path / "cache") as cache:
        rows = cache.get(cache.trajectory_keys()[0]).rows
    from hyperagent.export.formats import ExportedTrajectory

    for file_format in FORMATS.values():
        whole = file_format.encode(ExportedTrajectory(token_ids(0), rows))
        for place in range(0, len(whole), 7):
            damaged = bytearray(whole)
            damaged[place] ^= 0x41
            try:
                found = file_format.decode(bytes(damaged), 8)
                found.rows.validate(
                    num_tokens=len(found.token_ids), vocab_size=IDENTITY.vocab_size, temperatures=IDENTITY.temperatures
                )
            except HyperagentError:
                continue
