"""Tests of `hyperagent data` for people and scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from world import Run, World, one_line


def as_json(run: Run, *arguments: str | Path) -> dict[str, Any]:
    done = run("data", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_inspecting_a_file_of_odd_rows(world: World, run: Run, tmp_path: Path) -> None:
    made = as_json(run, "fixture", "odd.parquet")
    expected = {row["trajectory_id"]: row["refusal"] for row in made["rows"] if row["refusal"] and row["trajectory_id"]}
    report = as_json(run, "inspect", "odd.parquet", "--tokenizer", world.tokenizer, "--plot", "lengths.png")
    assert report["rows"] == len(made["rows"]) == report["rendered"] + len(report["refused"])
    refused = {refusal["trajectory_id"]: refusal["reason"] for refusal in report["refused"]}
    for name, reason in expected.items():
        assert reason in refused[name]
    assert (report["mask_disagreements"], report["phantom_parameters"], report["template_mismatches"]) == (0, 0, 0)
    assert report["tokens"] > report["supervised_tokens"] > 0
    assert set(report["roles"]) == {"system", "user", "assistant", "tool"}
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")

    text = run("data", "inspect", "odd.parquet", "--tokenizer", world.tokenizer)
    assert "trajectory 'fixture-unknown-role': message 2 has the unknown role 'narrator'" in text.stdout
    strict = one_line(run("data", "inspect", "odd.parquet", "--tokenizer", world.tokenizer, "--strict"))
    assert report["refused"][0]["reason"] in strict


def test_showing_a_row(world: World, run: Run) -> None:
    arguments = ["show", world.sample, "sample-0-0003", "--tokenizer", world.tokenizer]
    whole = as_json(run, *arguments)
    assert whole["trajectory_id"] == "sample-0-0003"
    assert whole["tokens"] == sum(segment["num_tokens"] for segment in whole["segments"])
    spoken = [segment for segment in whole["segments"] if segment["supervised"]]
    assert {segment["role"] for segment in spoken} == {"assistant"}
    assert all(segment["text"].endswith("<|im_end|>") for segment in spoken)
    assert as_json(run, "show", world.sample, "3", "--tokenizer", world.tokenizer) == whole

    student = as_json(run, *arguments, "--view", "student", "--internalize", "task", "--internalize", "system")
    assert student["supervised_tokens"] == whole["supervised_tokens"]
    assert student["tokens"] < whole["tokens"]
    condition = as_json(run, *arguments, "--view", "condition", "--condition", "task")
    assert (condition["supervised_tokens"], condition["segments"][0]["role"]) == (0, "user")

    text = run("data", *arguments).stdout
    assert "bold and underlined: trained on" in text
    assert spoken[0]["text"] in text
    assert "\x1b" not in text
    assert "no row 'nobody'" in one_line(run("data", "show", world.sample, "nobody", "--tokenizer", world.tokenizer))


def test_splitting_says_what_tokenizing_does(world: World, run: Run, tmp_path: Path) -> None:
    options = ["--held-out-share", "0.3", "--seed", "3", "--sample", "20"]
    split = as_json(run, "split", world.sample, *options)
    tokens = as_json(run, "tokenize", world.sample, "t.parquet", "--tokenizer", world.tokenizer, *options)
    assert split["rows"] == tokens["rows"] == 24
    assert split["left_out"] == tokens["left_out"] == {"not in the sample": 4}
    for side in ("train", "held_out"):
        assert split[side]["rows"] == tokens[side] == len(split[side]["trajectory_ids"])
        assert sum(split[side]["repos"].values()) == tokens[side]
    assert not set(split["train"]["repos"]) & set(split["held_out"]["repos"])
    assert "held_out" in run("data", "split", world.sample, *options).stdout


def test_options_that_make_no_sense_are_one_line(world: World, run: Run, tmp_path: Path) -> None:
    tokenize = ["data", "tokenize", world.sample, "t.parquet", "--tokenizer", world.tokenizer]
    assert "must contain the task" in one_line(run(*tokenize, "--condition", "system"))
    assert "'system', 'tools', 'task' or 'extra'" in one_line(run(*tokenize, "--internalize", "weather"))
    assert "could not know it" in one_line(run(*tokenize, "--condition", "task", "--internalize", "tools"))
    assert "license_name with --licenses" in one_line(run(*tokenize, "--license", "MIT"))
    assert "if and only if a file with extra texts" in one_line(
        run(*tokenize, "--condition", "task", "--condition", "extra")
    )
    assert list(tmp_path.glob("*.parquet")) == []


def test_a_plan_from_a_sample_covers_the_whole(world: World, run: Run) -> None:
    arguments = ["plan", world.sample, "--tokenizer", world.tokenizer, "--epochs", "2"]
    whole = as_json(run, *arguments)
    tokens = as_json(run, "tokenize", world.sample, "t.parquet", "--tokenizer", world.tokenizer)
    assert whole["tokens"] == {"total": tokens["tokens"], "standard_error": 0}
    assert whole["supervised_tokens"]["total"] == tokens["supervised_tokens"]
    # A random set of 128 out of 151,936 ids takes 185.9 bytes, and its log-probabilities take 128.
    assert 185.9 + 128 < whole["cache_bytes"]["total"] / tokens["supervised_tokens"] < 340
    assert whole["teacher_gpu_hours"] > whole["teacher_hours"] > 0
    sampled = as_json(run, *arguments, "--sample", "12", "--machine", "1xh100")
    assert (sampled["rows"], sampled["sampled_rows"]) == (24, 12)
    error = sampled["tokens"]["standard_error"]
    assert abs(sampled["tokens"]["total"] - tokens["tokens"]) < 4 * error
    assert not sampled["teacher_fits"]
    assert "GPU-hours for 2 epochs" in run("data", *arguments).stdout
    assert "write GPUSxKIND" in one_line(run("data", *arguments, "--machine", "toaster"))
