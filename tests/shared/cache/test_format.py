"""Tests of the cache's byte format with a second reader, written from docs/cache-format.md, and with damaged bits."""

from __future__ import annotations

import json
import math
import sqlite3
import struct
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard
from blake3 import blake3
from cache_rows import IDENTITY, TEMPERATURES, TOKENS, VOCABULARY, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperagent.cache.format import elias_fano
from hyperagent.cache.format.codecs import ARCHIVE, CODECS, KeptIds
from hyperagent.cache.format.convert import to_top_k_rows
from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.cache.format.record import (
    BlockOfTrajectory,
    Header,
    Kind,
    check_record,
    decode_block,
    decode_trajectory,
    encode_block,
    encode_trajectory,
)
from hyperagent.cache.format.shard import shard_paths
from hyperagent.cache.format.size_estimate import bytes_per_row
from hyperagent.cache.format.truncation import keep_mass
from hyperagent.cache.local import LocalCache
from hyperagent.cache.maintenance.verify import verify
from hyperagent.errors import CorruptRecord, NotFound
from hyperagent.topk import TopKRows

KEY = bytes(range(32))


class SecondReader:
    """Reader of one trajectory of a cache that uses no code of the project."""

    def __init__(self, root: Path, codec: str) -> None:
        self.manifest = json.loads((root / "manifest.json").read_text())
        self.fingerprint = bytes.fromhex(self.manifest["fingerprint"])
        self.vocabulary = self.manifest["identity"]["vocab_size"]
        self.temperatures = self.manifest["identity"]["temperatures"]
        identity = {name: value for name, value in self.manifest["identity"].items() if name != "model"}
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        assert blake3(canonical).digest() == self.fingerprint
        self.records: dict[bytes, tuple[tuple[int, ...], bytes]] = {}
        self.places: set[tuple[bytes, int, str, int, int]] = set()
        for path in sorted((root / "shards").iterdir()):
            self._read_shard(path.stem, path.read_bytes(), is_sealed=path.suffix == ".shard")
        assert self.manifest["settings"]["codec"] == codec

    def _read_shard(self, name: str, content: bytes, *, is_sealed: bool) -> None:
        assert content[:40] == b"HATKSHD2" + self.fingerprint
        assert content[40:64] == bytes(16) + xxhash.xxh3_64_digest(content[:56])
        end, footer = len(content), b""
        if is_sealed:
            footer_at, count = struct.unpack_from("<QQ", content, len(content) - 64)
            footer, end = content[footer_at : footer_at + 48 * count], footer_at
            assert footer_at + 48 * count + 64 == len(content)
            assert content[-48:-40] == xxhash.xxh3_64_digest(footer)
            assert content[-40:] == blake3(content[:-40]).digest() + b"HATKEND2"
        entries, start = [], 64
        while start < end:
            fields = struct.unpack_from("<8sBBHIIIII32s16sffQ", content, start)
            payload = content[start + 96 : start + 96 + fields[4]]
            assert fields[0] == b"HATKREC2"
            assert fields[-1] == xxhash.xxh3_64_intdigest(content[start : start + 88])
            assert fields[10] == xxhash.xxh3_128_digest(payload)
            length = -(-(96 + len(payload)) // 32) * 32
            assert not any(content[start + 96 + len(payload) : start + length])
            self.records[fields[9]] = (fields[1:9], payload)
            entries.append((fields[9], start, length, fields[1]))
            self.places.add((fields[9], fields[1], name, start, length))
            start += length
        if is_sealed:
            assert [struct.unpack_from("<32sQII", footer, 48 * i) for i in range(len(entries))] == sorted(entries)

    def read(self, token_ids: list[int], positions: list[int]) -> list[tuple[int, dict[int, float], float, float]]:
        """Return position, log-probabilities by id, tail and target of each row."""
        size = self.manifest["settings"]["block_tokens"]
        chain = blake3(b"hyperagent-topk-chain-2" + self.fingerprint).digest()
        rows, named = [], b""
        for index in range(-(-len(token_ids) // size)):
            block = token_ids[index * size : (index + 1) * size]
            chain = blake3(chain + struct.pack(f"<{len(block)}I", *block)).digest()
            inside = [p - index * size for p in positions if index * size <= p < (index + 1) * size]
            if inside:
                key = blake3(b"hyperagent-topk-block-2" + chain + struct.pack(f"<{len(inside)}I", *inside)).digest()
                named += struct.pack("<II", index, len(inside)) + key
                rows += self._block(*self.records[key])
        counts = struct.pack("<QQ", len(token_ids), len(positions))
        all_ids = struct.pack(f"<{len(token_ids) + len(positions)}I", *token_ids, *positions)
        trajectory, payload = self.records[
            blake3(b"hyperagent-topk-key-2" + self.fingerprint + counts + all_ids).digest()
        ]
        assert payload == named
        assert trajectory == (2, 0, 0, len(payload), 0, len(token_ids), len(positions), 0)
        return rows

    def _block(self, header: tuple[int, ...], payload: bytes) -> list[tuple[int, dict[int, float], float, float]]:
        kind, codec, most, _, first_token, num_tokens, num_rows, num_kept = header
        assert kind == 1
        bits = int.from_bytes(payload[-((num_tokens + 7) // 8) :], "little")
        offsets = [i for i in range(num_tokens) if bits >> i & 1]
        end = len(payload) - -(-num_tokens // 8)
        counts = [most] * num_rows
        if num_kept != num_rows * most:
            end -= 2 * num_rows
            counts = list(struct.unpack_from(f"<{num_rows}H", payload, end))
        scalar = "f" if codec == 1 else "e"
        num_temperatures = len(self.temperatures)
        end -= num_rows * num_temperatures * struct.calcsize(scalar)
        flat = struct.unpack_from(f"<{num_rows * num_temperatures}{scalar}", payload, end)
        hot = [flat[row * num_temperatures : (row + 1) * num_temperatures] for row in range(num_rows)]
        end -= num_rows * struct.calcsize(scalar)
        targets = struct.unpack_from(f"<{num_rows}{scalar}", payload, end)
        end -= num_rows * struct.calcsize(scalar)
        tails = struct.unpack_from(f"<{num_rows}{scalar}", payload, end)
        decode = {1: self._exact, 2: self._compact, 3: self._archive}[codec]
        kept = decode(payload[:end], counts)
        return [(first_token + offset, *rest) for offset, *rest in zip(offsets, kept, tails, targets, hot, strict=True)]

    def _exact(self, content: bytes, counts: list[int]) -> list[dict[int, float]]:
        n = sum(counts)
        ids, logprobs = struct.unpack_from(f"<{n}I", content), struct.unpack_from(f"<{n}e", content, 4 * n)
        return self._by_row(list(ids), list(logprobs), counts)

    def _compact(self, content: bytes, counts: list[int]) -> list[dict[int, float]]:
        N, n = len(counts), sum(counts)
        highest, steps = struct.unpack_from(f"<{N}f", content), struct.unpack_from(f"<{N}e", content, 4 * N)
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        logprobs = [
            float(np.float32(highest[row]) - np.float32(steps[row]) * np.float32(q))
            for row, q in zip(rows, content[6 * N : 6 * N + n], strict=True)
        ]
        numbers = self._elias_fano(content[6 * N + n :], n, N * self.vocabulary)
        return self._by_row([x - row * self.vocabulary for x, row in zip(numbers, rows, strict=True)], logprobs, counts)

    def _elias_fano(self, content: bytes, n: int, universe: int) -> list[int]:
        def size(low: int) -> int:
            return low // 8 * n + -(-(low % 8) * n // 8) + -(-(n + (universe >> low) + 1) // 8)

        low = min((0, 1, 2, 4, 8, 9, 10, 12, 16, 17, 18, 20), key=size)
        assert len(content) == size(low)
        numbers = [sum(content[plane * n + i] << 8 * plane for plane in range(low // 8)) for i in range(n)]
        start, width = low // 8 * n, low % 8
        packed = int.from_bytes(content[start : start - (-width * n // 8)], "little")
        numbers = [x | (packed >> width * i & (1 << width) - 1) << low // 8 * 8 for i, x in enumerate(numbers)]
        unary = int.from_bytes(content[start - (-width * n // 8) :], "little")
        ones = [place for place in range(unary.bit_length()) if unary >> place & 1]
        return [x | place - i << low for i, (x, place) in enumerate(zip(numbers, ones, strict=True))]

    def _archive(self, content: bytes, counts: list[int]) -> list[dict[int, float]]:
        N, n = len(counts), sum(counts)
        shifts, sizes = struct.unpack_from(f"<{N}e", content), struct.unpack_from("<5I", content, 2 * N)
        planes, start = [], 2 * N + 20
        for frame in sizes:
            planes.append(zstandard.ZstdDecompressor().decompress(content[start : start + frame]))
            start += frame
        assert start == len(content)
        assert {len(plane) for plane in planes} == {n}
        gaps = [a | b << 8 | c << 16 for a, b, c in zip(*planes[:3], strict=True)]
        finest, widest = 0.02, 0.25
        turn = (finest / widest) ** 2
        turn_step = 2 * (1 - math.sqrt(turn)) / finest
        ids, logprobs, i = [], [], 0
        for count, shift in zip(counts, shifts, strict=True):
            for place in range(i, i + count):
                ids.append(sum(gaps[i : place + 1]))
                q = planes[3][place] | planes[4][place] << 8
                near = 2 * math.log(1 - q * finest / 2) if q <= turn_step else math.log(turn) - (q - turn_step) * widest
                logprobs.append(float(np.float32(shift) + np.float32(near)))
            i += count
        return self._by_row(ids, logprobs, counts)

    @staticmethod
    def _by_row(ids: list[int], logprobs: list[float], counts: list[int]) -> list[dict[int, float]]:
        ends = np.cumsum(counts).tolist()
        return [
            dict(zip(ids[end - count : end], logprobs[end - count : end], strict=True))
            for count, end in zip(counts, ends, strict=True)
        ]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kept_mass", [1.0, 0.8])
@pytest.mark.parametrize("is_sealed", [False, True])
def test_a_reader_written_from_the_document_reads_the_same(
    tmp_path: Path, codec: str, kept_mass: float, is_sealed: bool
) -> None:
    how = CacheSettings(codec=codec, kept_mass=kept_mass, min_k=2, block_tokens=16)
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=how) as cache:
        rows = random_rows(20, 8, spread=6.0)
        key = cache.put(TOKENS, rows)
        if is_sealed:
            cache.seal()
        read = cache.get(key).rows
    assert [path.suffix for path in shard_paths(tmp_path / "shards")] == [".shard" if is_sealed else ".open"]
    reader = SecondReader(tmp_path, codec)
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as index:
        assert set(index.execute("SELECT key, kind, shard, offset, length FROM records")) == reader.places
    found = reader.read(TOKENS.tolist(), rows.positions.tolist())
    assert [row[0] for row in found] == read.positions.tolist()
    for n, (_, kept, tail, target, hot) in enumerate(found):
        count = read.counts[n]
        assert count == len(kept) <= 8
        assert set(kept) == set(read.ids[n, :count].tolist())
        logprobs = np.array([kept[i] for i in read.ids[n, :count]], np.float32)
        # The last digit of a binary64 logarithm depends on the library and may affect its rounding to f32.
        np.testing.assert_array_max_ulp(logprobs, read.logprobs[n, :count], maxulp=1 if codec == "archive" else 0)
        assert (tail, target, *hot) == (read.tail_logmass[n], read.target_logprob[n], *read.tail_logsumexps[n])
    assert (read.counts < 8).any() == (kept_mass < 1)


@settings(deadline=None)
@given(
    n=st.integers(1, 30),
    k=st.integers(1, VOCABULARY),
    spread=st.floats(0.01, 300),
    seed=st.integers(0, 99),
    kept_mass=st.floats(0.01, 1),
    codec=st.sampled_from(list(CODECS)),
)
def test_rows_survive_within_what_their_codec_states(
    n: int, k: int, spread: float, seed: int, kept_mass: float, codec: str
) -> None:
    rows = keep_mass(
        random_rows(n, k, seed=seed, spread=spread), kept_mass=kept_mass, min_k=1, temperatures=TEMPERATURES
    )
    content = encode_block(KEY, rows, first_token=0, num_tokens=2 * n + 1, codec=CODECS[codec], vocab_size=VOCABULARY)
    header, payload = check_record(memoryview(content))
    read = to_top_k_rows(decode_block(header, payload, vocab_size=VOCABULARY, num_temperatures=2), k)
    read.validate(num_tokens=2 * n + 1, vocab_size=VOCABULARY, temperatures=TEMPERATURES)
    np.testing.assert_array_equal(read.positions, rows.positions)
    np.testing.assert_array_equal(read.counts, rows.counts)
    span = rows.logprobs[:, 0] - np.where(rows.logprobs > -np.inf, rows.logprobs, 0).min(axis=1)
    worst = {
        "exact": 2**-10 * span + 1e-3,
        "compact": 0.51 * span / 255 + 1e-3 * span + 1e-3,
        "archive": 0.13 + 2e-3 * span,
    }
    for row in range(n):
        count = rows.counts[row]
        assert set(read.ids[row, :count]) == set(rows.ids[row, :count])
        by_id = [np.argsort(some.ids[row, :count]) for some in (read, rows)]
        left, right = (some.logprobs[row, :count][order] for some, order in zip((read, rows), by_id, strict=True))
        # The shift that preserves the mass is added, and is smaller than a step.
        np.testing.assert_allclose(left, right, atol=2 * worst[codec][row])
        mass = [np.exp(some.logprobs[row].astype(np.float64)).sum() for some in (read, rows)]
        assert mass[0] == pytest.approx(mass[1], rel={"exact": 1e-2, "compact": 2e-5, "archive": 1e-4}[codec])
    p = np.exp(rows.logprobs.astype(np.float64))
    assert header.kept_mass == pytest.approx(p.sum(axis=1).mean(), rel=1e-6)
    assert -1e-3 < header.kl_nats < {"exact": 1e-3, "compact": 5e-2, "archive": 5e-3}[codec]


def test_the_kl_of_a_header_is_that_of_its_rows() -> None:
    rows = random_rows(30, 64, spread=2.0)
    for codec in CODECS.values():
        content = encode_block(KEY, rows, first_token=0, num_tokens=64, codec=codec, vocab_size=VOCABULARY)
        header, payload = check_record(memoryview(content))
        read = to_top_k_rows(decode_block(header, payload, vocab_size=VOCABULARY, num_temperatures=2), 64)
        total = 0.0
        for n in range(30):
            stored = dict(zip(read.ids[n].tolist(), read.logprobs[n].tolist(), strict=True))
            pairs = [(lp, stored[i]) for i, lp in zip(rows.ids[n].tolist(), rows.logprobs[n].tolist(), strict=True)]
            pairs.append((float(rows.tail_logmass[n]), float(read.tail_logmass[n])))
            p = [math.exp(lp) / math.fsum(math.exp(lp) for lp, _ in pairs) for lp, _ in pairs]
            q = [math.exp(lp) / math.fsum(math.exp(lp) for _, lp in pairs) for _, lp in pairs]
            total += math.fsum(mine * math.log(mine / theirs) for mine, theirs in zip(p, q, strict=True))
        assert header.kl_nats >= 0
        assert header.kl_nats == pytest.approx(total / 30, rel=1e-3, abs=1e-9)


@settings(deadline=None)
@given(st.sets(st.integers(0, 5000)), st.integers(0, 2**20))
def test_rising_numbers_survive_elias_fano(numbers: set[int], room: int) -> None:
    sequence = np.array(sorted(numbers), np.uint32)
    universe = max(numbers, default=0) + 1 + room
    content = elias_fano.encode(sequence, universe)
    assert len(content) == elias_fano.encoded_bytes(len(sequence), universe)
    np.testing.assert_array_equal(elias_fano.decode(memoryview(content), len(sequence), universe), sequence)


def test_elias_fano_near_the_largest_universe() -> None:
    sequence = np.array([0, 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
    content = elias_fano.encode(sequence, 2**32)
    np.testing.assert_array_equal(elias_fano.decode(memoryview(content), 5, 2**32), sequence)


# 13 shares no factor with the sizes of the fields, so every field is damaged somewhere.
EVERY_PLACE_OR_SOME = pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])


@pytest.fixture
def sealed(tmp_path: Path) -> tuple[Path, str, list[int]]:
    """Return a cache with one small sealed shard, a key and its ids."""
    identity = replace(IDENTITY, top_k=2)
    how = CacheSettings(codec="exact", block_tokens=16)
    with LocalCache.create_or_open(tmp_path / "cache", identity, settings=how) as cache:
        rows = random_rows(2, 2)
        key = cache.put(TOKENS[:5], rows)
        cache.seal()
    return tmp_path / "cache", key, rows.ids.ravel().tolist()


def look(root: Path, key: str, ids: list[int]) -> bool:
    """Return whether verifying reports damage; check that reading returns the original or raises one of two errors."""
    with LocalCache.open(root) as cache:
        try:
            assert cache.get(key).rows.ids.ravel().tolist() == ids
        except (CorruptRecord, NotFound):
            assert not cache.is_intact(key)
        report = verify(cache)
        return bool(report.damaged)


@EVERY_PLACE_OR_SOME
def test_every_flipped_bit_of_a_sealed_shard_is_found(step: int, sealed: tuple[Path, str, list[int]]) -> None:
    root, key, ids = sealed
    (shard,) = shard_paths(root / "shards")
    whole = shard.read_bytes()
    assert not look(root, key, ids)
    for bit in range(0, 8 * len(whole), step):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(damaged)
        assert look(root, key, ids), f"bit {bit}"


@EVERY_PLACE_OR_SOME
def test_every_length_of_a_cut_shard_is_found(step: int, sealed: tuple[Path, str, list[int]]) -> None:
    root, key, ids = sealed
    (shard,) = shard_paths(root / "shards")
    whole = shard.read_bytes()
    for length in range(0, len(whole), step):
        shard.write_bytes(whole[:length])
        assert look(root, key, ids), f"{length} bytes"
    shard.write_bytes(whole + b"\0")
    assert look(root, key, ids)


@EVERY_PLACE_OR_SOME
def test_an_index_made_from_a_damaged_shard_serves_no_wrong_value(
    step: int, sealed: tuple[Path, str, list[int]]
) -> None:
    root, key, ids = sealed
    (shard,) = shard_paths(root / "shards")
    whole = shard.read_bytes()
    for bit in range(0, 8 * len(whole), 5 * step):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(damaged)
        (root / "index.sqlite").unlink()
        assert look(root, key, ids), f"bit {bit}"


def test_every_flipped_bit_and_every_cut_of_a_record_is_refused() -> None:
    rows = random_rows(2, 3)
    content = encode_block(KEY, rows, first_token=0, num_tokens=5, codec=CODECS["compact"], vocab_size=VOCABULARY)
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptRecord):
            check_record(memoryview(damaged))
    for length in range(len(content)):
        with pytest.raises(CorruptRecord):
            check_record(memoryview(content)[:length])
    with pytest.raises(CorruptRecord, match="not the"):
        check_record(memoryview(content + bytes(32)))


def reseal(header: Header, payload: bytes) -> tuple[Header, memoryview]:
    """Return a record with valid checksums for a payload that the encoder did not write."""
    return replace(header, payload_bytes=len(payload), checksum=xxhash.xxh3_128_digest(payload)), memoryview(payload)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kept_mass", [1.0, 0.8])
def test_a_payload_with_the_right_checksum_and_wrong_content_is_refused(codec: str, kept_mass: float) -> None:
    rows = keep_mass(random_rows(4, 8), kept_mass=kept_mass, min_k=1, temperatures=TEMPERATURES)
    content = encode_block(KEY, rows, first_token=0, num_tokens=9, codec=CODECS[codec], vocab_size=VOCABULARY)
    header, payload = check_record(memoryview(content))
    for length in range(len(payload)):
        with pytest.raises(CorruptRecord):
            decode_block(*reseal(header, bytes(payload[:length])), vocab_size=VOCABULARY, num_temperatures=2)
    for changed in (
        replace(header, num_rows=5),
        replace(header, num_rows=3),
        replace(header, num_kept=header.num_kept + 1),
        replace(header, codec=9),
        replace(header, num_tokens=200),
    ):
        with pytest.raises(CorruptRecord):
            decode_block(changed, payload, vocab_size=VOCABULARY, num_temperatures=2)
    for byte in range(len(payload)):
        damaged = bytearray(payload)
        damaged[byte] ^= 0xFF
        # The only error that bytes may cause; other bytes may be other valid rows.
        with suppress(CorruptRecord):
            decode_block(*reseal(header, bytes(damaged)), vocab_size=VOCABULARY, num_temperatures=2)


def test_a_record_of_an_unknown_kind_is_refused() -> None:
    header = Header.from_bytes(memoryview(encode_trajectory(KEY, [], num_tokens=3)))
    fields = bytearray(header.to_bytes()[:-8])
    fields[8] = 7
    with pytest.raises(CorruptRecord, match="it is of the unknown kind 7"):
        Header.from_bytes(memoryview(fields + xxhash.xxh3_64_intdigest(fields).to_bytes(8, "little")))


def test_a_trajectory_with_the_right_checksum_and_wrong_content_is_refused() -> None:
    blocks = [BlockOfTrajectory(0, 5, KEY), BlockOfTrajectory(2, 4, KEY[::-1])]
    header, payload = check_record(memoryview(encode_trajectory(KEY, blocks, num_tokens=99)))
    assert decode_trajectory(header, payload) == tuple(blocks)
    for length in range(len(payload)):
        with pytest.raises(CorruptRecord):
            decode_trajectory(*reseal(header, bytes(payload[:length])))
    for changed in (replace(header, num_rows=8), replace(header, kind=Kind.BLOCK)):
        with pytest.raises(CorruptRecord):
            decode_trajectory(changed, payload)


@given(st.data())
def test_rising_numbers_survive_whatever_width_suits_them(data: st.DataObject) -> None:
    universe = data.draw(st.one_of(st.integers(1, 1000), st.integers(1, 2**32)))
    count = data.draw(st.integers(0, min(universe, 200)))
    numbers = np.array(
        sorted(data.draw(st.sets(st.integers(0, universe - 1), min_size=count, max_size=count))), np.uint32
    )
    content = elias_fano.encode(numbers, universe)
    assert len(content) == elias_fano.encoded_bytes(count, universe)
    np.testing.assert_array_equal(elias_fano.decode(memoryview(content), count, universe), numbers)
    for wrong in (content[:-1], content + b"\0"):
        with pytest.raises(CorruptRecord, match="bytes, not"):
            elias_fano.decode(memoryview(wrong), count, universe)


@pytest.mark.parametrize("codec", CODECS)
def test_the_size_that_is_planned_is_the_size_that_comes(codec: str) -> None:
    generator = np.random.default_rng(0)
    ids = np.stack([generator.choice(151_936, 128, replace=False) for _ in range(1024)]).astype(np.uint32)
    logprobs = -np.sort(generator.exponential(2.0, (1024, 128)), axis=1)
    logprobs -= np.logaddexp.reduce(logprobs, axis=1, keepdims=True) + 0.01
    column = np.full(1024, -5, np.float32)
    rows = TopKRows(
        np.arange(1, 1025, dtype=np.uint32), ids, logprobs.astype(np.float32), column, column, column[:, None]
    )
    content = encode_block(KEY, rows, first_token=1, num_tokens=1024, codec=CODECS[codec], vocab_size=151_936)
    planned = bytes_per_row(codec, top_k=128, vocab_size=151_936, num_temperatures=1)
    # The archive's estimate assumes values like those of a language model; these are harder to compress.
    assert len(content) / 1024 == pytest.approx(planned, rel=0.15 if codec == "archive" else 0.005)


def test_a_log_probability_below_float16_stays_finite() -> None:
    rows = random_rows(1, 8)
    low = replace(rows, target_logprob=np.full(1, -1e6, np.float32))
    for codec in CODECS.values():
        content = encode_block(KEY, low, first_token=0, num_tokens=9, codec=codec, vocab_size=VOCABULARY)
        read = decode_block(*check_record(memoryview(content)), vocab_size=VOCABULARY, num_temperatures=2)
        assert read.target_logprob_N.tolist() == [-65504]


def test_archive_keeps_gaps_and_steps_of_every_size() -> None:
    """Gaps of one, two and three bytes, and log-probabilities so low that their step takes two."""
    counts_N = np.array([4], np.int64)
    ids_n, logprobs_n = np.array([3, 700, 70_700, 151_935], np.uint32), np.array([-0.01, -6, -50, -90], np.float32)
    content, read_n = ARCHIVE.encode(KeptIds(counts_N, ids_n, logprobs_n), vocab_size=151_936)
    back = ARCHIVE.decode(memoryview(content), counts_N, vocab_size=151_936)
    np.testing.assert_array_equal(back.ids_n, ids_n)
    np.testing.assert_array_equal(back.logprobs_n, read_n)
    np.testing.assert_allclose(back.logprobs_n, logprobs_n, atol=0.126)


def test_a_row_keeps_all_its_ids_where_all_of_its_mass_is_asked_for(tmp_path: Path) -> None:
    """Includes a row whose mass reaches 1 before its last id because of rounding."""
    logprobs = np.log(np.array([[0.6, 0.402, 0.001]], np.float32))
    rows = TopKRows(
        positions=np.array([1], np.uint32),
        ids=np.array([[5, 6, 7]], np.uint32),
        logprobs=logprobs,
        tail_logmass=np.full(1, -np.inf, np.float32),
        target_logprob=logprobs[:, 0],
        tail_logsumexps=np.full((1, len(TEMPERATURES)), -np.inf, np.float32),
    )
    settings = CacheSettings(codec="exact", kept_mass=1, min_k=1)
    with LocalCache.create_or_open(tmp_path / "cache", replace(IDENTITY, top_k=3), settings=settings) as cache:
        read = cache.get(cache.put(np.array([1, 5], np.uint32), rows)).rows
    np.testing.assert_array_equal(read.ids, rows.ids)
