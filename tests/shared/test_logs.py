"""Tests that all loggers write JSON lines to standard error, and leave standard output to results."""

from __future__ import annotations

import json
import subprocess
import sys


def test_both_kinds_of_logger_write_json_lines_to_stderr_alone() -> None:
    program = (
        "import logging, structlog\n"
        "from hyperagent.logs import configure_logging\n"
        "configure_logging(service='teacher', level='info')\n"
        "log = structlog.get_logger()\n"
        "log.debug('hidden')\n"
        "log.info('scored', rows=3)\n"
        "logging.getLogger('library').info('hidden')\n"
        "logging.getLogger('library').warning('slow\\ndisk')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: log.exception('failed')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [
        ("scored", "info"),
        ("slow\ndisk", "warning"),
        ("failed", "error"),
    ]
    assert all(line["service"] == "teacher" and line["timestamp"].endswith("Z") for line in lines)
    assert lines[0]["rows"] == 3
    assert "ZeroDivisionError" in lines[2]["exception"]
