"""Check whether the teacher uses the condition: score held-out trajectories again under another repository's condition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hyperagent.storage.files import write_atomically
from hyperagent_demo.config import DemoConfig
from hyperagent_demo.populate import populate
from hyperagent_demo.processes import run_command
from hyperagent_demo.stages import Bar

_NOTHING_TO_DISTIL = 1


def write_foreign_tokens(config: DemoConfig, *, source: Path, extra: Path | None, tokenizer: Path, out: Path) -> None:
    """Write OUT/foreign.parquet: held-out trajectories with the hidden parts of another repository.

    Args:
        source: trajectories that OUT/tokens.parquet was made from.
        extra: file of extra texts that it was made from, if any.

    Raises:
        ServiceError: the command failed, for instance because all repositories have the same hidden parts, so that there
            is nothing to distill.
    """
    arguments = ["teacher-check", "tokens", str(source), str(out / "foreign.parquet")]
    arguments += ["--tokens", str(out / "tokens.parquet"), "--tokenizer", str(tokenizer)]
    arguments += ["--rows", str(config.teacher_check_rows), "--seed", str(config.seed)]
    if extra is not None:
        arguments += ["--extra", str(extra)]
    run_command(arguments, log=out / "logs" / "teacher_check_tokens.txt")


def check_teacher(config: DemoConfig, teacher: Path, *, out: Path, token: str, bar: Bar) -> dict[str, Any]:
    """Let the teacher score OUT/foreign.parquet, compare, write OUT/teacher_check.json, and return its contents.

    Args:
        teacher: folder of the teacher's model.
        token: access token for the teacher service.

    Raises:
        ServiceError: a command or the teacher service failed.
    """
    tokens, foreign = out / "tokens.parquet", out / "foreign.parquet"
    cache = out / "foreign-cache"
    populate(
        config, teacher, tokens=foreign, cache=cache, log=out / "logs" / "teacher-foreign.txt", token=token, bar=bar
    )
    arguments = ["teacher-check", "compare", "--tokens", str(tokens), "--cache", str(out / "cache"), "--json"]
    arguments += ["--foreign-tokens", str(foreign), "--foreign-cache", str(cache)]
    arguments += ["--out", str(out / "dependent_rows.parquet")]
    log = out / "logs" / "teacher_check.txt"
    run_command(arguments, log=log, accepted=(0, _NOTHING_TO_DISTIL))
    # The result is the last thing that the command prints.
    printed = log.read_text(encoding="utf-8")
    check: dict[str, Any] = json.loads(printed[printed.index("{") :])
    write_atomically(out / "teacher_check.json", (json.dumps(check, indent=2) + "\n").encode())
    return check
