"""Tests of the REST routes with a real bundle and a real store."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from adapter_stores import adapter_folder, stored_ids
from fastapi.testclient import TestClient
from safetensors.torch import load

from hyperagent_adapter_api.generator import AdapterGenerator

PROMPT = "fix the failing test in the parser"
UNKNOWN = "0" * 64


def create(client: TestClient, prompt: str = PROMPT) -> dict[str, Any]:
    answer = client.post("/v1/adapters", json={"prompt": prompt})
    assert answer.status_code == 201, answer.text
    adapter: dict[str, Any] = answer.json()
    return adapter


def refused(answer: Any, status: int) -> str:
    """Return the problem's detail after checking that it is a single line of problem details."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    detail: str = answer.json()["detail"]
    assert "\n" not in detail
    assert len(answer.content) < 1500
    return detail


def test_a_prompt_becomes_an_adapter(client: TestClient, generator: AdapterGenerator, store_folder: Path) -> None:
    answer = client.post("/v1/adapters", json={"prompt": PROMPT})
    assert answer.status_code == 201
    adapter = answer.json()
    assert answer.headers["Location"] == adapter["links"]["self"] == f"/v1/adapters/{adapter['id']}"
    assert re.fullmatch("[0-9a-f]{64}", adapter["id"])
    assert adapter["rank"] == 4
    assert adapter["prompt_tokens"] == generator.encode({"task": PROMPT}).size > 5
    assert (adapter["base_model"], adapter["bundle"]) == (
        generator.bundle.manifest.base_model,
        generator.bundle.fingerprint,
    )
    assert abs(datetime.fromisoformat(adapter["created_at"]) - datetime.now(UTC)) < timedelta(minutes=5)

    model = client.get(adapter["links"]["adapter_model"])
    config = client.get(adapter["links"]["adapter_config"])
    assert len(model.content) == adapter["bytes"] == int(model.headers["Content-Length"])
    for name, downloaded in (("adapter_model.safetensors", model), ("adapter_config.json", config)):
        assert hashlib.sha256(downloaded.content).hexdigest() == adapter["sha256"][name]
        assert downloaded.content == (adapter_folder(store_folder, adapter["id"]) / name).read_bytes()
    assert config.headers["Content-Type"] == "application/json"
    assert config.json()["r"] == 4
    tensors = load(model.content)
    assert len(tensors) == 2 * len(generator.bundle.manifest.layers)
    assert all(abs(tensor).max() > 0 for tensor in tensors.values())
    assert client.get(adapter["links"]["self"]).json() == adapter


def test_the_same_prompt_is_the_same_adapter(client: TestClient, store_folder: Path) -> None:
    first = create(client)
    again = client.post("/v1/adapters", json={"prompt": PROMPT})
    assert (again.status_code, again.json()) == (200, first)
    assert again.headers["Location"] == first["links"]["self"]
    other = create(client, PROMPT + "!")
    assert other["id"] != first["id"]
    assert other["sha256"]["adapter_model.safetensors"] != first["sha256"]["adapter_model.safetensors"]
    assert stored_ids(store_folder) == {first["id"], other["id"]}


def test_equal_prompts_at_once_are_one_adapter(client: TestClient) -> None:
    with ThreadPoolExecutor(3) as callers:
        answers = list(callers.map(lambda _: client.post("/v1/adapters", json={"prompt": PROMPT}), range(3)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 201]
    assert len({answer.text for answer in answers}) == 1


def test_a_download_need_not_be_repeated(client: TestClient) -> None:
    adapter = create(client)
    for link in ("adapter_model", "adapter_config"):
        path = adapter["links"][link]
        etag = client.get(path).headers["ETag"]
        assert re.fullmatch('"[0-9a-f]{64}"', etag)
        for known in (etag, f'"other", {etag}', f"W/{etag}", "*"):
            unchanged = client.get(path, headers={"If-None-Match": known})
            assert (unchanged.status_code, unchanged.content, unchanged.headers["ETag"]) == (304, b"", etag)
        assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_adapters_are_listed_in_pages(client: TestClient) -> None:
    assert client.get("/v1/adapters").json() == {"adapters": [], "next": None}
    made = sorted((create(client, f"task {i}") for i in range(5)), key=lambda adapter: adapter["id"])
    assert client.get("/v1/adapters").json() == {"adapters": made, "next": None}
    seen, sizes, path = [], [], "/v1/adapters?limit=2"
    while path is not None:
        page = client.get(path).json()
        seen += page["adapters"]
        sizes.append(len(page["adapters"]))
        path = page["next"]
    assert (seen, sizes) == (made, [2, 2, 1])
    assert client.get("/v1/adapters?limit=5").json()["next"] is None
    for query in ("limit=0", "limit=1001", "limit=x", "after=..", "after=" + "A" * 64):
        refused(client.get(f"/v1/adapters?{query}"), 422)


def test_a_deleted_adapter_is_gone_and_can_be_made_again(client: TestClient, store_folder: Path) -> None:
    adapter = create(client)
    assert client.delete(adapter["links"]["self"]).status_code == 204
    assert stored_ids(store_folder) == set()
    for path in adapter["links"].values():
        assert adapter["id"] in refused(client.get(path), 404)
    assert adapter["id"] in refused(client.delete(adapter["links"]["self"]), 404)
    assert create(client)["id"] == adapter["id"]


@pytest.mark.parametrize(
    "adapter_id",
    [UNKNOWN, "a", "A" * 64, "..", "%2e%2e", "..%2f..%2fetc", "%2fetc%2fpasswd", "0" * 63 + "%0a", "0" * 5000, "%00"],
)
def test_an_id_that_is_none_is_not_found(client: TestClient, store_folder: Path, adapter_id: str) -> None:
    secret = store_folder.parent / "adapter_config.json"
    secret.write_text("secret")
    for suffix in ("", "/adapter_model.safetensors", "/adapter_config.json", "/adapter.json"):
        answer = client.get(f"/v1/adapters/{adapter_id}{suffix}")
        refused(answer, 404)
        assert "secret" not in answer.text
    assert client.delete(f"/v1/adapters/{adapter_id}").status_code in (404, 405)
    assert secret.exists()


@pytest.mark.parametrize("prompt", ["", " \n\t", "\ud800"])
def test_a_prompt_without_text_is_refused(client: TestClient, store_folder: Path, prompt: str) -> None:
    content = json.dumps({"prompt": prompt})
    answer = client.post("/v1/adapters", content=content, headers={"Content-Type": "application/json"})
    assert "the prompt" in refused(answer, 422)
    assert stored_ids(store_folder) == set()


@pytest.mark.parametrize("body", [{}, {"prompt": None}, {"prompt": ["a"]}, {"prompt": "a", "rank": 512}, "a"])
def test_a_wrong_body_is_refused(client: TestClient, store_folder: Path, body: object) -> None:
    refused(client.post("/v1/adapters", json=body), 422)
    assert stored_ids(store_folder) == set()


def test_a_long_prompt_is_refused_by_its_tokens(client: TestClient, store_folder: Path) -> None:
    detail = refused(client.post("/v1/adapters", json={"prompt": "task " * 1000}), 413)
    assert re.search(r"the prompt has \d{3,} tokens, this hypernetwork reads at most 200; ", detail)
    assert "has 20,000 characters" in refused(client.post("/v1/adapters", json={"prompt": "task " * 4000}), 413)
    assert "the request's body is larger" in refused(client.post("/v1/adapters", json={"prompt": "x" * 500_000}), 413)
    assert stored_ids(store_folder) == set()


def test_a_body_larger_than_any_prompt_is_refused(client: TestClient, store_folder: Path) -> None:
    assert "163840 bytes" in refused(client.post("/v1/adapters", json={"prompt": "x" * (4 << 20)}), 413)
    assert stored_ids(store_folder) == set()


def test_control_tokens_in_a_prompt_are_text(client: TestClient, generator: AdapterGenerator) -> None:
    adapter = create(client, "say <|im_end|>")
    assert adapter["prompt_tokens"] == generator.encode({"task": "say <|im_end|>"}).size
    control = {0, 1, 2}
    plain = [int(i) for i in generator.encode({"task": "say <|im_end|>"}) if i in control]
    assert plain == [1, 2]  # Only the template's own two.


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_when_the_disk_refuses_nothing_half_written_is_left(client: TestClient, store_folder: Path) -> None:
    with largest_file(8192):
        detail = refused(client.post("/v1/adapters", json={"prompt": PROMPT}), 507)
    assert "could not write" in detail
    assert stored_ids(store_folder) == set()
    adapter = create(client)
    assert adapter["bytes"] > 8192
    with largest_file(8192):
        assert client.post("/v1/adapters", json={"prompt": PROMPT}).status_code == 200
        assert len(client.get(adapter["links"]["adapter_model"]).content) == adapter["bytes"]


def test_what_is_damaged_is_quarantined_and_made_again(client: TestClient, store_folder: Path) -> None:
    adapter = create(client)
    other = create(client, "another task")

    def same_size(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))

    damages: list[Callable[[Path], Any]] = [
        lambda folder: same_size(folder / "adapter_model.safetensors"),
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
        lambda folder: (folder / "adapter_config.json").unlink(),
        lambda folder: (folder / "adapter.json").write_text('{"id": '),
        lambda folder: (folder / "adapter.json").unlink(),
    ]
    for number, damage in enumerate(damages, start=1):
        damage(adapter_folder(store_folder, adapter["id"]))
        # Nothing wrong is served, and the damage of one adapter hides no other.
        assert [found["id"] for found in client.get("/v1/adapters").json()["adapters"]] == [other["id"]]
        refused(client.get(adapter["links"]["adapter_model"]), 404)
        assert len(list(store_folder.glob("*/.damaged-*"))) == number
        assert create(client)["sha256"] == adapter["sha256"]


def test_the_paths_work_without_a_version_and_with_head(client: TestClient) -> None:
    answer = client.post("/adapters", json={"prompt": PROMPT})
    assert answer.status_code == 201
    links = answer.json()["links"]
    assert client.get("/adapters").json() == client.get("/v1/adapters").json()
    for link in links.values():
        head, got = client.head(link), client.get(link)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(got.content))
        assert head.headers.get("etag") == got.headers.get("etag")


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer"])
def test_the_case_of_the_scheme_does_not_matter(client: TestClient, scheme: str) -> None:
    assert client.get("/v1/bundle", headers={"Authorization": f"{scheme} secret"}).status_code == 200


@pytest.mark.parametrize("wrapped", [f"{PROMPT}\n", f"\ufeff{PROMPT}", f"\ufeff{PROMPT}\r\n"])
def test_what_an_editor_adds_to_a_file_is_not_another_prompt(client: TestClient, wrapped: str) -> None:
    adapter = create(client)
    assert client.post("/v1/adapters", json={"prompt": wrapped}).json()["id"] == adapter["id"]
    assert create(client, f"{PROMPT}\n\n")["id"] != adapter["id"]


def test_a_leased_adapter_is_not_deleted(client: TestClient) -> None:
    adapter = create(client)
    lease = f"{adapter['links']['self']}/leases/engine-1"
    assert client.put(lease, json={"ttl_s": 60}).json()["holder"] == "engine-1"
    assert "engine-1" in refused(client.delete(adapter["links"]["self"]), 409)
    assert client.delete(lease).status_code == 204
    assert client.delete(lease).status_code == 204
    assert client.put(lease, json={"ttl_s": 0.001}).status_code == 200
    time.sleep(0.01)
    assert client.delete(adapter["links"]["self"]).status_code == 204
    assert client.put(lease).status_code == 404
    assert client.put(f"{adapter['links']['self']}/leases/..%2F..").status_code in (404, 422)


@pytest.mark.parametrize("part", [{"system": "be good"}, {"tools": []}, {"extra": "a map"}, {"tools": None}])
def test_a_part_that_the_hypernetwork_does_not_read_is_refused(client: TestClient, part: dict[str, Any]) -> None:
    answer = client.post("/v1/adapters", json={"prompt": "fix it", **part})
    assert answer.status_code == 422
    assert f"does not read {next(iter(part))}, only task" in answer.json()["detail"]


def test_an_adapter_says_where_it_comes_from(client: TestClient, generator: AdapterGenerator) -> None:
    adapter = client.post("/v1/adapters", json={"prompt": "fix it"}).json()
    manifest = generator.bundle.manifest
    assert adapter["data"] == manifest.data.fingerprint
    content = client.get(adapter["links"]["adapter_model"]).content
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length])["__metadata__"] == {
        "format": "pt",
        "hyperagent_bundle": generator.bundle.fingerprint,
        "hyperagent_data": manifest.data.fingerprint,
    }


def test_the_bundle_is_told(client: TestClient, generator: AdapterGenerator) -> None:
    manifest = generator.bundle.manifest
    assert client.get("/v1/bundle").json() == {
        "fingerprint": generator.bundle.fingerprint,
        "base_model": manifest.base_model,
        "student_weights": manifest.student_weights,
        "teacher": "ab" * 32,
        "data": manifest.data.fingerprint,
        "condition": ["task"],
        "rank": 4,
        "alpha": 8.0,
        "num_layers": 10,
        "max_prompt_tokens": 200,
        "step": 7,
    }


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/adapters"),
        ("GET", "/v1/adapters"),
        ("GET", f"/v1/adapters/{UNKNOWN}"),
        ("GET", f"/v1/adapters/{UNKNOWN}/adapter_model.safetensors"),
        ("DELETE", f"/v1/adapters/{UNKNOWN}"),
        ("GET", "/v1/bundle"),
    ],
)
def test_without_the_token_nothing_is_answered(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, path, headers={"Authorization": "Bearer wrong"}, json={"prompt": PROMPT})
    assert "token" in refused(answer, 401)
    assert client.get("/v1/adapters").json()["adapters"] == []


def test_the_schema_lists_every_route(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {path for path in paths if path.startswith("/v1")} == {
        "/v1/adapters",
        "/v1/adapters/{adapter_id}",
        "/v1/adapters/{adapter_id}/adapter_model.safetensors",
        "/v1/adapters/{adapter_id}/adapter_config.json",
        "/v1/adapters/{adapter_id}/leases/{holder}",
        "/v1/bundle",
    }
