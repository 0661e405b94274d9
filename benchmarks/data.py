"""Time rendering, tokenizing and masking against the stock `apply_chat_template`; measure the reader's memory.

    python benchmarks/data.py [--data FILE --tokenizer FOLDER] [--rows 60] [--repeats 3] [--json]
    python benchmarks/data.py --reader-gib 2.08 [--json]

`plain` is `apply_chat_template(tokenize=True)`, row by row, on messages and tools that are already clean: no mask, no
views, no checks. `plain, batched` processes all rows at once, which lets the tokenizer use every core. `views` is the
work of `hyperagent data tokenize` on a row: clean it, render and tokenize the teacher's and the condition view, compute
and compare the two masks. `views, internalized` makes a third view; `views, N processes` distributes the rows, and
includes the start of the processes. Each figure is the fastest of the repeats; the variants alternate.

Without `--data`, trajectories are generated whose tools print Python's own library, and a tokenizer is trained on them.
`--reader-gib` writes a file of that size with the data set's schema and 1,000 rows in a row group, streams it in a
separate process, and reports that process's peak memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hyperagent.data.chat.messages import dialogue_of
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.columns import Row
from hyperagent.data.files.reader import read_rows
from hyperagent.data.files.schema import TRAJECTORY_SCHEMA
from hyperagent.data.pipeline.parallel import available_cores, map_rows
from hyperagent.data.pipeline.tokenize_dataset import RowTask, RowTokenizer
from hyperagent.data.pipeline.views import ViewMaker, ViewSettings

_PEAK_OF_READER = r"""
import re, sys, time
from pathlib import Path
from hyperagent.data.files.reader import read_rows
started = time.perf_counter()
rows = characters = 0
for row in read_rows(Path(sys.argv[1])):
    rows += 1
    characters += sum(len(message["content"] or "") for message in row["trajectory"])
# Not ru_maxrss, which starts at what the parent had when it forked.
peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024
print(rows, characters, peak, time.perf_counter() - started)
"""


def library_texts() -> list[str]:
    """Return Python's own sources in pieces of the size that a tool prints."""
    folder = Path(json.__file__).parent.parent
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("*.py"))]
    return [text[start : start + 3000] for text in texts for start in range(0, len(text), 3000)]


def made_up_rows(count: int, turns: int, generator: random.Random) -> list[dict[str, Any]]:
    from hyperagent_demo.sample.tools import SYSTEM_PROMPT, TOOLS

    texts = library_texts()
    rows = []
    for number in range(count):
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": f"Task {number}: {generator.choice(texts)}"},
        ]
        for turn in range(turns):
            arguments = json.dumps({"command": f"sed -n {turn}p {generator.choice(texts)[:200]}"})
            call = {
                "id": f"{number}-{turn}",
                "type": "function",
                "function": {"name": "execute_bash", "arguments": arguments},
            }
            messages.append({"role": "assistant", "content": generator.choice(texts)[:300], "tool_calls": [call]})
            messages.append({"role": "tool", "content": generator.choice(texts)})
        row = dict.fromkeys(TRAJECTORY_SCHEMA.names)
        names = {"trajectory_id": f"t{number}", "instance_id": f"a__b-{number}", "repo": f"a/{number % 7}"}
        rows.append({**row, **names, "trajectory": messages, "tools": TOOLS})
    return rows


def throughput(rows: list[Row], tokenizer: ChatTokenizer, repeats: int) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    stock: Any = AutoTokenizer.from_pretrained(tokenizer.folder)
    clean = [(d.messages, d.tools or None) for d in map(dialogue_of, rows)]
    tasks = [RowTask(row, str(row["trajectory_id"]), "train", None) for row in rows]
    cores = available_cores()
    limits = {"max_tokens": 2**31, "max_prompt_tokens": 2**31}
    full = ViewSettings(**limits)
    hidden = ViewSettings(internalized=("system", "tools", "task"), **limits)

    def plain() -> int:
        return sum(
            len(stock.apply_chat_template(m, tools=t, tokenize=True, return_dict=True)["input_ids"]) for m, t in clean
        )

    def batched() -> int:
        texts = [stock.apply_chat_template(m, tools=t, tokenize=False) for m, t in clean]
        return sum(map(len, stock(texts, add_special_tokens=False)["input_ids"]))

    def views(settings: ViewSettings, processes: int) -> int:
        # Use a new tokenizer, so that no text is cached from the previous repeat.
        function = RowTokenizer(ViewMaker(ChatTokenizer(tokenizer.folder)), settings)
        results = map_rows(function, tasks, num_items=len(tasks), num_workers=processes)
        return sum(len(result.token_ids) for result in results)  # type: ignore[union-attr, misc]

    variants: dict[str, Callable[[], int]] = {
        "plain": plain,
        "plain, batched": batched,
        "views": lambda: views(full, 1),
        "views, internalized": lambda: views(hidden, 1),
        f"views, {cores} processes": lambda: views(full, cores),
    }
    tokens = {name: variant() for name, variant in variants.items()}
    assert len(set(tokens.values())) == 1, tokens
    seconds = dict.fromkeys(variants, float("inf"))
    for _ in range(repeats):
        for name, variant in variants.items():
            started = time.perf_counter()
            variant()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return [
        {
            "variant": name,
            "tokens": tokens[name],
            "seconds": seconds[name],
            "tokens_per_s": tokens[name] / seconds[name],
            "cost": seconds[name] / seconds["plain"],
            "cost_against_batched": seconds[name] / seconds["plain, batched"],
        }
        for name in variants
    ]


def reader_memory(gib: float) -> dict[str, Any]:
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "big.parquet"
        rows = 0
        with pq.ParquetWriter(path, TRAJECTORY_SCHEMA, compression="snappy") as writer:
            while path.stat().st_size < gib * 2**30:
                group = made_up_rows(1000, 40, generator)
                for number, row in enumerate(group):
                    # Random text, because a file of copies would compress to a fraction of its size.
                    row["trajectory"][-1]["content"] = generator.randbytes(20_000).hex()
                    row["trajectory_id"] = f"t{rows + number}"
                writer.write_table(pa.Table.from_pylist(group, schema=TRAJECTORY_SCHEMA), row_group_size=1000)
                rows += len(group)
        size = path.stat().st_size
        command = [sys.executable, "-c", _PEAK_OF_READER, str(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    read, characters, peak, seconds = int(printed[0]), int(printed[1]), int(printed[2]), float(printed[3])
    assert read == rows
    return {
        "file_gib": size / 2**30,
        "rows": rows,
        "text_gib": characters / 2**30,
        "peak_gib": peak / 2**30,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reader-gib", type=float)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see whether it runs")
    options = parser.parse_args()
    if options.smoke:
        options.rows, options.repeats = 4, 1
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "cores": available_cores(),
    }
    if options.reader_gib:
        report["reader"] = reader_memory(options.reader_gib)
    else:
        with tempfile.TemporaryDirectory() as folder:
            if options.data:
                rows: list[Row] = list(islice(read_rows(options.data), options.rows))
                tokenizer = options.tokenizer
            else:
                from hyperagent_demo.tokenizer import train_tokenizer

                rows, tokenizer = [*made_up_rows(options.rows, 30, random.Random(0))], Path(folder) / "tokenizer"
                train_tokenizer(library_texts(), tokenizer, vocab_size=8192)
            report["rows"] = len(rows)
            report["results"] = throughput(rows, ChatTokenizer(tokenizer), options.repeats)
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['machine']}, {report['cores']} cores")
    for result in report.get("results", []):
        print(
            f"{result['variant']:22} {result['seconds']:6.2f} s  {result['tokens_per_s']:>9,.0f} tokens/s  "
            f"{result['cost']:.2f} x plain  {result['cost_against_batched']:.2f} x plain, batched"
        )
    if reader := report.get("reader"):
        print(
            f"reader: {reader['file_gib']:.2f} GiB, {reader['rows']:,} rows, {reader['text_gib']:.1f} GiB of text, "
            f"{reader['seconds']:.0f} s, peak {reader['peak_gib']:.2f} GiB"
        )


if __name__ == "__main__":
    main()
