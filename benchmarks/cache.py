"""Measure size, accuracy and speed of the cache's codecs against numpy's .npz, a plain memory copy, and Redis.

    python benchmarks/cache.py [--rows 20000] [--top-k 128] [--json]
    python benchmarks/cache.py --data trajectories.parquet --tokenizer FOLDER

Rows are a real teacher's: a tiny Qwen3-MoE with the tokenizer's whole vocabulary, trained for `--train-s` seconds on
the trajectories (cached in runs/benchmark) and evaluated on repositories it has not seen. In addition, `synthetic` rows
have random ids, the worst case for a codec, and log-probabilities that fall like a language model's. Without
trajectories only synthetic rows are measured.

`kl_nats` compares the rows read with the rows written, in float64, over the kept ids and the tail. `loader` fills torch
tensors on the host; `decode` stops at arrays, which with the codec exact are views of the file. `random_read_ms` finds
1,024 tokens of a trajectory and reads them into arrays, compared with `numpy.load`; both read a byte of each cache
line. `random_load_ms` makes tensors of them. `npz` is an uncompressed file per 1,024 tokens with int32 ids and float16
log-probabilities, 768 bytes per token at top 128; `memcpy` copies as many bytes as a codec's records take. Files are
read from the page cache, after a first read that verifies the checksums, so the reader's work is measured and not the
disk's. `adaptive` keeps 0.999 of a row's probability with at least 8 ids, and `by_entropy` gives its size for rows of
each entropy: a tiny teacher is uncertain about most tokens and a large one about few, so use it to estimate a large
teacher's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from teacher_rows import entropy_nats, synthetic_rows, teacher_rows

from hyperagent.cache.format.codecs import CODECS
from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.cache.hot_tier import HotTier
from hyperagent.cache.local import LocalCache
from hyperagent.cache.maintenance.stats import count
from hyperagent.identity import TeacherIdentity
from hyperagent.topk import TopKRows
from hyperagent_trainer.data.row_loader import load_rows

BLOCK = 1024
REPETITIONS = 5
ADAPTIVE = {"kept_mass": 0.999, "min_k": 8}
ENTROPIES = (0.0, 0.05, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, np.inf)
"""Bounds of `by_entropy`, in nats."""
FEWEST_ROWS = 100
"""Minimum number of rows in an entropy bin for a meaningful result."""
PUBLISHED = {
    # Its README states about 300 bytes at a vocabulary of 50,000; this is the same layout with ids of 18 bits.
    "distillkit_bytes_per_token": 344,
}
TRAJECTORIES, ROWS_PER_TRAJECTORY = 50, 4096
"""Of `measure_run_start`."""
DATA = Path("../shared/data")


def kl_nats(true: TopKRows, read: TopKRows) -> float:
    """Return the mean over rows of KL(true || read) over the ids that `read` keeps and the rest, in nats."""
    total = 0.0
    for start in range(0, true.num_rows, BLOCK):
        p, q = true.part(slice(start, start + BLOCK)), read.part(slice(start, start + BLOCK))
        by_id_p, by_id_q = np.argsort(p.ids, axis=1), np.argsort(q.ids, axis=1)
        logp = np.take_along_axis(p.logprobs, by_id_p, axis=1).astype(np.float64)
        logq = np.take_along_axis(q.logprobs, by_id_q, axis=1).astype(np.float64)
        assert (np.take_along_axis(p.ids, by_id_p, axis=1) == np.take_along_axis(q.ids, by_id_q, axis=1)).all()
        tail_p, tail_q = p.tail_logmass.astype(np.float64), q.tail_logmass.astype(np.float64)
        # Renormalize: both are distributions up to rounding, which could otherwise make the divergence negative.
        norm_p = np.logaddexp(np.logaddexp.reduce(logp, axis=1), tail_p)
        norm_q = np.logaddexp(np.logaddexp.reduce(logq, axis=1), tail_q)
        kept = np.exp(logp - norm_p[:, None]) * (logp - norm_p[:, None] - logq + norm_q[:, None])
        total += float(kept.sum() + (np.exp(tail_p - norm_p) * (tail_p - norm_p - tail_q + norm_q)).sum())
    return total / true.num_rows


def median_s(action: Callable[[], object], *, times: int = REPETITIONS) -> float:
    """Return the median seconds of several runs after a warm-up run."""
    action()
    took = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def read_block(cache: LocalCache, key: str, index: int) -> None:
    """Find one block of a trajectory and read its ids and log-probabilities."""
    (block,) = [block for block in cache.trajectory(key).blocks if block.index == index]
    (stored,) = cache.rows_of([block.key])
    look_at(stored.kept.ids_n)
    look_at(stored.kept.logprobs_n)


def look_at(array: np.ndarray) -> int:
    """Read a byte of each cache line, so that memory-mapped data are fetched too."""
    return int(array.reshape(-1).view(np.uint8)[::64].sum())


def measure_codec(root: Path, settings: CacheSettings, identity: TeacherIdentity, rows: TopKRows) -> dict[str, float]:
    """Measure size, distortion and speed of one way to store `rows`."""
    token_ids = np.zeros(rows.num_rows + 1, np.uint32)
    with LocalCache.create_or_open(root, identity, settings=settings) as cache:
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
            "random_read_ms": 1e3 * median_s(lambda: read_block(cache, key, middle // BLOCK), times=200),
            "random_load_ms": 1e3
            * median_s(lambda: load_rows(cache, key, first_token=middle, end_token=middle + BLOCK), times=200),
            "memcpy_tokens_per_s": rows.num_rows / median_s(lambda: _copy(stats.bytes)),
        }
        # With adaptive k, rows cannot be compared id by id; use the divergence that the cache recorded.
        result["kl_nats"] = kl_nats(rows, read) if settings.kept_mass == 1 else stats.kl_nats
        return result


def _copy(size: int) -> None:
    _SOURCE[:size].copy()


_SOURCE = np.ones(1 << 28, np.uint8)


def measure_npz(root: Path, rows: TopKRows) -> dict[str, float]:
    """Measure size, distortion and speed of `numpy.savez` with a file per block."""
    root.mkdir()
    paths = []
    for start in range(0, rows.num_rows, BLOCK):
        part = rows.part(slice(start, start + BLOCK))
        paths.append(root / f"{start}.npz")
        np.savez(paths[-1], indices=part.ids.astype(np.int32), values=part.logprobs.astype(np.float16))

    def load(path: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            look_at(arrays["indices"])
            look_at(arrays["values"])

    def load_all() -> None:
        for path in paths:
            load(path)

    return {
        "bytes_per_token": sum(path.stat().st_size for path in paths) / rows.num_rows,
        "loader_tokens_per_s": rows.num_rows / median_s(load_all),
        "random_read_ms": 1e3 * median_s(lambda: load(paths[len(paths) // 2]), times=200),
    }


def measure_redis(root: Path, identity: TeacherIdentity, rows: TopKRows) -> dict[str, float | str]:
    """Measure reading through a Redis that holds all records, and from disk only, with the default codec."""
    if shutil.which("redis-server") is None:
        return {"not_measured": "there is no redis-server"}
    token_ids = np.zeros(rows.num_rows + 1, np.uint32)
    with redis_server(root) as url:
        hot = HotTier.connect(url)
        with LocalCache.create_or_open(root / "cache", identity, hot=hot) as cache:
            key = cache.put(token_ids, rows)
            load_rows(cache, key)
            hot.flush()
            before = cache.hot_tier_stats
            middle = rows.num_rows // BLOCK // 2 * BLOCK
            found: dict[str, float | str] = {
                "get_tokens_per_s": rows.num_rows / median_s(lambda: load_rows(cache, key)),
                "get_random_load_ms": 1e3 * median_s(lambda: load_rows(cache, key, first_token=middle, end_token=middle + BLOCK)),
            }  # fmt: skip
            assert cache.hot_tier_stats.since(before).misses == 0, (
                "Redis did not have everything; this is not its figure"
            )
    with LocalCache.open(root / "cache") as cache:
        found["disk_tokens_per_s"] = rows.num_rows / median_s(lambda: load_rows(cache, key))
        found["disk_random_load_ms"] = 1e3 * median_s(
            lambda: load_rows(cache, key, first_token=middle, end_token=middle + BLOCK)
        )
    return found


def measure_run_start(root: Path, identity: TeacherIdentity, rows: TopKRows) -> dict[str, float]:
    """What a run's start takes, that looks every trajectory up, against one that would read and check them all.

    Both include the key, a digest of all tokens. Reading is from the page cache, so from a disk it takes longer.
    """
    part = rows.part(slice(min(rows.num_rows, ROWS_PER_TRAJECTORY)))
    sequences = [np.full(int(part.positions[-1]) + 1, number, np.uint32) for number in range(TRAJECTORIES)]
    with LocalCache.create_or_open(root, identity) as cache:
        for token_ids in sequences:
            cache.put(token_ids, part)
        size = count(cache).bytes
    with LocalCache.open(root) as cache:
        keys = [cache.key(token_ids, part.positions) for token_ids in sequences]
        assert all(map(cache.is_intact, keys))
        look_up_s = median_s(lambda: [cache.contains(cache.key(ids, part.positions)) for ids in sequences])
        read_s = median_s(lambda: [cache.is_intact(cache.key(ids, part.positions)) for ids in sequences])
    to_10_gb = 10e9 / size
    return {
        "bytes_per_trajectory": size / TRAJECTORIES,
        "look_up_s_per_1000_trajectories": 1000 * look_up_s / TRAJECTORIES,
        "read_s_per_1000_trajectories": 1000 * read_s / TRAJECTORIES,
        "look_up_s_of_10_gb": look_up_s * to_10_gb,
        "read_s_of_10_gb": read_s * to_10_gb,
    }


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Start an empty, memory-only Redis on a Unix socket and yield its URL."""
    folder.mkdir()
    socket = folder / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not socket.exists():
            assert process.poll() is None, "redis-server has ended"
            time.sleep(0.01)
        yield f"unix://{socket}"
    finally:
        process.terminate()
        process.wait()


def by_entropy(root: Path, identity: TeacherIdentity, rows: TopKRows) -> list[dict[str, float | None]]:
    """Measure the size of adaptive k for rows of each entropy, with real files that hold only such rows."""
    entropy_N = entropy_nats(rows, identity.vocab_size)
    table = []
    for place, (low, high) in enumerate(itertools.pairwise(ENTROPIES)):
        chosen = np.flatnonzero((entropy_N >= low) & (entropy_N < high))
        if len(chosen) < FEWEST_ROWS:
            continue
        part = replace(rows.at(chosen), positions=np.arange(1, len(chosen) + 1, dtype=np.uint32))
        line: dict[str, float | None] = {
            "from_nats": low,
            "to_nats": high if np.isfinite(high) else None,
            "share": len(chosen) / rows.num_rows,
        }
        for codec in ("compact", "archive"):
            with LocalCache.create_or_open(
                root / f"{place}-{codec}", identity, settings=CacheSettings(codec=codec, **ADAPTIVE)
            ) as cache:
                cache.put(np.zeros(part.num_rows + 1, np.uint32), part)
                stats = count(cache)
            line |= {
                "mean_k": stats.mean_k,
                "kept_mass": stats.kept_mass,
                f"{codec}_bytes_per_token": stats.bytes_per_token,
            }
        table.append(line)
    return table


def measure(identity: TeacherIdentity, rows: TopKRows) -> dict[str, Any]:
    """Run all measurements on one set of rows."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        settings = {name: CacheSettings(codec=name) for name in CODECS}
        settings |= {f"{name}, adaptive": CacheSettings(codec=name, **ADAPTIVE) for name in ("compact", "archive")}
        codecs = {name: measure_codec(root / name, each, identity, rows) for name, each in settings.items()}
        npz = measure_npz(root / "npz", rows)
        return {
            "vocabulary": identity.vocab_size,
            "top_k": rows.top_k,
            "supervised_tokens": rows.num_rows,
            "mean_entropy_nats": float(entropy_nats(rows, identity.vocab_size).mean()),
            "codecs": codecs,
            "npz": npz,
            "random_read_ms": codecs["exact"]["random_read_ms"],
            "npz_random_read_ms": npz["random_read_ms"],
            "run_start": measure_run_start(root / "start", identity, rows),
            "redis": measure_redis(root / "redis", identity, rows),
            "by_entropy": by_entropy(root / "entropy", identity, rows),
        }


def machine() -> dict[str, Any]:
    """Describe the machine and software of the measurements."""
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in facts.splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--top-k", type=int, default=128)
    parser.add_argument("--data", type=Path, default=DATA / "trajectories/dev.parquet", help="trajectories in Parquet")
    parser.add_argument("--tokenizer", type=Path, default=DATA / "qwen-tokenizer", help="folder of a tokenizer")
    parser.add_argument("--train-s", type=float, default=420.0, help="seconds of the teacher's training")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see whether it runs")
    options = parser.parse_args()
    if options.smoke:
        options.rows, options.top_k, options.data = 2048, 16, Path("none")  # Synthetic rows only.
    synthetic = measure(*synthetic_rows(options.rows, options.top_k))
    report: dict[str, Any] = {"machine": machine(), "published": PUBLISHED}
    if options.data.is_file():
        teacher = teacher_rows(
            options.data, options.tokenizer, store=Path("runs/benchmark"), num_rows=options.rows, top_k=options.top_k,
            train_s=options.train_s,
        )  # fmt: skip
        report |= {"rows": "teacher", **measure(*teacher), "synthetic": synthetic}
    else:
        report |= {"rows": "synthetic", **synthetic}
    print(json.dumps(report, indent=2) if options.json else _text(report))


def _text(report: dict[str, Any]) -> str:
    parts = [f"{report['machine']['processor']}, {report['machine']['cores']} cores", _table(report["rows"], report)]
    if "synthetic" in report:
        parts.append(_table("synthetic", report["synthetic"]))
    return "\n\n".join(parts)


def _table(name: str, part: dict[str, Any]) -> str:
    columns = {
        "bytes_per_token": ("B/token", ".1f"), "kl_nats": ("KL, nats", ".1e"), "mean_k": ("mean k", ".1f"),
        "kept_mass": ("mass", ".4f"), "write_tokens_per_s": ("write/s", ",.0f"),
        "loader_tokens_per_s": ("loader/s", ",.0f"), "decode_tokens_per_s": ("decode/s", ",.0f"),
        "memcpy_tokens_per_s": ("memcpy/s", ",.0f"), "random_read_ms": ("read 1,024, ms", ".3f"),
        "random_load_ms": ("load 1,024, ms", ".3f"),
    }  # fmt: skip
    lines = [
        f"{part['supervised_tokens']:,} {name} rows, top {part['top_k']} of {part['vocabulary']:,}, mean entropy "
        f"{part['mean_entropy_nats']:.2f} nats",
        f"{'':18}" + "".join(f"{title:>17}" for title, _ in columns.values()),
    ]
    for title, found in [*part["codecs"].items(), ("npz", part["npz"])]:
        cells = [f"{found[column]:{form}}" if column in found else "" for column, (_, form) in columns.items()]
        lines.append(f"{title:18}" + "".join(f"{cell:>17}" for cell in cells))
    lines.append("redis: " + ", ".join(f"{key} {value:,.3f}" if isinstance(value, float) else f"{value}" for key, value in part["redis"].items()))  # fmt: skip
    start = part["run_start"]
    lines.append(
        f"run start per 1,000 trajectories of {start['bytes_per_trajectory']:,.0f} bytes: look-up "
        f"{start['look_up_s_per_1000_trajectories']:.3f} s, reading {start['read_s_per_1000_trajectories']:.2f} s; "
        f"10 GB: {start['look_up_s_of_10_gb']:.2f} s, {start['read_s_of_10_gb']:.1f} s"
    )
    lines.append("adaptive k by entropy, nats: share, mean k, kept mass, bytes per token compact and archive")
    for line in part["by_entropy"]:
        upper = f"{line['to_nats']:g}" if line["to_nats"] is not None else "above"
        lines.append(
            f"  {line['from_nats']:g} to {upper:5} {line['share']:8.1%} {line['mean_k']:7.1f} {line['kept_mass']:8.4f} "
            f"{line['compact_bytes_per_token']:8.1f} {line['archive_bytes_per_token']:8.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
