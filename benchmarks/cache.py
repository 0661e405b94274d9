"""Writing and reading the cache, against numpy's .npz and against plain files of the same size.

    python benchmarks/cache.py [--records 40] [--rows 2000] [--top-k 128] [--json]

`npz` is `numpy.savez_compressed` and `numpy.load` of the same arrays, the layout that comparable tools use; it has no
checksum over the whole. `plain files` writes and reads as many bytes, synced the same way, and is the bound of any format
of this size. Reading is from the page cache: what is compared is the work of a reader, not of the disk.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hyperagent.cache.store import TopKCache
from hyperagent.files import write_atomically
from hyperagent.identity import TeacherIdentity
from hyperagent.topk import TopKRows

VOCABULARY = 151_669


def random_rows(rows: int, top_k: int, generator: np.random.Generator) -> TopKRows:
    """Rows with the shape of a language model's: a few likely ids and a long tail."""
    # No two alike, so that their order needs no ids.
    logits = -(1e-3 + generator.exponential(0.2, size=(rows, top_k))).cumsum(axis=1)
    total = np.logaddexp.reduce(logits, axis=1, keepdims=True) + 0.01
    logprobs = logits - total
    ids = np.argsort(generator.random((rows, 4 * top_k)), axis=1)[:, :top_k] * (VOCABULARY // (4 * top_k))
    return TopKRows(
        positions=np.arange(1, rows + 1, dtype=np.uint32),
        ids=ids.astype(np.uint32),
        logprobs=logprobs.astype(np.float32),
        tail_logmass=np.log(-np.expm1(np.logaddexp.reduce(logprobs, axis=1))).astype(np.float32),
        target_logprob=logprobs[:, 0].astype(np.float32),
    )


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--top-k", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    data = [random_rows(options.rows, options.top_k, generator) for _ in range(options.records)]
    identity = TeacherIdentity("t", "0" * 64, "float32", "x", "0" * 64, "0" * 64, VOCABULARY, options.top_k)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        cache = TopKCache.create_or_open(root / "cache", identity)
        keys = [
            cache.key(np.full(options.rows + 1, number, np.uint32), rows.positions) for number, rows in enumerate(data)
        ]

        def put() -> None:
            for key, rows in zip(keys, data, strict=True):
                cache.put(key, rows, num_tokens=options.rows + 1)

        def save() -> None:
            for number, rows in enumerate(data):
                np.savez_compressed(
                    root / f"{number}.npz", ids=rows.ids.astype(np.int32), logprobs=rows.logprobs.astype(np.float16),
                    positions=rows.positions, tail=rows.tail_logmass, target=rows.target_logprob,
                )  # fmt: skip

        def load() -> None:
            for number in range(len(data)):
                with np.load(root / f"{number}.npz", allow_pickle=False) as arrays:
                    for name in arrays.files:
                        _ = arrays[name]

        put_s, get_s = timed(put), timed(lambda: [cache.get(key) for key in keys])
        size = cache.stats().bytes
        save_s, load_s = timed(save), timed(load)
        npz_size = sum(path.stat().st_size for path in root.glob("*.npz"))
        content = b"\0" * (size // options.records)
        paths = [root / "plain" / str(number) for number in range(options.records)]
        write_s = timed(lambda: [write_atomically(path, content) for path in paths])
        read_s = timed(lambda: [path.read_bytes() for path in paths])
    tokens = options.records * options.rows
    results = [
        {
            "variant": name,
            "write_tokens_per_s": tokens / w,
            "read_tokens_per_s": tokens / r,
            "bytes_per_token": b / tokens,
        }
        for name, w, r, b in (
            ("cache", put_s, get_s, size),
            ("npz", save_s, load_s, npz_size),
            ("plain files", write_s, read_s, size),
        )
    ]
    report = {
        "machine": platform.processor() or platform.machine(),
        "tokens": tokens,
        "top_k": options.top_k,
        "results": results,
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{tokens:,} supervised tokens, top {options.top_k}, {report['machine']}")
    for result in results:
        print(
            f"{result['variant']:12} write {result['write_tokens_per_s']:>11,.0f} tokens/s  "
            f"read {result['read_tokens_per_s']:>11,.0f} tokens/s  {result['bytes_per_token']:6.0f} bytes/token"
        )


if __name__ == "__main__":
    main()
