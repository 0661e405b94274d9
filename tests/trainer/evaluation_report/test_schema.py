"""Test that an evaluation is checked before it is shown."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hyperagent.errors import DataError
from hyperagent_trainer.evaluation.arms import REPORT_ARMS
from hyperagent_trainer.evaluation_report.read import read_evaluation
from hyperagent_trainer.evaluation_report.schema import VERDICTS, EvaluationReport
from hyperagent_trainer.evaluation_report.words import ARMS, GLOSSARY, HEADLINES, MISSING_ARMS

from .evaluations import evaluation

OPTIONAL = ("similarity", "teacher_check", "interference", "out_of_distribution", "cost", "texts")


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(evaluation()))
    read = read_evaluation(path)
    assert json.loads(read.model_dump_json()) == evaluation()
    path.write_text(read.model_dump_json(indent=2))
    assert read_evaluation(path) == read


@pytest.mark.parametrize("missing", ["null", "absent"])
def test_optional_parts_may_be_null_or_absent(missing: str, tmp_path: Path) -> None:
    value = evaluation()
    for part in OPTIONAL:
        if missing == "null":
            value[part] = None
        else:
            del value[part]
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(value))
    assert all(getattr(read_evaluation(path), part) is None for part in OPTIONAL)


def _numbers(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all floating-point numbers."""
    if isinstance(value, float):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in _numbers(item, (*path, key))]


def _set(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_every_number_that_is_not_finite_is_refused_by_its_name(bad: float, tmp_path: Path) -> None:
    paths = _numbers(evaluation())
    assert len(paths) > 200
    value = evaluation()
    for path in paths:
        _set(value, path, bad)
    with pytest.raises(ValidationError) as caught:
        EvaluationReport.model_validate(value)
    refused = {error["loc"] for error in caught.value.errors()}
    assert {path for path in paths if path not in refused} == set()
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"arms\.own\.kl: "):
        read_evaluation(file)


def _without_own(value: dict[str, Any]) -> None:
    del value["arms"]["own"]


def _one_bound(value: dict[str, Any]) -> None:
    value["arms"]["own"]["gap_low"] = None


def _crossed_bounds(value: dict[str, Any]) -> None:
    value["conditioning"]["over_static"].update(low=0.3, high=0.2)


def _interval_of_nothing(value: dict[str, Any]) -> None:
    value["arms"]["static"]["gap_closed"] = None


def _ragged(value: dict[str, Any]) -> None:
    value["similarity"]["cosine"][1].pop()


def _unknown_arm(value: dict[str, Any]) -> None:
    value["arms"]["magic"] = value["arms"]["own"]


def _unlisted_arm(value: dict[str, Any]) -> None:
    del value["arms"]["mean"]


def _negative_kl(value: dict[str, Any]) -> None:
    value["arms"]["own"]["kl"] = -0.01


def _share(value: dict[str, Any]) -> None:
    value["arms"]["own"]["top1_agreement"] = 71.1


def _backwards(value: dict[str, Any]) -> None:
    value["by_position"][2].update(first=9, last=8)


def _verdict(value: dict[str, Any]) -> None:
    value["conditioning"]["verdict"] = "splendid"


def _version(value: dict[str, Any]) -> None:
    value["version"] = 2


def _unknown_field(value: dict[str, Any]) -> None:
    value["extra"] = 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_own, "the arm 'own' is missing"),
        (_one_bound, "arms.own: .*only one bound"),
        (_crossed_bounds, "conditioning.over_static: .*0.2 is below the lower bound 0.3"),
        (_interval_of_nothing, "arms.static: .*gap_closed, which is null"),
        (_ragged, "similarity: .*4 rows of 4 numbers"),
        (_unknown_arm, "arms.magic.*: .*there is no arm 'magic'"),
        (_unlisted_arm, "has the arm 'mean', which is not in arms"),
        (_negative_kl, "arms.own.kl: "),
        (_share, "arms.own.top1_agreement: "),
        (_backwards, "by_position.2: .*the last position 8 is before the first, 9"),
        (_verdict, "conditioning.verdict: .*there is no verdict 'splendid'"),
        (_version, "version: "),
        (_unknown_field, "extra: "),
    ],
)
def test_what_contradicts_itself_is_refused_in_one_line(
    spoil: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    value = evaluation()
    spoil(value)
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match=message) as caught:
        read_evaluation(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"text"'])
def test_what_is_no_json_object_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is no evaluation of version 1.*write it again"):
        read_evaluation(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        read_evaluation(tmp_path / "absent.json")
    with pytest.raises(DataError, match="cannot read"):
        read_evaluation(tmp_path)


def test_every_arm_and_every_verdict_has_words() -> None:
    assert set(ARMS) == set(REPORT_ARMS)
    assert set(MISSING_ARMS) == set(REPORT_ARMS) - {"frozen", "own"}
    assert set(HEADLINES) == {*VERDICTS, None}
    assert len({name for name, _ in ARMS.values()}) == len(ARMS)
    assert [term for term, _ in GLOSSARY] == sorted((term for term, _ in GLOSSARY), key=str.casefold)


def test_every_field_is_documented_or_is_a_documented_model() -> None:
    definitions = EvaluationReport.model_json_schema()
    models = [definitions, *definitions["$defs"].values()]
    bare = [
        (model["title"], name)
        for model in models
        for name, field in model["properties"].items()
        if "description" not in field and "$ref" not in field and "$ref" not in field.get("items", {})
    ]
    assert bare == []
    assert all("description" in model for model in models)


def test_the_report_is_written_without_torch() -> None:
    code = (
        "import sys, hyperagent_trainer.evaluation_report.html, hyperagent_trainer.evaluation_report.markdown; "
        "import hyperagent_trainer.evaluation_report.read; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
