"""Test the page and the Markdown file: every number is there, foreign text stays text, missing parts are named."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyperagent.errors import StorageError
from hyperagent_trainer.evaluation_report.html import write_html
from hyperagent_trainer.evaluation_report.markup import Markup, element
from hyperagent_trainer.evaluation_report.schema import EvaluationReport

from .evaluations import ARMS, FOREIGN, evaluation
from .pages import markdown_of, page_of

PARTS = {
    "similarity": "How alike the adapters are",
    "teacher_check": "Does the teacher use the condition?",
    "interference": "Effect on unrelated text",
    "out_of_distribution": "Prompts unlike those of training",
    "cost": "Cost",
    "texts": "What the student writes",
}


def _strings(value: Any) -> Any:
    """Return the value with every string that is free text replaced by hostile text."""
    if isinstance(value, dict):
        kept = {"view", "arm", "verdict"}
        return {key: item if key in kept else _strings(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strings(item) for item in value]
    return FOREIGN if isinstance(value, str) else value


def _as_percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def test_every_number_of_every_arm_is_on_the_page_and_in_the_markdown(tmp_path: Path) -> None:
    cells = [one.text for one in page_of(evaluation(), tmp_path).all("td")]
    written = markdown_of(evaluation(), tmp_path)
    for values in ARMS.values():
        numbers = [f"{values[key]:.4f}" for key in ("kl", "dependent_kl", "other_kl")]
        numbers += [_as_percent(values[key]) for key in ("top1_agreement", "tool_calls_exact")]
        numbers.append(f"{values['perplexity']:.3f}")
        if values["gap_closed"] is not None:
            numbers += [_as_percent(values["gap_closed"])]
            numbers.append(f"{_as_percent(values['gap_low'])} to {_as_percent(values['gap_high'])}")
        for number in numbers:
            assert number in cells
            assert f"| {number} |" in written


def test_every_number_of_the_other_parts_is_on_the_page_and_in_the_markdown(tmp_path: Path) -> None:
    value = evaluation()
    text = " ".join(one.text for one in page_of(value, tmp_path).all("body"))
    written = markdown_of(value, tmp_path)
    numbers = [f"{bin_['kl'][arm]:.4f}" for bin_ in (*value["by_position"], *value["by_class"]) for arm in ARMS]
    numbers += [f"{bin_['num_rows']:,}" for bin_ in (*value["by_position"], *value["by_class"])]
    numbers += [f"{one['first']:,} to {one['last']:,}" for one in value["by_position"]]
    for name in ("conditioning_gain", "over_static", "over_trained_on_shuffled", "over_frozen"):
        found = value["conditioning"][name]
        numbers += [f"{found['mean']:.4f}", f"{found['low']:.4f} to {found['high']:.4f}"]
        numbers.append(_as_percent(found["mean"] / ARMS["frozen"]["kl"]))
    numbers += ["0.300", "91.2%", "0.1379", "22.5%", "0.1 nats", "7,117 rows", "0.0177", "2,113 rows"]
    numbers += ["0.2719", "0.8713", "4.2%", "41.7 ms", "1,228,800 weights", "4.7 MiB", "93.4 s"]
    numbers += ["12 repositories", "57 trajectories", "48,313 rows", "step 2,400", "seed 11", "5.0%"]
    assert [number for number in numbers if number not in text] == []
    assert [number for number in numbers if number not in written] == []


def test_the_verdict_comes_first_with_its_numbers_and_reason(tmp_path: Path) -> None:
    page = page_of(evaluation(), tmp_path)
    (card,) = page.all("div", class_="good")
    assert card.text.startswith("Reading the prompt pays")
    assert "close 61.0% (95% interval 56.1% to 65.5%)" in card.text
    assert "39.4% (33.2% to 44.7%) with one static LoRA" in card.text
    assert "0.0895 [0.0721, 0.107] nats over a static LoRA" in card.text
    headings = [one.text for one in page.all("h2")]
    assert headings[0] == "What was compared"
    assert headings[-1] == "Glossary"
    assert page.elements.index(card) < page.elements.index(page.all("h2")[0])


@pytest.mark.parametrize(
    ("verdict", "tone", "start"),
    [
        ("conditioning pays", "good", "Reading the prompt pays"),
        ("a static LoRA suffices", "wait", "A static LoRA suffices"),
        ("undecided", "open", "Undecided"),
        ("harmful: the adapter makes the student worse", "bad", "Harmful"),
        (None, "open", "No verdict"),
    ],
)
def test_each_verdict_has_its_sentence(verdict: str | None, tone: str, start: str, tmp_path: Path) -> None:
    value = evaluation()
    value["conditioning"]["verdict"] = verdict
    (card,) = page_of(value, tmp_path).all("div", class_=tone)
    assert card.text.startswith(start)
    assert f"**{start}" in markdown_of(value, tmp_path)


def test_foreign_text_stays_text_wherever_it_is(tmp_path: Path) -> None:
    plain, hostile = page_of(evaluation(), tmp_path), page_of(_strings(evaluation()), tmp_path)
    assert hostile.all("script") == plain.all("script") == []
    # The same elements with the same attribute names: no text has become an element or an attribute. Marks are part of texts.
    shapes = [
        [(one.tag, sorted(one.attributes)) for one in page.elements if one.tag not in ("mark", "dt", "dd")]
        for page in (plain, hostile)
    ]
    assert shapes[0] == shapes[1]
    (rows,) = [one for one in hostile.all("table") if "its cosine" in one.text]
    assert rows.text.count(FOREIGN) == 8
    assert [one.text.count(FOREIGN) for one in hostile.all("pre")] == [1, 1, 1]
    assert {part for one in hostile.elements for part in one.attributes if part.startswith("on")} == set()


def test_foreign_text_stays_text_in_markdown(tmp_path: Path) -> None:
    value = _strings(evaluation())
    value["split"] = "a\n\n# heading\n- item"
    written = markdown_of(value, tmp_path)
    # Text in fences is shown word for word; everything else is escaped.
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", written, flags=re.DOTALL | re.MULTILINE)
    assert "\\<script\\>" in outside
    assert not re.search(r"(?<!\\)[<>`]", outside)
    assert not re.search(r"(?<!\\)\[a", outside)
    assert "\n# heading" not in written
    assert "\n- item" not in written
    # Every line of a table has as many cells as its head, because bars in a cell are escaped.
    tables = re.findall(r"(?:^\|.*\|\n)+", outside, flags=re.MULTILINE)
    assert len(tables) == 6
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_a_text_cannot_close_its_fence(tmp_path: Path) -> None:
    value = evaluation()
    value["texts"][0]["text"] = "before\n`````\n# not a heading\n```\nafter"
    written = markdown_of(value, tmp_path)
    assert "``````text\nbefore\n`````\n# not a heading\n```\nafter\n``````\n" in written


def test_control_characters_do_not_reach_the_files(tmp_path: Path) -> None:
    value = evaluation()
    value["run"]["folder"] = "a\x00b\x1b[31mc"
    value["texts"][0]["text"] = "x\x08y\tz\r"
    shown = "".join(one.text for one in page_of(value, tmp_path).all("body")) + markdown_of(value, tmp_path)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", shown)
    assert "a\ufffdb\ufffd[31mc" in shown
    assert "x\ufffdy\tz\ufffd" in shown


def test_the_page_is_well_formed_and_refers_to_nothing_outside(tmp_path: Path) -> None:
    page = page_of(evaluation(), tmp_path)
    assert page.declarations == ["doctype html"]
    assert page.all("html")[0].attributes["lang"] == "en"
    assert {one.tag for one in page.elements}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "a", "image", "use"}
    )
    names = {name for one in page.elements for name in one.attributes}
    assert names.isdisjoint({"src", "href", "xlink:href", "srcset", "style", "action"})
    (style,) = page.all("style")
    assert not re.search(r"url\(|@import|https?:|</", style.text)
    (policy,) = [one for one in page.all("meta") if "http-equiv" in one.attributes]
    assert policy.attributes["content"].startswith("default-src 'none'; style-src 'unsafe-inline'")
    ids = [one.attributes["id"] for one in page.elements if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    pictures = [one for one in page.all("svg") if one.attributes.get("role") == "img"]
    assert len(pictures) == 4
    for picture in pictures:
        for name, tag in (("aria-labelledby", "title"), ("aria-describedby", "desc")):
            (label,) = [one for one in page.elements if one.attributes.get("id") == picture.attributes[name]]
            assert label.tag == tag
            assert label.text


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_left_out_and_named_in_one_line(part: str, tmp_path: Path) -> None:
    full, value = evaluation(), evaluation()
    value[part] = None
    with_it, without = page_of(full, tmp_path), page_of(value, tmp_path)
    assert [one.text for one in with_it.all("h2")].count(PARTS[part]) == 1
    assert PARTS[part] not in [one.text for one in without.all("h2")]
    assert "Not in this report" in [one.text for one in without.all("h2")]
    assert len(without.all("dt")) == len(with_it.all("dt")) + 1
    assert f"## {PARTS[part]}" not in markdown_of(value, tmp_path)
    assert "## Not in this report" not in markdown_of(full, tmp_path)


def _no_gap(value: dict[str, Any]) -> None:
    for arm in value["arms"].values():
        arm.update(kl=0.0, gap_closed=None, gap_low=None, gap_high=None)


def _no_intervals(value: dict[str, Any]) -> None:
    for arm in value["arms"].values():
        arm.update(gap_low=None, gap_high=None)


def _no_calls(value: dict[str, Any]) -> None:
    for arm in value["arms"].values():
        arm["tool_calls_exact"] = None


def _no_dependent(value: dict[str, Any]) -> None:
    for arm in value["arms"].values():
        arm.update(dependent_kl=None, other_kl=None)


def _no_positions(value: dict[str, Any]) -> None:
    value["by_position"] = []


def _no_classes(value: dict[str, Any]) -> None:
    value["by_class"] = []


@pytest.mark.parametrize(
    ("remove", "term", "plot"),
    [
        (_no_gap, "share of the gap", "gap"),
        (_no_intervals, "intervals", None),
        (_no_calls, "exact tool calls", None),
        (_no_dependent, "dependent and other rows", "dependent"),
        (_no_positions, "KL by position", "position"),
        (_no_classes, "KL by class of token", None),
    ],
)
def test_missing_numbers_are_named_and_not_plotted(
    remove: Callable[[dict[str, Any]], None], term: str, plot: str | None, tmp_path: Path
) -> None:
    value = evaluation()
    remove(value)
    page = page_of(value, tmp_path)
    assert [one.text for one in page.all("dt")].count(term) == (2 if term == "intervals" else 1)
    plots = {one.attributes["id"] for one in page.all("svg") if "id" in one.attributes}
    assert plots == {"gap", "dependent", "position", "similarity"} - {plot}
    assert f"- **{term}**: " in markdown_of(value, tmp_path)


def test_the_smallest_report_names_all_that_it_lacks(tmp_path: Path) -> None:
    value = evaluation()
    value["arms"] = {name: copy.deepcopy(ARMS[name]) for name in ("frozen", "own")}
    for part in PARTS:
        del value[part]
    value.update(by_position=[], by_class=[])
    value["conditioning"] = {"verdict": None, "reason": "nothing to compare", "margin": 0.05, "num_clusters": 1}
    page = page_of(value, tmp_path)
    assert [one.text for one in page.all("h2")] == [
        "What was compared",
        "How much of the gap each arm closes",
        "All numbers",
        "Rows that depend on the condition",
        "Not in this report",
        "How it was computed",
        "Glossary",
    ]
    missing = [one.text for one in page.all("dt") if one.text.startswith("arm: ")]
    assert len(missing) == len(ARMS) - 2
    assert "nan" not in markdown_of(value, tmp_path).lower().split()


def test_a_teacher_that_ignores_the_condition_is_a_warning(tmp_path: Path) -> None:
    value = evaluation()
    assert page_of(value, tmp_path).all("p", class_="warning") == []
    value["teacher_check"].update(nothing_to_distill=True)
    (warning,) = page_of(value, tmp_path).all("p", class_="warning")
    assert "next to nothing to distill" in warning.text
    assert f"**{warning.text}**" in markdown_of(value, tmp_path)


def test_a_text_is_shown_word_for_word_with_the_followed_rules_marked(tmp_path: Path) -> None:
    value = evaluation()
    # What only looks like the rule is not marked.
    value["texts"][0]["text"] += " team-7"
    page = page_of(value, tmp_path)
    # A browser drops the first line break inside a pre.
    shown = [one.text.removeprefix("\n") for one in page.all("pre")]
    texts = value["texts"]
    assert shown == [texts[0]["prompt"], texts[0]["text"], texts[1]["text"]]
    assert [one.text for one in page.all("mark")] == ["team-7"]


def test_markup_is_only_what_was_built_as_markup() -> None:
    assert element("p", "a < b", Markup("<br>"), class_='"x"', aria_label="&") == (
        '<p class="&quot;x&quot;" aria-label="&amp;">a &lt; b<br></p>'
    )
    assert element("p", element("b", "&")) == "<p><b>&amp;</b></p>"


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file" / "evaluation.html"
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="could not write"):
        write_html(path, EvaluationReport.model_validate(evaluation()))
    assert (tmp_path / "file").read_text() == "not a folder"
