"""What the cache's codecs cost and how fast they are read, beside numpy's .npz and a copy of as many bytes.

    python benchmarks/cache.py [--rows 20000] [--top-k 128] [--json]
    python benchmarks/cache.py --teacher runs/demo/teacher --tokens runs/demo/tokens.parquet

Rows are synthetic (a random set of ids, log-probabilities that fall like a language model's) or, with --teacher and
--tokens, a real teacher's. `kl_nats` compares what is read with what was put in, in float64, over the kept ids and the
tail. `loader` fills torch tensors on the host, `decode` stops at arrays, which with the codec exact are views of the file;
`1,024 tokens` is a random read by the loader. `npz` is an uncompressed file per 1,024 tokens with int32 ids and float16 log-probabilities, 768 bytes a token at
top 128; `memcpy` copies as many bytes as a codec's records take. Reading is from the page cache and after a first read,
which checks the bytes: what is compared is a reader's work, not the disk's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hyperagent.cache.check import count
from hyperagent.cache.codecs import CODECS
from hyperagent.cache.manifest import CacheSettings
from hyperagent.cache.store import TopKCache
from hyperagent.data.tokens import read_tokens
from hyperagent.identity import TeacherIdentity
from hyperagent.loader.rows import load_rows
from hyperagent.topk import TopKRows, concatenate
from hyperagent_teacher.transformers_engine import TransformersEngine

VOCABULARY = 151_936
BLOCK = 1024
REPETITIONS = 5
KEPT_MASS = 0.999


def synthetic_rows(num_rows: int, top_k: int) -> tuple[TeacherIdentity, TopKRows]:
    """Rows whose ids have no pattern, which is the worst case for a codec."""
    generator = np.random.default_rng(0)
    # No two alike, so that their order needs no ids.
    logits = -(1e-3 + generator.exponential(0.15, size=(num_rows, top_k))).cumsum(axis=1)
    logprobs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True) - 0.01).astype(np.float32)
    # A random offset for each row of a random subset of a coarser grid, with a random remainder: distinct, and uniform.
    cells = np.argpartition(generator.random((num_rows, 8 * top_k)), top_k, axis=1)[:, :top_k]
    width = VOCABULARY // (8 * top_k)
    ids = cells * width + generator.integers(0, width, size=cells.shape)
    rows = TopKRows(
        positions=np.arange(1, num_rows + 1, dtype=np.uint32),
        ids=ids.astype(np.uint32),
        logprobs=logprobs,
        tail_logmass=np.log(-np.expm1(np.logaddexp.reduce(logprobs, axis=1, dtype=np.float64))).astype(np.float32),
        target_logprob=logprobs[:, 0],
        tail_logsumexps=np.empty((num_rows, 0), np.float32),
    )
    return TeacherIdentity("t", "0" * 64, "float32", "x", "0" * 64, "0" * 64, VOCABULARY, top_k), rows


def teacher_rows(teacher: Path, tokens: Path, num_rows: int, top_k: int) -> tuple[TeacherIdentity, TopKRows]:
    """A real teacher's rows, of trajectory after trajectory, as those of one long sequence."""
    engine = TransformersEngine(teacher, tokenizer_folder=teacher, top_k=top_k, max_tokens=131_072)

    async def collect() -> list[TopKRows]:
        parts: list[TopKRows] = []
        for trajectory in read_tokens(tokens):
            async for rows in engine.score(trajectory.token_ids, trajectory.positions, top_k=top_k):
                parts.append(rows)
            if sum(part.num_rows for part in parts) >= num_rows:
                break
        return parts

    rows = concatenate(asyncio.run(collect()))
    engine.close()
    return engine.identity, replace(rows, positions=np.arange(1, rows.num_rows + 1, dtype=np.uint32))


def kl_nats(true: TopKRows, read: TopKRows) -> float:
    """Mean over rows of KL(true || read) over the ids that `read` keeps and the rest, in nats."""
    total = 0.0
    for start in range(0, true.num_rows, BLOCK):
        p, q = true.part(slice(start, start + BLOCK)), read.part(slice(start, start + BLOCK))
        by_id_p, by_id_q = np.argsort(p.ids, axis=1), np.argsort(q.ids, axis=1)
        logp = np.take_along_axis(p.logprobs, by_id_p, axis=1).astype(np.float64)
        logq = np.take_along_axis(q.logprobs, by_id_q, axis=1).astype(np.float64)
        assert (np.take_along_axis(p.ids, by_id_p, axis=1) == np.take_along_axis(q.ids, by_id_q, axis=1)).all()
        tail_p, tail_q = p.tail_logmass.astype(np.float64), q.tail_logmass.astype(np.float64)
        # Both are distributions but for rounding; the divergence of two that are not could be below zero.
        norm_p = np.logaddexp(np.logaddexp.reduce(logp, axis=1), tail_p)
        norm_q = np.logaddexp(np.logaddexp.reduce(logq, axis=1), tail_q)
        kept = np.exp(logp - norm_p[:, None]) * (logp - norm_p[:, None] - logq + norm_q[:, None])
        total += float(kept.sum() + (np.exp(tail_p - norm_p) * (tail_p - norm_p - tail_q + norm_q)).sum())
    return total / true.num_rows


def median_s(action: Callable[[], object]) -> float:
    """Median of `REPETITIONS` runs after a first one, in seconds."""
    action()
    times = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure_codec(root: Path, settings: CacheSettings, identity: TeacherIdentity, rows: TopKRows) -> dict[str, float]:
    """Size, distortion and speed of one way to store `rows`."""
    token_ids = np.zeros(rows.num_rows + 1, np.uint32)
    with TopKCache.create_or_open(root, identity, settings=settings) as cache:
        started = time.perf_counter()
        key = cache.put(token_ids, rows)
        write_s = time.perf_counter() - started
        cache.seal()
        blocks = [block.key for block in cache.trajectory(key).blocks]
        stats = count(cache)
        middle = len(blocks) // 2 * BLOCK
        read = cache.get(key).rows
        result = {
            "bytes_per_token": stats.bytes_per_token,
            "mean_k": stats.mean_k,
            "kept_mass": stats.kept_mass,
            "write_tokens_per_s": rows.num_rows / write_s,
            "loader_tokens_per_s": rows.num_rows / median_s(lambda: load_rows(cache, key)),
            "decode_tokens_per_s": rows.num_rows / median_s(lambda: [None for _ in cache.rows_of(blocks)]),
            "random_read_ms": 1e3
            * median_s(lambda: load_rows(cache, key, first_token=middle, end_token=middle + BLOCK)),
            "random_view_ms": 1e3 * median_s(lambda: next(cache.rows_of(blocks[len(blocks) // 2 :][:1]))),
            "memcpy_tokens_per_s": rows.num_rows / median_s(lambda: _copy(stats.bytes)),
        }
        if settings.kept_mass == 1:
            result["kl_nats"] = kl_nats(rows, read)
        return result


def _copy(size: int) -> None:
    _SOURCE[:size].copy()


_SOURCE = np.ones(1 << 28, np.uint8)


def measure_npz(root: Path, rows: TopKRows) -> dict[str, float]:
    """The same of `numpy.savez`, a file per block."""
    root.mkdir()
    paths = []
    for start in range(0, rows.num_rows, BLOCK):
        part = rows.part(slice(start, start + BLOCK))
        paths.append(root / f"{start}.npz")
        np.savez(paths[-1], indices=part.ids.astype(np.int32), values=part.logprobs.astype(np.float16))

    def load(path: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            _ = arrays["indices"], arrays["values"]

    return {
        "bytes_per_token": sum(path.stat().st_size for path in paths) / rows.num_rows,
        "loader_tokens_per_s": rows.num_rows / median_s(lambda: [load(path) for path in paths]),
        "random_read_ms": 1e3 * median_s(lambda: load(paths[len(paths) // 2])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--top-k", type=int, default=128)
    parser.add_argument("--teacher", type=Path, help="folder of a teacher")
    parser.add_argument("--tokens", type=Path, help="tokens file with trajectories to score")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if (options.teacher is None) != (options.tokens is None):
        parser.error("--teacher and --tokens belong together")
    if options.teacher:
        identity, rows = teacher_rows(options.teacher, options.tokens, options.rows, options.top_k)
    else:
        identity, rows = synthetic_rows(options.rows, options.top_k)
    with tempfile.TemporaryDirectory() as folder:
        codecs = {
            name: measure_codec(Path(folder) / name, CacheSettings(codec=name), identity, rows) for name in CODECS
        }
        codecs["compact, adaptive"] = measure_codec(
            Path(folder) / "adaptive", CacheSettings(kept_mass=KEPT_MASS), identity, rows
        )
        npz = measure_npz(Path(folder) / "npz", rows)
    report = {
        "machine": platform.processor() or platform.machine(),
        "rows": "teacher" if options.teacher else "synthetic",
        "vocabulary": identity.vocab_size,
        "top_k": options.top_k,
        "supervised_tokens": rows.num_rows,
        "codecs": codecs,
        "npz": npz,
        "random_read_ms": codecs["exact"]["random_read_ms"],
        "npz_random_read_ms": npz["random_read_ms"],
    }
    print(json.dumps(report, indent=2) if options.json else _table(report))


def _table(report: dict[str, Any]) -> str:
    columns = {
        "bytes_per_token": ("B/token", ".1f"), "kl_nats": ("KL, nats", ".1e"), "mean_k": ("mean k", ".1f"),
        "kept_mass": ("mass", ".4f"), "write_tokens_per_s": ("write/s", ",.0f"),
        "loader_tokens_per_s": ("loader/s", ",.0f"), "decode_tokens_per_s": ("decode/s", ",.0f"),
        "memcpy_tokens_per_s": ("memcpy/s", ",.0f"), "random_read_ms": ("1,024 tokens, ms", ".3f"),
    }  # fmt: skip
    lines = [
        f"{report['supervised_tokens']:,} rows ({report['rows']}), top {report['top_k']} of {report['vocabulary']:,}, "
        f"{report['machine']}",
        f"{'':18}" + "".join(f"{title:>17}" for title, _ in columns.values()),
    ]
    for name, found in [*report["codecs"].items(), ("npz", report["npz"])]:
        cells = [f"{found[column]:{form}}" if column in found else "" for column, (_, form) in columns.items()]
        lines.append(f"{name:18}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
