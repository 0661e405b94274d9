"""Tests of the queue and the store, and of inputs with which the service refuses to start."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from copy import copy as shallow_copy
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_stores import adapter_folder
from numpy.typing import NDArray

from hyperagent.errors import (
    Busy,
    ConfigError,
    CorruptRecord,
    IdentityMismatch,
    InvalidRequest,
    LimitExceeded,
    NotServing,
    StorageError,
)
from hyperagent.http.adapter_models import Novelty, StoredAdapter
from hyperagent.model.bundle import load_bundle
from hyperagent.model.peft_io import AdapterFiles
from hyperagent_adapter_api.app import build_app
from hyperagent_adapter_api.config import AdapterApiSettings
from hyperagent_adapter_api.generator import AdapterGenerator
from hyperagent_adapter_api.service import AdapterService
from hyperagent_adapter_api.store import AdapterStore


class SlowGenerator(AdapterGenerator):
    """Generator that waits until it is released, and counts its calls."""

    def __init__(self, generator: AdapterGenerator) -> None:
        super().__init__(generator.bundle)
        self.may_go = threading.Event()
        self.generated = 0
        self.running = 0
        self.most_running = 0

    def generate(self, prompt_ids: NDArray[np.uint32]) -> tuple[AdapterFiles, Novelty | None]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        assert self.may_go.wait(20)
        self.generated += 1
        made = super().generate(prompt_ids)
        self.running -= 1
        return made


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_equal_prompts_at_once_make_one_adapter(generator: AdapterGenerator, store_folder: Path) -> None:
    slow = SlowGenerator(generator)
    store = AdapterStore(store_folder, generator.bundle.fingerprint, max_bytes=1 << 30)
    service = AdapterService(slow, store, max_pending_requests=2)
    prompts = ["one"] * 200 + ["two"]
    asked = [asyncio.create_task(service.create({"task": prompt})) for prompt in prompts]
    await until(lambda: slow.running == 1)
    slow.may_go.set()
    answers = await asyncio.gather(*asked)
    assert sum(is_new for _, is_new in answers) == 2
    assert len({adapter.id for adapter, _ in answers}) == 2
    assert (slow.generated, slow.most_running) == (2, 1)
    service.close()


async def test_a_full_queue_turns_new_prompts_away_and_answers_known_ones(
    generator: AdapterGenerator, store_folder: Path
) -> None:
    slow = SlowGenerator(generator)
    store = AdapterStore(store_folder, generator.bundle.fingerprint, max_bytes=1 << 30)
    service = AdapterService(slow, store, max_pending_requests=2)
    slow.may_go.set()
    known, _ = await service.create({"task": "known"})
    slow.may_go.clear()
    asked = [asyncio.create_task(service.create({"task": prompt})) for prompt in ("one", "two")]
    await until(lambda: len(service._in_flight) == 2)
    with pytest.raises(Busy, match="2 adapters wait to be generated") as refused:
        await service.create({"task": "three"})
    assert refused.value.retry_after_s >= 1
    assert await service.create({"task": "known"}) == (known, False)
    follower = asyncio.create_task(service.create({"task": "one"}))
    # A caller that gives up takes the adapter from nobody.
    asked[0].cancel()
    await asyncio.sleep(0.02)
    slow.may_go.set()
    adapter, is_new = await follower
    assert not is_new
    assert store.get(adapter.id) == adapter
    await asked[1]
    assert (await service.create({"task": "three"}))[1]
    service.close()


async def test_stopping_answers_everything_accepted_and_accepts_nothing_more(
    generator: AdapterGenerator, store_folder: Path
) -> None:
    slow = SlowGenerator(generator)
    store = AdapterStore(store_folder, generator.bundle.fingerprint, max_bytes=1 << 30)
    service = AdapterService(slow, store, max_pending_requests=9)
    asked = [asyncio.create_task(service.create({"task": f"task {n}"})) for n in range(5)]
    await until(lambda: len(service._in_flight) == 5)
    closing = asyncio.create_task(service.wait_closed())
    await asyncio.sleep(0)
    with pytest.raises(NotServing, match="is stopping"):
        await service.create({"task": "too late"})
    slow.may_go.set()
    await closing
    assert all(is_new for _, is_new in await asyncio.gather(*asked))
    service.close()


async def test_a_far_too_long_prompt_is_refused_before_it_is_tokenized(
    generator: AdapterGenerator, store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(store_folder, generator.bundle.fingerprint, max_bytes=1 << 30)
    service = AdapterService(generator, store, max_pending_requests=2)
    monkeypatch.setattr(generator, "encode", None)
    with pytest.raises(LimitExceeded, match=r"has 16,385 characters.* at most 16,384 characters"):
        await service.create({"task": "x" * 16_385})
    service.close()


def test_an_id_depends_on_the_prompt_the_bundle_and_the_dtype_alone(
    generator: AdapterGenerator, bundle_folder: Path, tmp_path: Path
) -> None:
    prompt_ids = generator.encode({"task": "fix the test"})
    shutil.copytree(bundle_folder, tmp_path / "copy")
    copy = AdapterGenerator(load_bundle(tmp_path / "copy"))
    assert copy.id_of(prompt_ids) == generator.id_of(prompt_ids) != copy.id_of(prompt_ids[:-1])
    retrained = load_bundle(bundle_folder)
    retrained.fingerprint = "00" * 32
    assert AdapterGenerator(retrained).id_of(prompt_ids) != copy.id_of(prompt_ids)
    assert AdapterGenerator(copy.bundle, dtype=torch.float32).id_of(prompt_ids) != copy.id_of(prompt_ids)


def put(store: AdapterStore, generator: AdapterGenerator, task: str) -> StoredAdapter:
    prompt_ids = generator.encode({"task": task})
    files, novelty = generator.generate(prompt_ids)
    adapter_id = generator.id_of(prompt_ids)
    return store.put(adapter_id, files, bundle=generator.bundle, prompt_tokens=prompt_ids.size, novelty=novelty)


def test_several_processes_share_a_store_and_bundles_do_not_see_each_other(
    generator: AdapterGenerator, store_folder: Path
) -> None:
    fingerprint = generator.bundle.fingerprint
    one, two = (AdapterStore(store_folder, fingerprint, max_bytes=1 << 30) for _ in range(2))
    adapter = put(one, generator, "fix the test")
    assert two.get(adapter.id) == adapter
    other = AdapterStore(store_folder, "00" * 32, max_bytes=1 << 30)
    assert other.page(after=None, limit=9) == []
    for store in (one, two, other):
        store.close()

    # Leftovers of a process killed while writing and of one killed while deleting.
    folder = adapter_folder(store_folder, adapter.id)
    shutil.copytree(folder, folder.with_name(f".partial-0-{adapter.id}"))
    shutil.copytree(folder, folder.with_name(".retired-0"))
    (folder.parent / "notes.txt").write_text("mine")
    store = AdapterStore(store_folder, fingerprint, max_bytes=1 << 30)
    assert {path.name for path in folder.parent.iterdir()} == {adapter.id, "notes.txt"}
    assert store.page(after=None, limit=9) == [store.get(adapter.id)] == [adapter]
    store.close()


def test_the_least_recently_used_adapters_without_a_lease_make_room(
    generator: AdapterGenerator, store_folder: Path
) -> None:
    num_bytes = len(generator.generate(generator.encode({"task": "any"}))[0].model)
    store = AdapterStore(store_folder, generator.bundle.fingerprint, max_bytes=3 * num_bytes, ttl_s=3600)
    first, second, third = (put(store, generator, f"task {n}") for n in range(3))

    def last_used(adapter: StoredAdapter, seconds_ago: float) -> None:
        at = time.time() - seconds_ago
        os.utime(adapter_folder(store_folder, adapter.id) / "adapter.json", (at, at))

    def kept() -> set[str]:
        return {adapter.id for adapter in store.page(after=None, limit=99)}

    last_used(first, 30)
    last_used(second, 20)
    last_used(third, 10)
    store.use(first.id)
    fourth = put(store, generator, "task 3")
    assert kept() == {first.id, third.id, fourth.id}
    last_used(third, 30)
    store.lease(third.id, "engine", ttl_s=60)
    last_used(third, 30)
    last_used(first, 20)
    fifth = put(store, generator, "task 4")
    assert kept() == {third.id, fourth.id, fifth.id}
    # An adapter that nobody used for too long is gone, unless it is leased.
    for adapter in (third, fourth):
        last_used(adapter, 4000)
    assert kept() == {third.id, fifth.id}
    for adapter in (fourth, fifth):
        if adapter.id in kept():
            store.lease(adapter.id, "engine", ttl_s=60)
    last_used(fifth, 0)
    sixth = put(store, generator, "task 5")
    store.lease(sixth.id, "engine", ttl_s=60)
    with pytest.raises(StorageError, match="are taken by adapters that are leased"):
        put(store, generator, "task 6")
    assert kept() == {third.id, fifth.id, sixth.id}
    store.close()


def test_a_file_stays_readable_when_its_adapter_is_deleted(generator: AdapterGenerator, store_folder: Path) -> None:
    store = AdapterStore(store_folder, generator.bundle.fingerprint, max_bytes=1 << 30)
    prompt_ids = generator.encode({"task": "fix the test"})
    adapter_id = generator.id_of(prompt_ids)
    files, novelty = generator.generate(prompt_ids)
    store.put(adapter_id, files, bundle=generator.bundle, prompt_tokens=prompt_ids.size, novelty=novelty)
    _, file = store.open(adapter_id, "adapter_model.safetensors")
    store.delete(adapter_id)
    with file:
        assert file.read() == files.model
    store.close()


def test_a_store_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(ConfigError, match="--store"):
            AdapterStore(path, "00" * 32, max_bytes=1)


def test_every_part_the_hypernetwork_reads_must_be_sent_and_counts(generator: AdapterGenerator) -> None:
    manifest = generator.bundle.manifest.model_copy(update={"condition": ("system", "tools", "task")})
    bundle = shallow_copy(generator.bundle)
    bundle.manifest = manifest
    reader = AdapterGenerator(bundle)
    with pytest.raises(InvalidRequest, match="also reads system and tools; send the conversation's value, or null"):
        reader.encode({"task": "fix it"})
    bare = reader.encode({"task": "fix it", "system": None, "tools": None})
    assert bare.tolist() == generator.encode({"task": "fix it"}).tolist()
    prompted = reader.encode({"task": "fix it", "system": "be good", "tools": None})
    assert prompted.size > bare.size
    assert prompted[-bare.size :].tolist() == bare.tolist()


def test_a_foreign_tokenizer_is_refused_at_the_start(tmp_path: Path, bundle_folder: Path) -> None:
    shutil.copytree(bundle_folder, tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    manifest["data"]["tokenizer"] = {"tokenizer_sha256": "cd" * 32, "template_sha256": "ef" * 32}
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(IdentityMismatch, match=r"expected tokenizer_sha256=cdcd.*found tokenizer_sha256="):
        build_app(AdapterApiSettings(bundle=tmp_path / "bundle", store=tmp_path / "store"), token="t")


def test_a_missing_or_damaged_bundle_is_refused_at_the_start(tmp_path: Path, bundle_folder: Path) -> None:
    with pytest.raises(ConfigError, match="is not a bundle"):
        build_app(AdapterApiSettings(bundle=tmp_path / "none", store=tmp_path / "store"), token="t")
    shutil.copytree(bundle_folder, tmp_path / "damaged")
    with (tmp_path / "damaged" / "tokenizer" / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(CorruptRecord, match=r"tokenizer\.json"):
        build_app(AdapterApiSettings(bundle=tmp_path / "damaged", store=tmp_path / "store"), token="t")


def test_a_lease_that_was_granted_holds_whatever_is_evicted_meanwhile(
    generator: AdapterGenerator, store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = len(generator.generate(generator.encode({"task": "any"}))[0].model)
    store = AdapterStore(store_folder, generator.bundle.fingerprint, max_bytes=2 * num_bytes)
    first = put(store, generator, "first")
    evicting = threading.Thread(target=lambda: [put(store, generator, f"other {number}") for number in range(2)])
    find = store.use

    def find_and_let_others_go_on(adapter_id: str) -> StoredAdapter:
        found = find(adapter_id)
        os.utime(adapter_folder(store_folder, first.id) / "adapter.json", (1, 1))
        evicting.start()
        evicting.join(0.3)
        return found

    monkeypatch.setattr(store, "use", find_and_let_others_go_on)
    store.lease(first.id, "engine", ttl_s=60)
    evicting.join()
    assert first.id in {adapter.id for adapter in store.page(after=None, limit=99)}
    store.close()
