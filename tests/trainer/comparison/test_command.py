"""`hyperagent evaluate` on tiny trained runs: every arm against a computation with PEFT, refusals, the written report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from peft import PeftModel
from tiny_runs import run
from transformers import AutoModelForCausalLM

from hyperagent.adapter_files import CONFIG_FILE, MODEL_FILE
from hyperagent.cache.local import LocalCache
from hyperagent.data.files.tokens_file import HELD_OUT, TRAIN, TokenizedTrajectory, read_tokens
from hyperagent.errors import ConfigError, Conflict, IdentityMismatch, NotFound
from hyperagent.http.run_models import FINAL_STATES
from hyperagent.model.adapter import AdapterWeights
from hyperagent.model.bundle import load_bundle
from hyperagent.model.peft_io import encode_adapter
from hyperagent.progress import no_progress
from hyperagent_trainer.comparison.arms import foreign_prompts
from hyperagent_trainer.comparison.command import EvaluationRequest, evaluate, write_report
from hyperagent_trainer.comparison.export_mean import export_mean
from hyperagent_trainer.comparison.keep_verdict import keep_verdict
from hyperagent_trainer.comparison.measure import NUM_DRAWS
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.control.app import create_control_app
from hyperagent_trainer.control.settings import ControlSettings
from hyperagent_trainer.control.supervisor import Supervisor
from hyperagent_trainer.evaluation_report.read import read_evaluation
from hyperagent_trainer.evaluation_report.schema import EvaluationReport
from hyperagent_trainer.export.command import export_run
from hyperagent_trainer.export.model_card import with_verdict
from hyperagent_trainer.runs.folder import RunFolder

RUNS = {"own": {}, "static": {"arm": "static"}, "trained_on_shuffled": {"prompts": "shuffled"}}


@pytest.fixture(scope="module")
def folders(recipe: TrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each arm, of which two train for so long that their adapters are not small."""
    root = tmp_path_factory.mktemp("runs")
    made = {}
    for name, changes in RUNS.items():
        changed = recipe.model_copy(update={"num_steps": 12, "evaluate_every": 12, **changes})
        folder = run(changed, root / name)
        folder.recipe.write_text(changed.model_dump_json())
        made[name] = folder.root
    return made


@pytest.fixture(scope="module")
def report(folders: dict[str, Path]) -> EvaluationReport:
    request = EvaluationRequest(
        own=[folders["own"]], static=[folders["static"]], trained_on_shuffled=[folders["trained_on_shuffled"]]
    )
    return evaluate(request, progress=no_progress)


def peft_kl(recipe: TrainRecipe, trajectory: TokenizedTrajectory, adapter: Path | None) -> tuple[float, float]:
    """Return the summed KL and negative log-likelihood of a trajectory by Transformers and PEFT alone, in float64."""
    student = AutoModelForCausalLM.from_pretrained(recipe.student, dtype=torch.float32).eval()
    if adapter is not None:
        student = PeftModel.from_pretrained(student, adapter).eval()
    with torch.no_grad():
        logits = student(input_ids=torch.from_numpy(trajectory.student_ids.astype(np.int64))[None]).logits[0]
    with LocalCache.open(Path(recipe.cache)) as cache:
        rows = cache.get(cache.key(trajectory.token_ids, trajectory.positions)).rows
        vocabulary = cache.identity.vocab_size
    kl = nll = 0.0
    for n, position in enumerate(trajectory.student_positions):
        q = logits[int(position) - 1, :vocabulary].double().softmax(0)
        kept = rows.ids[n].astype(np.int64)
        p = np.exp(rows.logprobs[n].astype(np.float64))
        tail_p, tail_q = float(np.exp(rows.tail_logmass[n])), float(q.sum() - q[kept].sum())
        total = p.sum() + tail_p
        kl += float((p / total * (np.log(p / total) - q[kept].log().numpy())).sum())
        kl += tail_p / total * float(np.log(tail_p / total / tail_q))
        nll -= float(q[int(trajectory.student_ids[position])].log())
    return kl, nll


def saved(adapter: AdapterWeights, recipe: TrainRecipe, folder: Path) -> Path:
    files = encode_adapter(adapter, base_model="student", alpha=recipe.hypernetwork.alpha, origin={})
    folder.mkdir()
    (folder / MODEL_FILE).write_bytes(files.model)
    (folder / CONFIG_FILE).write_bytes(files.config)
    return folder


def test_every_arm_is_what_peft_computes(
    report: EvaluationReport, folders: dict[str, Path], recipe: TrainRecipe, tmp_path: Path
) -> None:
    held_out = list(read_tokens(recipe.tokens, split=HELD_OUT))
    own, shuffled = (load_bundle(folders[name] / "bundle") for name in ("own", "trained_on_shuffled"))
    foreign = foreign_prompts(held_out, num_draws=NUM_DRAWS, seed=0)
    export_mean(folders["own"], tmp_path / "mean")

    def scored(name: str, adapters: list[Path | None]) -> tuple[float, float]:
        found = [peft_kl(recipe, t, a) for t, a in zip(held_out, adapters, strict=True)]
        rows = sum(len(t.positions) for t in held_out)
        return sum(kl for kl, _ in found) / rows, sum(nll for _, nll in found) / rows

    def generated(bundle: object, prompts: list[np.ndarray], name: str) -> list[Path | None]:
        return [saved(bundle.generate(p), recipe, tmp_path / f"{name}-{i}") for i, p in enumerate(prompts)]  # type: ignore[attr-defined]

    prompts = [t.prompt_ids for t in held_out]
    several: list[Path | None] = [None] * len(held_out)
    expected = {
        "frozen": scored("frozen", several),
        "own": scored("own", generated(own, prompts, "own")),
        "trained_on_shuffled": scored("tos", generated(shuffled, prompts, "tos")),
        "static": scored("static", [folders["static"] / "adapter"] * len(held_out)),
        "mean": scored("mean", [tmp_path / "mean"] * len(held_out)),
    }
    draws = [scored("shuffled", generated(own, draw, f"draw-{k}")) for k, draw in enumerate(foreign)]
    expected["shuffled"] = tuple(np.mean(draws, axis=0))  # type: ignore[assignment]
    for arm, (kl, nll) in expected.items():
        assert report.arms[arm].kl == pytest.approx(kl, abs=1e-4)
        assert np.log(report.arms[arm].perplexity) == pytest.approx(nll, abs=1e-4)
    # The arms are really different, or the comparison would prove nothing.
    assert len({round(report.arms[arm].kl, 4) for arm in expected}) == len(expected)
    assert report.arms["teacher"].kl == 0


def test_the_parts_add_up_and_few_repositories_give_no_verdict(report: EvaluationReport) -> None:
    assert (report.num_repositories, report.num_trajectories) == (3, 3)
    for parts in (report.by_position, report.by_class):
        assert sum(part.num_rows for part in parts) == report.num_rows
        for arm in ("frozen", "own", "static"):
            whole = sum(part.num_rows * part.kl[arm] for part in parts) / report.num_rows
            assert whole == pytest.approx(report.arms[arm].kl, rel=1e-9)
    assert report.conditioning.verdict == "undecided"
    assert "3 repositories are fewer than the 8" in report.conditioning.reason
    assert report.similarity is not None
    assert len(report.similarity.cosine) == 3
    # No held-out prompt is beyond the largest distance of the held-out prompts, which the bundle was calibrated on.
    assert report.out_of_distribution is not None
    assert report.out_of_distribution.share_flagged == 0
    assert report.out_of_distribution.held_out_median <= report.out_of_distribution.threshold
    assert report.arms["own"].gap_closed == pytest.approx(1 - report.arms["own"].kl / report.arms["frozen"].kl)


def test_the_report_is_written_and_read(report: EvaluationReport, tmp_path: Path) -> None:
    write_report(tmp_path / "out", report)
    assert read_evaluation(tmp_path / "out" / "evaluation.json") == report
    assert "undecided" in (tmp_path / "out" / "evaluation.html").read_text()
    assert "undecided" in (tmp_path / "out" / "evaluation.md").read_text()


def test_runs_that_do_not_belong_together_are_refused(
    folders: dict[str, Path], recipe: TrainRecipe, tmp_path: Path
) -> None:
    def refusal(error: type[Exception], match: str, **changes: list[Path]) -> None:
        with pytest.raises(error, match=match):
            evaluate(EvaluationRequest(**{"own": [folders["own"]], **changes}), progress=no_progress)  # type: ignore[arg-type]

    refusal(NotFound, "holds no run", own=[tmp_path])
    refusal(ConfigError, "belongs to the arm 'own', not to 'static'", static=[folders["own"]])
    refusal(ConfigError, "belongs to the arm 'trained_on_shuffled', not to 'own'", own=[folders["trained_on_shuffled"]])
    short = recipe.model_copy(update={"num_steps": 1, "prompts": "shuffled"})
    folder = run(short, tmp_path / "short")
    folder.recipe.write_text(short.model_dump_json())
    refusal(ConfigError, "trained for 1 steps, the one in .* for 12", trained_on_shuffled=[folder.root])
    other = recipe.model_copy(
        update={"num_steps": 1, "arm": "static", "hypernetwork": recipe.hypernetwork.model_copy(update={"rank": 2})}
    )
    folder = run(other, tmp_path / "narrow")
    folder.recipe.write_text(other.model_dump_json())
    refusal(ConfigError, "other target layers, rank or alpha", static=[folder.root])


def test_the_tokens_file_must_be_the_runs(folders: dict[str, Path], recipe: TrainRecipe, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", folders["own"], copy], check=True)
    changed = json.loads((copy / "recipe.json").read_text())
    other = tmp_path / "student"
    subprocess.run(["cp", "-r", recipe.student, other], check=True)
    weights = next(other.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (copy / "recipe.json").write_text(json.dumps({**changed, "student": str(other)}))
    with pytest.raises(IdentityMismatch, match="restore the student"):
        evaluate(EvaluationRequest(own=[copy]), progress=no_progress)


def test_the_mean_is_exported_once(folders: dict[str, Path], recipe: TrainRecipe, tmp_path: Path) -> None:
    done = export_mean(folders["own"], tmp_path / "mean")
    assert done["prompts"] == len(list(read_tokens(recipe.tokens, split=TRAIN)))
    with pytest.raises(Conflict, match="already exists"):
        export_mean(folders["own"], tmp_path / "mean")
    with pytest.raises(ConfigError, match="belongs to the arm 'static'"):
        export_mean(folders["static"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_command_prints_the_arms_and_the_verdict(folders: dict[str, Path], tmp_path: Path) -> None:
    own = shutil.copytree(folders["own"], tmp_path / "own")  # It is written to.
    command = [sys.executable, "-m", "hyperagent", "evaluate", str(own), "--static", str(folders["static"])]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "undecided: 3 repositories" in done.stdout
    assert {"frozen", "own", "shuffled", "static"} <= {line.split()[0] for line in done.stdout.splitlines() if line}
    assert RunFolder(own).read_verdict() is not None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evaluation.json",
        "evaluation.md",
        "evaluation.html",
    }


def test_the_verdict_stays_with_the_run(folders: dict[str, Path], report: EvaluationReport, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(folders["own"], folder.root)
    card = folder.bundle / "README.md"
    folder.verdict.unlink(missing_ok=True)
    before = card.read_text()
    assert "has not compared this run" in before
    keep_verdict([folder.root], report, tmp_path / "out")
    found = folder.read_verdict()
    assert found is not None
    assert (found.verdict, found.step, found.report) == ("undecided", 12, str(tmp_path / "out"))
    assert f"**undecided**: {report.conditioning.reason}" in card.read_text()
    load_bundle(folder.bundle)  # The card has no digest.
    # A bundle exported later says the same, and one of another step that it is not the evaluated one.
    export_run(folder, tmp_path / "exported", None)
    assert (tmp_path / "exported" / "README.md").read_text() == card.read_text()
    assert "after step 12, not for this one" in with_verdict(before, found, step=6)
    # People may rewrite the card.
    card.write_text("mine")
    keep_verdict([folder.root], report, tmp_path / "out")
    assert card.read_text() == "mine"


def test_the_service_compares_its_runs(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    ids = {}
    for second, name in enumerate(("own", "static")):
        ids[name] = f"20260101-00000{second}-000000"
        shutil.copytree(folders[name], tmp_path / "runs" / ids[name])
        record = {"request": {"recipe": name}, "idempotency_key": None}
        (tmp_path / "runs" / ids[name] / "request.json").write_text(json.dumps(record))
    supervisor = Supervisor(ControlSettings(recipes=tmp_path / "recipes", runs=tmp_path / "runs"))
    with TestClient(create_control_app(supervisor, token="t"), headers={"Authorization": "Bearer t"}) as client:
        body = {"own": [ids["own"]], "static": [ids["static"]]}
        answer = client.post("/v1/comparisons", json=body, headers={"Idempotency-Key": "k"})
        assert answer.status_code == 201, answer.text
        run = answer.json()
        assert (run["kind"], run["recipe"]) == ("comparison", "comparison")
        assert client.post("/v1/comparisons", json=body, headers={"Idempotency-Key": "k"}).json()["id"] == run["id"]
        # A comparison can be stopped, but it has no steps to pause between.
        assert "pause" not in run["links"]
        assert client.post(f"/v1/runs/{run['id']}/pause").status_code == 409
        deadline = time.monotonic() + 120
        while (run := client.get(f"/v1/runs/{run['id']}").json())["state"] not in FINAL_STATES:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert (run["state"], run["step"]) == ("done", run["num_steps"]), run["reason"]
        report = read_evaluation(Path(run["folder"]) / "evaluation" / "evaluation.json")
        assert {"own", "static", "shuffled"} <= set(report.arms)
        verdict = client.get(f"/v1/runs/{ids['own']}").json()["verdict"]
        assert (verdict["verdict"], verdict["reason"]) == ("undecided", report.conditioning.reason)
        assert client.get(f"/v1/runs/{ids['static']}").json()["verdict"] is None

        assert client.post("/v1/comparisons", json={"own": ["20260101-000009-000000"]}).status_code == 404
        refused = client.post("/v1/comparisons", json={"own": [run["id"]]})
        assert refused.status_code == 422
        assert "is a comparison; name training runs" in refused.json()["detail"]
        # Runs that cannot be compared fail with the reason.
        failed = client.post("/v1/comparisons", json={"own": [ids["static"]]}).json()
        while (failed := client.get(f"/v1/runs/{failed['id']}").json())["state"] not in FINAL_STATES:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert failed["state"] == "failed"
        assert "belongs to the arm 'static', not to 'own'" in failed["reason"]
