"""Tests of the adapter service's clients: prompts are sent unchanged, and downloads are atomic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_stores import adapter_folder
from served import served

from hyperagent.adapter_files import CONFIG_FILE, MODEL_FILE
from hyperagent.errors import Conflict, CorruptRecord, InvalidRequest
from hyperagent.http.adapter_client import AdapterClient, AsyncAdapterClient
from hyperagent.http.adapter_models import PromptBody
from hyperagent_adapter_api.app import create_adapter_app
from hyperagent_adapter_api.generator import AdapterGenerator
from hyperagent_adapter_api.service import AdapterService
from hyperagent_adapter_api.store import AdapterStore

PROMPT = PromptBody(prompt="fix the failing test")
TOKEN = "secret"


@pytest.fixture
def address(generator: AdapterGenerator, store_folder: Path) -> Iterator[str]:
    service = AdapterService(
        generator, AdapterStore(store_folder, generator.bundle.fingerprint, max_bytes=1 << 30), max_pending_requests=4
    )
    with served(create_adapter_app(service, token=TOKEN)) as address:
        yield address


def test_an_adapter_is_made_listed_and_downloaded_in_place_of_an_older_one(
    address: str, store_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_config.json").write_text("x")
    with AdapterClient(address, TOKEN) as client:
        adapter = client.create(PROMPT)
        assert client.create(PROMPT) == adapter
        client.create(PromptBody(prompt="another task"))
        first, second = client.adapters().adapters
        assert adapter in (first, second)
        assert client.adapters(limit=1).adapters == [first]
        assert client.adapters(after=first.id).adapters == [second]
        client.download(adapter, out)
    assert sorted(path.name for path in out.iterdir()) == [CONFIG_FILE, MODEL_FILE]
    for name in (CONFIG_FILE, MODEL_FILE):
        assert (out / name).read_bytes() == (adapter_folder(store_folder, adapter.id) / name).read_bytes()


def test_a_damaged_download_is_an_error_and_leaves_the_folder_as_it_was(address: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with AdapterClient(address, TOKEN) as client:
        adapter = client.create(PROMPT)
        adapter.sha256[CONFIG_FILE] = "0" * 64
        with pytest.raises(CorruptRecord, match=f"{CONFIG_FILE} of adapter {adapter.id} arrived damaged"):
            client.download(adapter, out)
    assert not out.exists()


def test_a_folder_with_other_files_is_not_replaced(address: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with (
        AdapterClient(address, TOKEN) as client,
        pytest.raises(Conflict, match=r"holds other files .* such as notes\.txt"),
    ):
        client.download(client.create(PROMPT), out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_part_that_is_null_is_sent_and_one_that_is_left_out_is_not(address: str) -> None:
    with AdapterClient(address, TOKEN) as client, pytest.raises(InvalidRequest, match="does not read system"):
        client.create(PromptBody(prompt="task", system=None))


async def test_the_asynchronous_client_asks_the_same(address: str, store_folder: Path, tmp_path: Path) -> None:
    async with AsyncAdapterClient(address, TOKEN) as client:
        adapter = await client.create(PROMPT)
        assert (await client.adapters()).adapters == [adapter]
        await client.download(adapter, tmp_path / "out")
    assert (tmp_path / "out" / MODEL_FILE).read_bytes() == (
        adapter_folder(store_folder, adapter.id) / MODEL_FILE
    ).read_bytes()
