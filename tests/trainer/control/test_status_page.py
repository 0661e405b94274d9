"""Tests of the status page: public files, protected data, and the page in a browser."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from fastapi import FastAPI
from fastapi.testclient import TestClient
from needs import skip_or_fail
from served import served

import hyperagent_trainer
from hyperagent.http.run_models import RunRequest, RunStatus, RunVerdict
from hyperagent.storage.files import write_atomically
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.control.app import create_control_app
from hyperagent_trainer.control.settings import ControlSettings
from hyperagent_trainer.control.status_page import PUBLIC_PATHS
from hyperagent_trainer.control.supervisor import Supervisor
from hyperagent_trainer.runs.store import Run, new_run_id
from hyperagent_trainer.training.trainer import train

TOKEN = "secret"
STATIC = Path(hyperagent_trainer.__file__).parent / "control" / "static"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.usefixtures("chromium")
Page = Callable[[], AbstractContextManager[Browser]]


@pytest.fixture
def chromium() -> None:
    if CHROMIUM is None:
        skip_or_fail("no chromium is installed")


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    (tmp_path / "recipes").mkdir()
    return Supervisor(ControlSettings(recipes=tmp_path / "recipes", runs=tmp_path / "runs"))


@pytest.fixture
def app(supervisor: Supervisor) -> FastAPI:
    return create_control_app(supervisor, token=TOKEN)


def test_the_page_is_public_and_holds_the_browser_to_itself(app: FastAPI) -> None:
    with TestClient(app) as client:
        for path in PUBLIC_PATHS:
            answer = client.get(path)
            assert answer.status_code == 200, path
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
            assert "unsafe" not in answer.headers["Content-Security-Policy"]
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
        for path in (
            "/v1/runs",
            "/v1/recipes",
            "/metrics",
            "/openapi.json",
            "/static",
            "/static/",
            "/static/../cli.py",
        ):
            assert client.get(path).status_code == 401, path
        assert client.post("/").status_code == 405
        signed_in = {"Authorization": f"Bearer {TOKEN}"}
        for name in ("../cli.py", "%2e%2e/cli.py", "..%2fcli.py", "nothing.js"):
            assert client.get(f"/static/{name}", headers=signed_in).status_code == 404, name


def test_the_page_is_whole_and_needs_nothing_from_elsewhere() -> None:
    assert {f"/static/{file.name}" for file in STATIC.iterdir()} == {*PUBLIC_PATHS, "/static/index.html"} - {"/"}
    html = (STATIC / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", html) == []
    named = re.findall(r'(?:src|href)="([^"]+)"', html)
    for file in STATIC.glob("*.js"):
        text = file.read_text()
        named += [f"/static/{name}" for name in re.findall(r'from "\./([^"]+)"', text)]
        assert re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", text) == []
    assert set(named) <= set(PUBLIC_PATHS)
    # The SVG namespace is only a name and is not fetched.
    addresses = [a for f in STATIC.iterdir() for a in re.findall(r"https?://[^\s\"']+", f.read_text())]
    assert set(addresses) == {"http://www.w3.org/2000/svg"}


GROUPS = ("2048x8192", "2048x512", "4096x2048", "2048x12288")
PARTS = ("encoder", "generator", *(f"{side}_heads.{group}" for group in GROUPS for side in "ab"))
NUM_STEPS = 4000


def step_line(step: int) -> dict[str, Any]:
    """Return the metrics of a step of an 80B student's run, without the hot tier's figures."""
    wave = random.Random(step).uniform(-0.06, 0.06)
    norms = {part: (0.5 + wave) * 10.0**-index / (1 + step / 500) for index, part in enumerate(PARTS[:2])}
    for index, part in enumerate(PARTS[2:]):
        norms[part] = (1 + 3 * wave) * 2.0**index * 1e-3 * (1 + 2 * math.exp(-step / 300))
    return {
        "step": step,
        "loss": 0.4 + math.exp(-step / 500) + wave,
        "tokens_per_s": 41_200 + 3000 * wave * 10,
        "data_wait_s": 0.004 + wave * 0.02,
        "hot_hits": 0,
        "hot_misses": 0,
        "hot_degraded": False,
        "step_efficiency": 0.93 + wave / 2,
        "grad_norm": 0.8 + wave + (900 if step == 1235 else 0),
        "grad_norms": norms,
        "peak_memory_bytes": int(61.5 * 2**30) + min(step, 300) * 2**20,
        "rerouted": 0.0004 + wave / 200,
        "learning_rate": min(1.0, step / 100) * 1e-4 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / NUM_STEPS))),
    }


def evaluation_line(step: int) -> dict[str, Any]:
    done = 1 - math.exp(-step / 900)
    gain = {"mean": 0.02 * done, "low": 0.01 * done, "high": 0.03 * done}
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "linear_attn.out_proj")
    return {
        "step": step,
        "held_out_kl": {"frozen": 0.9, "adapter": 0.9 - 0.55 * done, "adapter_shuffled_prompt": 0.9 - 0.45 * done},
        "conditioning": {"held_out": {"gain": gain, "verdict": "own prompts help"}},
        "adapter_relative_norm": {kind: done * 0.002 * 3**index for index, kind in enumerate(kinds)},
        "adapter_cosine": 0.72 + 0.2 * done if step else None,
    }


def make_run(supervisor: Supervisor, *, num_lines: int, evaluations: bool = True) -> Run:
    recipe = TrainRecipe(student=Path("s"), tokens=Path("t"), cache=Path("c"), num_steps=NUM_STEPS)
    run = supervisor.runs.create(new_run_id(), RunRequest(recipe="qwen3-next-80b"), recipe, idempotency_key=None)
    with run.folder.metrics.open("w") as file:
        for step in range(num_lines + 1):
            lines = [step_line(step)] if step else []
            if evaluations and step % 200 == 0:
                lines.append(evaluation_line(step))
            file.writelines(json.dumps(line) + "\n" for line in lines)
    status = RunStatus(
        state="running",
        step=num_lines,
        num_steps=NUM_STEPS,
        loss=0.5,
        eta_s=5400.0,
        conditioning={"held_out": "<b>own prompt helps</b>"},
    )
    run.folder.write_status(status)
    return supervisor.runs.get(run.run_id)


def sign_in(browser: Browser, token: str) -> None:
    browser.wait_for("!document.getElementById('sign-in').hidden")
    browser.evaluate(f"document.getElementById('token').value = {json.dumps(token)}")
    browser.evaluate("document.querySelector('#sign-in button').click()")


def add_line(run: Run, line: dict[str, Any]) -> None:
    with run.folder.metrics.open("a") as file:
        file.write(json.dumps(line) + "\n")


def titles(browser: Browser) -> list[str]:
    found: list[str] = browser.evaluate(
        "[...document.querySelectorAll('figure')].filter((f) => f.checkVisibility())"
        ".map((f) => f.querySelector('h3').firstChild.textContent.trim())"
    )
    return found


def figure(title: str) -> str:
    return (
        f"[...document.querySelectorAll('figure')].find((f) => f.querySelector('h3').textContent.startsWith({title!r}))"
    )


def curves(browser: Browser, title: str) -> list[str]:
    found: list[str] = browser.evaluate(
        f"[...{figure(title)}.querySelectorAll('svg[role=img] path')].map((p) => p.getAttribute('d'))"
    )
    return found


def points(curve: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", curve)]


@pytest.fixture
def page(chromium: None, app: FastAPI, tmp_path: Path) -> Page:
    """Return a function that opens the page in a browser, signed in."""
    assert CHROMIUM is not None

    @contextmanager
    def opened() -> Iterator[Browser]:
        with served(app) as address, Browser(CHROMIUM, tmp_path / "profile") as browser:
            browser.visit(address)
            sign_in(browser, TOKEN)
            browser.wait_for("document.getElementById('progress-text').textContent !== ''")
            yield browser
            assert browser.complaints == []

    return opened


@needs_chromium
def test_a_browser_shows_runs_and_follows_them(app: FastAPI, supervisor: Supervisor, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    older = make_run(supervisor, num_lines=50, evaluations=False)
    run = make_run(supervisor, num_lines=3000)
    with served(app) as address, Browser(CHROMIUM, tmp_path / "profile") as browser:
        browser.visit(address)
        sign_in(browser, "wrong")
        browser.wait_for("document.getElementById('notice').textContent.includes('refused')")
        assert browser.evaluate("sessionStorage.length") == 0
        browser.complaints.clear()  # The browser logs the 401.

        sign_in(browser, TOKEN)
        browser.wait_for("document.querySelectorAll('figure path').length >= 20")
        assert browser.evaluate("document.querySelectorAll('nav li').length") == 2
        text = browser.evaluate("document.getElementById('run').innerText")
        assert "step 3,000 of 4,000 · 75 % · 1 h 30 min left" in text
        assert "<b>own prompt helps</b>" in text
        assert titles(browser) == [
            *("Loss", "Held-out KL", "Worth of the own prompt", "‖BA‖ / ‖W‖", "Cosine between prompts"),
            *("Gradient norm", "Learning rate", "Gradient norm by group"),
            *("Speed", "Step efficiency", "Data wait", "Peak memory", "Rerouted picks"),
        ]
        # The only spike among 3,000 values survives the reduction: nothing else is near the top of the picture.
        band, course = curves(browser, "Gradient norm ")
        assert 900 <= len(points(band)) <= 1000
        heights = [y for _, y in points(band)]
        assert sorted(heights)[1] - min(heights) > 100
        assert len(points(course)) == 120
        assert browser.evaluate(f"{figure('Peak memory')}.querySelector('.value').textContent") == "61.79"

        add_line(run, {"step": 3001, "loss": 0.123, "hot_hits": 3, "hot_misses": 1})
        run.folder.write_status(run.status.model_copy(update={"state": "failed", "reason": "the disk is full"}))
        browser.wait_for("document.getElementById('state').textContent === 'failed'")
        browser.wait_for("document.querySelector('figcaption').textContent.includes('0.123')")
        assert titles(browser)[-1] == "Cache hits"
        assert "the disk is full" in browser.evaluate("document.getElementById('run').innerText")

        browser.evaluate(f"location.hash = '#{older.run_id}'")
        browser.wait_for("document.getElementById('progress-text').textContent.startsWith('step 50 ')")
        browser.wait_for("[...document.querySelectorAll('figure')].filter((f) => f.checkVisibility()).length === 9")
        assert browser.complaints == []


@needs_chromium
def test_gradient_norms_have_a_curve_and_a_legend_entry_per_group(supervisor: Supervisor, page: Page) -> None:
    make_run(supervisor, num_lines=500)
    with page() as browser:
        browser.wait_for(f"!{figure('Gradient norm by group')}.hidden")
        entries = browser.evaluate(
            f"[...{figure('Gradient norm by group')}.querySelectorAll('.name')].map((n) => n.textContent)"
        )
        assert sorted(entries) == sorted(
            ["encoder", "generator", *(f"{side} {group}" for group in GROUPS for side in "AB")]
        )
        assert len(set(curves(browser, "Gradient norm by group"))) == len(PARTS)
        looks = browser.evaluate(
            f"[...{figure('Gradient norm by group')}.querySelectorAll('.line path')].map((p) => p.getAttribute('class'))"
        )
        assert len(set(looks)) == len(PARTS), "two curves look the same"

        # A pressed entry fades all others.
        browser.evaluate(f"{figure('Gradient norm by group')}.querySelector('button').click()")
        faded = browser.evaluate(f"{figure('Gradient norm by group')}.querySelectorAll('path.faded').length")
        assert faded == len(PARTS) - 1


@needs_chromium
def test_pointing_at_one_figure_reads_out_the_same_step_in_all(supervisor: Supervisor, page: Page) -> None:
    make_run(supervisor, num_lines=1000)
    with page() as browser:
        browser.wait_for(f"!{figure('Speed')}.hidden")
        browser.evaluate(
            f"{{const p = {figure('Loss')}.querySelector('svg[role=img]'); const box = p.getBoundingClientRect();"
            "p.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 2, clientY: box.top + 20}))}"
        )
        browser.wait_for(f"{figure('Loss')}.querySelector('.at').textContent !== ''")
        said = browser.evaluate(
            "[...document.querySelectorAll('figure')].filter((f) => f.checkVisibility())"
            ".map((f) => f.querySelector('.at').textContent)"
        )
        assert len(set(said)) == 1
        step = int(said[0].removeprefix("step "))
        assert 400 < step < 600
        shown = browser.evaluate(f"{figure('Loss')}.querySelector('.value').textContent")
        assert float(shown) == pytest.approx(step_line(step)["loss"], abs=1e-4)


@needs_chromium
def test_a_collapse_raises_an_alarm_for_a_hypernetwork_alone(supervisor: Supervisor, page: Page) -> None:
    run = make_run(supervisor, num_lines=10)
    status = run.status.model_copy(update={"adapters_collapsed": True})
    alarm = "document.getElementById('alarm')"
    with page() as browser:
        assert browser.evaluate(f"[{alarm}.getAttribute('role'), {alarm}.textContent]") == ["alert", ""]
        assert "Verdict" not in browser.evaluate("document.getElementById('facts').innerText")
        verdict = {"verdict": "conditioning pays", "reason": "<b>own</b> beats static", "step": 1200, "report": "/out"}
        numbers = {"margin": 0.05, "split": "held_out", "num_repositories": 24, "num_seeds": 3}
        run.folder.write_verdict(RunVerdict(**verdict, **numbers))
        browser.wait_for(
            "document.getElementById('facts').innerText.includes('conditioning pays: <b>own</b> beats static')"
        )
        assert "Verdict after step 1,200" in browser.evaluate("document.getElementById('facts').innerText")

        # A run without a conditioning verdict: a static adapter, which is the same for all prompts by design.
        run.folder.write_status(status.model_copy(update={"conditioning": {}, "step": 11}))
        browser.wait_for("document.getElementById('progress-text').textContent.startsWith('step 11 ')")
        assert browser.evaluate(f"{alarm}.textContent") == ""

        run.folder.write_status(status)
        browser.wait_for(f"{alarm}.textContent.includes('collapsed')")
        assert browser.evaluate(f"{alarm}.checkVisibility() && {alarm}.getBoundingClientRect().height > 50")
        assert "different prompts got practically the same adapter" in browser.evaluate(f"{alarm}.innerText")
        assert "stop the run" in browser.evaluate(f"{alarm}.innerText")

        run.folder.write_status(status.model_copy(update={"adapters_collapsed": False}))
        browser.wait_for(f"{alarm}.textContent === ''")


@needs_chromium
def test_what_is_not_finite_is_a_gap_and_a_skipped_step_a_mark(supervisor: Supervisor, page: Page) -> None:
    run = make_run(supervisor, num_lines=20)
    add_line(run, {"step": 21, "loss": math.nan, "grad_norm": math.inf})
    add_line(run, {"step": 22, "skipped": ["a"]})
    add_line(run, {"step": 23, "loss": 0.5, "grad_norm": 1.0})
    with page() as browser:
        browser.wait_for(f"!{figure('Loss')}.hidden")
        (loss,) = curves(browser, "Loss")
        assert [part.count("L") + 1 for part in loss.split("M")[1:]] == [20, 1]
        assert browser.evaluate(f"{figure('Loss')}.querySelectorAll('.mark').length") == 1
        assert "1 skipped" in browser.evaluate(f"{figure('Loss')}.textContent")
        assert "Steps skipped\n1, the last is 22" in browser.evaluate("document.getElementById('facts').innerText")


@needs_chromium
def test_lines_that_a_resume_has_cut_leave_the_curves(supervisor: Supervisor, page: Page) -> None:
    run = make_run(supervisor, num_lines=30, evaluations=False)
    value = f"{figure('Loss')}.querySelector('.value').textContent"
    with page() as browser:
        browser.wait_for(f"!{figure('Loss')}.hidden")
        # The same number of lines as before, but different from the 21st on.
        lines = [*map(step_line, range(1, 21)), *({**step_line(step), "loss": 7.0} for step in range(21, 31))]
        write_atomically(run.folder.metrics, "".join(json.dumps(line) + "\n" for line in lines).encode())
        browser.wait_for(f"{value} === '7'")
        (loss,) = curves(browser, "Loss")
        assert len(points(loss)) == 30
        # Fewer lines.
        write_atomically(run.folder.metrics, "".join(json.dumps(line) + "\n" for line in lines[:5]).encode())
        browser.wait_for(f"{value} !== '7'")
        (loss,) = curves(browser, "Loss")
        assert len(points(loss)) == 5


@needs_chromium
def test_a_long_run_fits_a_phone_and_is_thinned(supervisor: Supervisor, page: Page) -> None:
    run = make_run(supervisor, num_lines=20_000)
    with page() as browser:
        browser.resize(390, 844)
        browser.wait_for(f"!{figure('Rerouted picks')}.hidden")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        longest = browser.evaluate(
            "Math.max(...[...document.querySelectorAll('figure path')].map((p) => p.getAttribute('d').split(/[ML]/).length))"
        )
        assert longest <= 1001
        assert points(curves(browser, "Loss")[0])[-1][0] <= browser.evaluate(
            f"{figure('Loss')}.querySelector('svg[role=img]').clientWidth"
        )
        add_line(run, {**step_line(20_001), "loss": 0.321})
        browser.wait_for(f"{figure('Loss')}.querySelector('.value').textContent === '0.321'")


def luminance(color: str) -> float:
    """Return the relative luminance of an `rgb(r, g, b)` (WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@needs_chromium
@pytest.mark.parametrize("is_dark", [False, True])
def test_curves_and_words_stand_out_from_the_ground(supervisor: Supervisor, page: Page, is_dark: bool) -> None:
    make_run(supervisor, num_lines=20)
    color = "getComputedStyle({}).{}"
    with page() as browser:
        browser.resize(1280, 900, is_dark=is_dark)
        browser.wait_for(f"!{figure('Gradient norm by group')}.hidden")
        ground = luminance(browser.evaluate(color.format("document.querySelector('figure')", "backgroundColor")))
        assert (ground < 0.1) is is_dark
        lines = browser.evaluate("[...document.querySelectorAll('.line path')].map((p) => getComputedStyle(p).stroke)")
        words = [browser.evaluate(color.format(f"document.querySelector('{at}')", "color")) for at in ("h3", "small")]
        assert len(set(lines)) >= 6
        for colors, least in ((lines, 3), (words, 4.5)):
            for said in colors:
                low, high = sorted((luminance(said), ground))
                assert (high + 0.05) / (low + 0.05) >= least, said


@needs_chromium
def test_curves_move_while_a_run_trains(supervisor: Supervisor, recipe: TrainRecipe, page: Page) -> None:
    recipe = recipe.model_copy(update={"num_steps": 400, "evaluate_every": 100, "checkpoint_every": 100})
    run = supervisor.runs.create(new_run_id(), RunRequest(recipe="tiny"), recipe, idempotency_key=None)
    stop = threading.Event()
    training = threading.Thread(target=train, args=(recipe, run.folder, stop))
    training.start()
    try:
        with page() as browser:
            path = f"{figure('Loss')}.querySelector('svg[role=img] path')"
            browser.wait_for(f"{path} !== null", timeout_s=120)
            seen = len(points(curves(browser, "Loss")[0]))
            browser.wait_for(f"{path}.getAttribute('d').split(/[ML]/).length - 1 > {seen}", timeout_s=120)
            assert browser.evaluate("document.getElementById('progress').value") > 0
            first = next(line for line in run.folder.metrics.read_text().splitlines() if "grad_norms" in line)
            groups = json.loads(first)["grad_norms"]
            assert len(set(curves(browser, "Gradient norm by group"))) == len(groups) > 4
    finally:
        stop.set()
        training.join()


def test_a_line_that_is_not_finite_is_null_and_no_defect(app: FastAPI, supervisor: Supervisor) -> None:
    run = make_run(supervisor, num_lines=1, evaluations=False)
    run.folder.metrics.write_text(
        '{"step": 1, "loss": NaN, "grad_norm": Infinity, "grad_norms": {"encoder": -Infinity}, "tokens_per_s": 1e999}\n'
        '{"step": 2, "loss": 0.5}\n'
    )
    run.folder.write_status(run.status.model_copy(update={"loss": math.nan, "held_out_kl": {"adapter": math.inf}}))
    with TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        answer = client.get(f"/v1/runs/{run.run_id}/metrics")
        assert answer.status_code == 200
        nothing = {"loss": None, "grad_norm": None, "grad_norms": {"encoder": None}, "tokens_per_s": None}
        assert answer.json()["metrics"] == [{"step": 1, **nothing}, {"step": 2, "loss": 0.5}]
        status = client.get(f"/v1/runs/{run.run_id}")
        assert (status.status_code, status.json()["loss"]) == (200, None)
        assert status.json()["held_out_kl"] == {"adapter": None}
        assert client.get("/v1/runs").status_code == 200
