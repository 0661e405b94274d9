"""Tests of places in a run's metrics: each line once, all lines again after a cut, no torn or infinite values."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from hyperagent.errors import CorruptRecord
from hyperagent.storage.files import write_atomically
from hyperagent_trainer.evaluation.adapter_statistics import AdapterStatistics
from hyperagent_trainer.evaluation.evaluate import HeldOut
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.runs.metrics_file import START, Place, last_held_out_kl, read_lines
from hyperagent_trainer.training.loggers import Loggers
from hyperagent_trainer.training.reporter import RunReporter


def test_lines_are_read_from_a_place_on_and_never_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path, START, limit=9).values == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step"')
    found = read_lines(path, Place(1), limit=9)
    assert (found.values, found.is_reset) == ([{"step": 2}, {"step": 3}], False)
    assert found.next.num_lines == 3
    assert read_lines(path, found.next, limit=9).values == []
    with path.open("a") as file:
        file.write(": 4}\nnot json\n")
    assert read_lines(path, found.next, limit=1).values == [{"step": 4}]
    with pytest.raises(CorruptRecord, match="line 5"):
        read_lines(path, found.next, limit=9)


def test_a_place_survives_its_text_and_has_no_other() -> None:
    for place in (START, Place(17), Place(3, "0123456789abcdef")):
        assert Place.parse(str(place)) == place


def test_readers_have_what_the_file_has_whatever_is_cut_and_written_meanwhile(tmp_path: Path) -> None:
    """Readers read at different times; a reader that follows `is_reset` always has a prefix of the file."""
    draw = random.Random(0)
    path = tmp_path / "metrics.jsonl"
    written: list[int] = []
    readers: list[tuple[Place, list[int]]] = [(START, []) for _ in range(5)]
    num_resets = 0
    for number in range(2000):
        if draw.random() < 0.05:
            # Few different values, so that rewritten lines often equal the old ones.
            written = written[: draw.randrange(len(written) + 1)]
            write_atomically(path, "".join(f'{{"step": {x}}}\n' for x in written).encode())
        else:
            written.append(draw.randrange(2))
            with path.open("a") as file:
                file.write(f'{{"step": {written[-1]}}}\n')
        which = draw.randrange(len(readers))
        place, lines = readers[which]
        found = read_lines(path, place, limit=draw.randrange(1, 20))
        num_resets += found.is_reset
        lines = ([] if found.is_reset else lines) + [line["step"] for line in found.values]
        assert lines == written[: len(lines)], number
        assert found.next.num_lines == len(lines)
        readers[which] = found.next, lines
    assert num_resets > 20


def test_what_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with RunReporter(folder, num_steps=9, first_step=0, loggers=Loggers({})) as report:
        held_out = HeldOut({"frozen": 0.5, "adapter": math.nan}, {})
        report.evaluation(0, held_out, AdapterStatistics({"q_proj": math.inf}, math.nan), collapsed=False)
        report.step(1, loss=math.nan, num_tokens=5, grad_norms={"encoder": -math.inf, "generator": 1.0})
        report.state("running")
    text = folder.metrics.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    evaluation, step = map(json.loads, text.splitlines())
    assert evaluation["held_out_kl"] == {"frozen": 0.5, "adapter": None}
    assert (evaluation["adapter_relative_norm"], evaluation["adapter_cosine"]) == ({"q_proj": None}, None)
    assert (step["loss"], step["grad_norms"]) == (None, {"encoder": None, "generator": 1.0})
    # Both are read later: by the service, and for the bundle's card.
    assert folder.read_status().held_out_kl == {"frozen": 0.5, "adapter": None}
    assert folder.read_status().loss is None
    assert math.isnan(last_held_out_kl(folder.metrics, 0).kl["adapter"])


def test_a_resumed_run_keeps_the_lines_until_its_checkpoint_and_none_from_the_start_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [f'{{"step": {step}}}\n' for step in (0, 1, 2, 2, 3)]
    for first_step, kept in ((2, 4), (0, 0)):
        folder.metrics.write_text("".join(lines) + '{"step": 4, "lo')
        with RunReporter(folder, num_steps=9, first_step=first_step, loggers=Loggers({})):
            assert folder.metrics.read_text() == "".join(lines[:kept])
