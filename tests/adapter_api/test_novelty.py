"""Test that the service warns of a prompt unlike the training prompts, and serves it all the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from adapter_stores import adapter_folder
from fastapi.testclient import TestClient

from hyperagent.model.bundle import load_bundle
from hyperagent_adapter_api.app import create_adapter_app
from hyperagent_adapter_api.generator import AdapterGenerator
from hyperagent_adapter_api.service import AdapterService
from hyperagent_adapter_api.store import AdapterStore

USUAL = "fix the failing test 155 in the parser"
UNUSUAL = "@@ ZZ ## QQ || %% XX && WW"
MESSAGE = "the prompt is unlike the training prompts: the adapter may be worse than none"
HEADERS = {"Authorization": "Bearer secret"}


def make_client(bundle_folder: Path, store_folder: Path) -> TestClient:
    generator = AdapterGenerator(load_bundle(bundle_folder))
    service = AdapterService(
        generator, AdapterStore(store_folder, generator.bundle.fingerprint, max_bytes=1 << 30), max_pending_requests=4
    )
    return TestClient(create_adapter_app(service, token="secret"), headers=HEADERS)


@pytest.fixture
def watchful(watchful_bundle_folder: Path, store_folder: Path) -> Iterator[TestClient]:
    with make_client(watchful_bundle_folder, store_folder) as client:
        yield client


def test_an_unusual_prompt_is_named_and_still_gets_its_adapter(
    watchful: TestClient, watchful_bundle_folder: Path, store_folder: Path
) -> None:
    bundle = load_bundle(watchful_bundle_folder)
    reader = AdapterGenerator(bundle)
    for prompt, is_unusual in ((USUAL, False), (UNUSUAL, True)):
        with structlog.testing.capture_logs() as logs:
            answer = watchful.post("/v1/adapters", json={"prompt": prompt})
        adapter = answer.json()
        expected = bundle.novelty(reader.encode({"task": prompt}))
        assert answer.status_code == 201
        assert expected is not None
        assert adapter["novelty"] == {
            "distance": expected.distance,
            "threshold": expected.threshold,
            "is_unusual": is_unusual,
        }
        assert (adapter["novelty"]["distance"] > adapter["novelty"]["threshold"]) is is_unusual
        warned = [line for line in logs if line["log_level"] == "warning"]
        found = {"id": adapter["id"], "distance": expected.distance, "threshold": expected.threshold}
        assert warned == ([{"event": MESSAGE, "log_level": "warning", **found}] if is_unusual else [])
        # It is stored with the adapter.
        assert (
            json.loads((adapter_folder(store_folder, adapter["id"]) / "adapter.json").read_text())["novelty"]
            == adapter["novelty"]
        )
        assert watchful.get(adapter["links"]["self"]).json() == adapter
        again = watchful.post("/v1/adapters", json={"prompt": prompt})
        assert (again.status_code, again.json()) == (200, adapter)


def test_a_bundle_without_statistics_makes_the_same_adapter_and_says_nothing_of_the_prompt(
    client: TestClient, watchful_bundle_folder: Path, tmp_path: Path
) -> None:
    with make_client(watchful_bundle_folder, tmp_path / "other") as watchful:
        for prompt in (USUAL, UNUSUAL):
            bare, known = (c.post("/v1/adapters", json={"prompt": prompt}).json() for c in (client, watchful))
            assert bare["novelty"] is None
            assert known["novelty"] is not None
            assert {**bare, "created_at": 0, "novelty": 0} == {**known, "created_at": 0, "novelty": 0}


def test_an_adapter_of_an_earlier_release_is_read(watchful: TestClient, store_folder: Path) -> None:
    adapter = watchful.post("/v1/adapters", json={"prompt": UNUSUAL}).json()
    path = adapter_folder(store_folder, adapter["id"]) / "adapter.json"
    fields = json.loads(path.read_text())
    del fields["novelty"]
    path.write_text(json.dumps(fields))
    assert watchful.get(adapter["links"]["self"]).json() == {**adapter, "novelty": None}
    assert watchful.get("/v1/adapters").json()["adapters"] == [{**adapter, "novelty": None}]


def test_the_schema_describes_novelty(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert set(schemas["Novelty"]["required"]) == {"distance", "threshold", "is_unusual"}
    assert all(field["description"] for field in schemas["Novelty"]["properties"].values())
    assert {"$ref": "#/components/schemas/Novelty"} in schemas["AdapterBody"]["properties"]["novelty"]["anyOf"]
    assert "novelty" not in schemas["AdapterBody"]["required"]
