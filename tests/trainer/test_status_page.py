"""The status page: what everybody may read, what nobody may without the token, and what a browser makes of it."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from browser import Browser
from fastapi import FastAPI
from fastapi.testclient import TestClient
from served import served

import hyperagent_trainer
from hyperagent_trainer.config import ControlSettings, TrainRecipe
from hyperagent_trainer.control import create_control_app
from hyperagent_trainer.run_folder import RunStatus
from hyperagent_trainer.runs import Run, RunRequest, new_run_id
from hyperagent_trainer.status_page import PUBLIC_PATHS
from hyperagent_trainer.supervisor import Supervisor

TOKEN = "secret"
STATIC = Path(hyperagent_trainer.__file__).parent / "static"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
    # The namespace of SVG is a name and is not fetched.
    addresses = [a for f in STATIC.iterdir() for a in re.findall(r"https?://[^\s\"']+", f.read_text())]
    assert set(addresses) == {"http://www.w3.org/2000/svg"}


def make_run(supervisor: Supervisor, *, num_lines: int, evaluations: bool = True) -> Run:
    """A run of which a line of each kind is known; it lacks the fields of the hot tier."""
    recipe = TrainRecipe(student=Path("s"), tokens=Path("t"), cache=Path("c"), num_steps=4000)
    run = supervisor.runs.create(new_run_id(), RunRequest(recipe="qwen3-next-80b"), recipe, idempotency_key=None)
    with run.folder.metrics.open("w") as file:
        for step in range(num_lines):
            if evaluations and step % 200 == 0:
                kl = {"frozen": 0.9, "adapter": 0.35 + 0.55 * math.exp(-step / 900), "shuffled": 0.6}
                file.write(json.dumps({"step": step, "held_out_kl": kl}) + "\n")
            wave = math.sin(step * 12.9898) * 0.06
            line = {
                "step": step + 1,
                "loss": 0.4 + math.exp(-step / 500) + wave,
                "tokens_per_s": 41_200 + 3000 * wave * 10,
                "grad_norm": 0.8 + wave + (9 if step == 1234 else 0),
                "step_efficiency": 0.93 + wave / 2,
                "data_wait_s": 0.004 + wave * 0.02,
            }
            file.write(json.dumps(line) + "\n")
    status = RunStatus(
        state="running",
        step=num_lines,
        num_steps=4000,
        loss=0.5,
        eta_s=5400.0,
        conditioning={"held_out": "<b>own prompt helps</b>"},
    )
    run.folder.write_status(status)
    return run


def sign_in(browser: Browser, token: str) -> None:
    browser.wait_for("!document.getElementById('sign-in').hidden")
    browser.evaluate(f"document.getElementById('token').value = {json.dumps(token)}")
    browser.evaluate("document.querySelector('#sign-in button').click()")


def captions(browser: Browser) -> list[str]:
    found: list[str] = browser.evaluate(
        "[...document.querySelectorAll('figure')].filter((f) => !f.hidden).map((f) => f.querySelector('h3').textContent)"
    )
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_shows_runs_and_follows_them(app: FastAPI, supervisor: Supervisor, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    older = make_run(supervisor, num_lines=50, evaluations=False)
    run = make_run(supervisor, num_lines=3000)
    with served(app) as address, Browser(CHROMIUM, tmp_path / "profile") as browser:
        browser.visit(address)
        sign_in(browser, "wrong")
        browser.wait_for("document.getElementById('notice').textContent.includes('refused')")
        assert browser.evaluate("sessionStorage.length") == 0
        browser.complaints.clear()  # the browser logs the 401

        sign_in(browser, TOKEN)
        browser.wait_for("document.querySelectorAll('figure path').length >= 8")
        assert browser.evaluate("document.querySelectorAll('nav li').length") == 2
        text = browser.evaluate("document.getElementById('run').innerText")
        assert "step 3,000 of 4,000 · 75 % · 1 h 30 min left" in text
        assert "<b>own prompt helps</b>" in text
        assert [c.split(" ")[0] for c in captions(browser)] == ["Loss", "Held-out", "Speed", "Gradient", "Step", "Data"]
        points = (
            "[...document.querySelectorAll('figure path')].map((p) => p.getAttribute('d').split(/[ML]/).length - 1)"
        )
        assert 900 <= max(browser.evaluate(points)) <= 1000
        # The one spike among 3,000 values survives the thinning: nothing else is near the picture's top.
        norm = "[...document.querySelectorAll('figure')][3].querySelector('path').getAttribute('d')"
        heights = [float(y) for y in re.findall(r" ([\d.]+)", browser.evaluate(norm))]
        assert sorted(heights)[1] - min(heights) > 100

        with run.folder.metrics.open("a") as file:
            file.write(json.dumps({"step": 3001, "loss": 0.123, "hot_hits": 3, "hot_misses": 1}) + "\n")
        run.folder.write_status(run.status.model_copy(update={"state": "failed", "reason": "the disk is full"}))
        browser.wait_for("document.getElementById('state').textContent === 'failed'")
        browser.wait_for("document.querySelector('figcaption').textContent.includes('0.123')")
        assert captions(browser)[-1].startswith("Cache hits")
        assert "the disk is full" in browser.evaluate("document.getElementById('run').innerText")

        browser.evaluate(f"location.hash = '#{older.run_id}'")
        browser.wait_for("document.getElementById('progress-text').textContent.startsWith('step 50 ')")
        browser.wait_for("[...document.querySelectorAll('figure')].filter((f) => !f.hidden).length === 5")
        assert browser.complaints == []
