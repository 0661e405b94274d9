"""Tests of the queue and the store, and of inputs with which the service refuses to start."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from copy import copy as shallow_copy
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hyperagent.errors import Busy, ConfigError, CorruptRecord, IdentityMismatch, InvalidRequest, ServiceError
from hyperagent.http.adapter_models import Novelty
from hyperagent.model.bundle import load_bundle
from hyperagent.model.peft_io import AdapterFiles
from hyperagent_adapter_api.app import build_app
from hyperagent_adapter_api.config import AdapterApiSettings
from hyperagent_adapter_api.generator import AdapterGenerator
from hyperagent_adapter_api.service import AdapterService
from hyperagent_adapter_api.store import AdapterStore, id_of


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


async def test_equal_prompts_at_once_make_one_adapter(generator: AdapterGenerator, store_folder: Path) -> None:
    slow = SlowGenerator(generator)
    service = AdapterService(slow, AdapterStore(store_folder, max_adapters=9), max_pending_requests=9)
    asked = [asyncio.create_task(service.create({"task": prompt})) for prompt in ("one", "one", "two", "one")]
    await asyncio.sleep(0)
    slow.may_go.set()
    answers = await asyncio.gather(*asked)
    assert [is_new for _, is_new in answers] == [True, False, True, False]
    assert answers[0][0] == answers[1][0] == answers[3][0] != answers[2][0]
    assert (slow.generated, slow.most_running) == (2, 1)
    service.close()


async def test_a_full_queue_turns_prompts_away(generator: AdapterGenerator, store_folder: Path) -> None:
    slow = SlowGenerator(generator)
    service = AdapterService(slow, AdapterStore(store_folder, max_adapters=9), max_pending_requests=2)
    asked = [asyncio.create_task(service.create({"task": prompt})) for prompt in ("one", "two")]
    await asyncio.sleep(0)
    with pytest.raises(Busy, match="already holds 2 prompts"):
        await service.create({"task": "three"})
    slow.may_go.set()
    await asyncio.gather(*asked)
    _, is_new = await service.create({"task": "three"})
    assert is_new
    service.close()


def test_an_id_depends_on_the_prompt_and_on_the_bundle_alone(
    generator: AdapterGenerator, bundle_folder: Path, tmp_path: Path
) -> None:
    prompt_ids = generator.encode({"task": "fix the test"})
    shutil.copytree(bundle_folder, tmp_path / "copy")
    copy = load_bundle(tmp_path / "copy")
    assert id_of(copy, prompt_ids) == id_of(generator.bundle, prompt_ids)
    assert id_of(copy, prompt_ids[:-1]) != id_of(copy, prompt_ids)
    retrained = load_bundle(bundle_folder)
    retrained.fingerprint = "00" * 32
    assert id_of(retrained, prompt_ids) != id_of(copy, prompt_ids)


def test_a_store_has_one_owner_and_outlives_it(generator: AdapterGenerator, store_folder: Path) -> None:
    store = AdapterStore(store_folder, max_adapters=3)
    with pytest.raises(ServiceError, match="another adapter service"):
        AdapterStore(store_folder, max_adapters=3)
    prompt_ids = generator.encode({"task": "fix the test"})
    adapter_id = id_of(generator.bundle, prompt_ids)
    files, novelty = generator.generate(prompt_ids)
    adapter = store.put(adapter_id, files, bundle=generator.bundle, prompt_tokens=prompt_ids.size, novelty=novelty)
    store.close()

    # Leftovers of a process killed while writing and of one killed while deleting.
    shutil.copytree(store_folder / adapter_id, store_folder / f".partial-0-{adapter_id}")
    shutil.copytree(store_folder / adapter_id, store_folder / ".retired-0")
    (store_folder / "notes.txt").write_text("mine")
    store = AdapterStore(store_folder, max_adapters=3)
    assert {path.name for path in store_folder.iterdir()} == {adapter_id, "notes.txt"}
    assert store.page(after=None, limit=9) == [store.get(adapter_id)] == [adapter]
    store.close()


def test_a_file_stays_readable_when_its_adapter_is_deleted(generator: AdapterGenerator, store_folder: Path) -> None:
    store = AdapterStore(store_folder, max_adapters=3)
    prompt_ids = generator.encode({"task": "fix the test"})
    adapter_id = id_of(generator.bundle, prompt_ids)
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
            AdapterStore(path, max_adapters=3)


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
