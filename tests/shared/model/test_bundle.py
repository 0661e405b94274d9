"""Test what a bundle refuses to load and what a failed export leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_identity import data_identity
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.errors import ConfigError, CorruptRecord, InvalidRequest, StorageError
from hyperagent.model.adapter import LoRAPair
from hyperagent.model.bundle import BundleManifest, load_bundle, save_bundle
from hyperagent.model.config import HyperNetworkConfig, LayerInfo
from hyperagent.model.featurizer import EmbeddingFeaturizer, make_featurizer
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.prompt_distance import PromptStatistics, prompt_statistics

LAYERS = (LayerInfo("model.layers.0.self_attn.q_proj", 16, 24),)
CONFIG = HyperNetworkConfig(width=16, num_latents=2, encoder_blocks=1, generator_blocks=1, num_heads=2, rank=2, alpha=4)


def save(
    folder: Path,
    tokenizer: ChatTokenizer,
    *,
    seed: int = 0,
    config: HyperNetworkConfig = CONFIG,
    mode: Any = "from_zero",
    warm_start: str | None = None,
    **changes: Any,
) -> BundleManifest:
    torch.manual_seed(seed)
    manifest = BundleManifest(
        base_model="student", student_weights="w", teacher="t", data=data_identity(tokenizer.identity), condition=("task",), hypernetwork=config,
        layers=LAYERS, max_prompt_tokens=20, step=seed, mode=mode, warm_start=warm_start,
    )  # fmt: skip
    parts = {
        "hypernetwork": AgenticHyperNetwork(CONFIG, LAYERS, 16),
        "embeddings": torch.randn(30, 16),
        "tokenizer_folder": tokenizer.folder,
        "card": "",
        **changes,
    }
    return save_bundle(folder, manifest, **parts)


@pytest.fixture
def folder(tokenizer: ChatTokenizer, tmp_path: Path) -> Path:
    save(tmp_path / "bundle", tokenizer)
    return tmp_path / "bundle"


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def test_a_bundle_holds_these_files_and_their_digests(folder: Path) -> None:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    listed = {"hypernetwork.safetensors", "embeddings.safetensors", *(f"tokenizer/{name}" for name in TOKENIZER_FILES)}
    assert names == listed | {"bundle.json", "README.md"}
    assert set(load_bundle(folder).manifest.files) == listed


def test_a_new_export_replaces_the_old_one_whole(folder: Path, tokenizer: ChatTokenizer) -> None:
    old = load_bundle(folder)
    save(folder, tokenizer, seed=1)
    new = load_bundle(folder)
    assert (old.manifest.step, new.manifest.step) == (0, 1)
    assert old.fingerprint != new.fingerprint
    assert load_bundle(folder).fingerprint == new.fingerprint
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_generating_leaves_nothing_behind_for_the_next_prompt(folder: Path) -> None:
    bundle = load_bundle(folder)
    ids = np.arange(9, dtype=np.uint32)
    first = bundle.generate(ids)
    bundle.generate(ids[::-1].copy())
    again = bundle.generate(ids)
    for name in first:
        assert torch.equal(first[name].a, again[name].a)
        assert not first[name].a.requires_grad


@pytest.mark.parametrize("bit", [0x01, 0x02, 0x10, 0x80])
def test_no_flipped_bit_of_the_manifest_passes_for_the_same_bundle(bit: int, folder: Path) -> None:
    """The manifest has no separate digest, but its fingerprint, which every adapter carries, covers all of it."""
    path = folder / "bundle.json"
    whole = path.read_bytes()
    true = load_bundle(folder).fingerprint
    for index in range(0, len(whole), 3):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ bit]) + whole[index + 1 :])
        try:
            assert load_bundle(folder).fingerprint != true, whole[index - 20 : index + 20]
        except (ConfigError, CorruptRecord) as error:
            assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", ["hypernetwork.safetensors", "embeddings.safetensors", "tokenizer/tokenizer.json"])
def test_a_flipped_byte_anywhere_is_refused(name: str, folder: Path, flip_byte: Callable[[Path, int], None]) -> None:
    whole = (folder / name).read_bytes()
    for index in [0, 7, 8, len(whole) // 3, len(whole) // 2, len(whole) - 1]:
        (folder / name).write_bytes(whole)
        flip_byte(folder / name, index)
        with pytest.raises(CorruptRecord, match=f"{name} is not the file that the bundle was made with"):
            load_bundle(folder)
    (folder / name).write_bytes(whole[:-1])
    with pytest.raises(CorruptRecord, match="is not the file that the bundle was made with"):
        load_bundle(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"format_version": 3}', "{}", '{"format_version": 2, "rank": 4}'])
def test_another_manifest_is_one_line(content: str, folder: Path) -> None:
    (folder / "bundle.json").write_text(content)
    with pytest.raises(ConfigError) as refused:
        load_bundle(folder)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_weights_of_another_shape_are_refused(folder: Path, tokenizer: ChatTokenizer) -> None:
    other = AgenticHyperNetwork(CONFIG.model_copy(update={"rank": 3}), LAYERS, 16)
    save(folder, tokenizer, hypernetwork=other)
    with pytest.raises(CorruptRecord, match="does not fit its manifest") as refused:
        load_bundle(folder)
    assert "\n" not in str(refused.value)


def test_a_failed_export_leaves_the_old_bundle(folder: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    true = load_bundle(folder).fingerprint
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"lacks tokenizer\.json; copy the student's"):
        save(folder, tokenizer, seed=1, tokenizer_folder=tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"could not write .*file: Not a directory; a file is where a folder should"):
        save(tmp_path / "file", tokenizer)
    assert (tmp_path / "file").read_text() == "x"
    assert load_bundle(folder).fingerprint == true
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "empty", "file"}


def statistics_of(folder: Path) -> PromptStatistics:
    """Compute statistics of a saved bundle's network with the prompts 0 1 2 ..., 1 2 3 ... and so on."""
    network = AgenticHyperNetwork(CONFIG, LAYERS, 16)
    network.load_state_dict(load_file(folder / "hypernetwork.safetensors"))
    featurizer = EmbeddingFeaturizer(load_file(folder / "embeddings.safetensors")["embeddings"])
    prompts = [np.arange(start, start + 6, dtype=np.uint32) for start in range(20)]
    return prompt_statistics(network, featurizer, prompts[::2], prompts[1::2])


@pytest.fixture
def with_statistics(folder: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> Path:
    """The same bundle as `folder`, with prompt statistics."""
    save(tmp_path / "with", tokenizer, statistics=statistics_of(folder))
    return tmp_path / "with"


def test_the_novelty_of_a_prompt_comes_from_the_same_pass_as_its_adapter(with_statistics: Path) -> None:
    bundle, ids = load_bundle(with_statistics), np.array([3, 9, 27], np.uint32)
    network, table = bundle._hypernetwork, load_file(with_statistics / "embeddings.safetensors")["embeddings"]
    passes: list[torch.Tensor] = []
    network.encoder.register_forward_hook(lambda *read: passes.append(read[2]))
    adapter, novelty = bundle.generate_with_novelty(ids)
    assert len(passes) == 1
    assert novelty is not None

    latents_LD = network.encoder(table[ids.astype(int)][None], torch.ones(1, 3, dtype=torch.bool))[0]
    read = load_file(with_statistics / "prompt_statistics.safetensors")
    deviation = latents_LD.double().mean(0) - read["mean"]
    expected = float((read["inverse_factor"] @ deviation).norm()) / CONFIG.width**0.5
    assert novelty.distance == pytest.approx(expected, rel=1e-5)
    assert novelty.threshold == float(read["threshold"]) == float(read["quantiles"][-1])
    assert novelty.is_unusual == (expected > novelty.threshold)
    assert bundle.novelty(ids) == novelty
    name = LAYERS[0].name
    assert torch.equal(bundle.generate(ids)[name].a, adapter[name].a)
    assert torch.equal(bundle.generate(ids)[name].b, adapter[name].b)
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        bundle.novelty(ids[:0])


def test_statistics_change_neither_the_adapters_nor_the_fingerprint(folder: Path, with_statistics: Path) -> None:
    bare, bundle, ids = load_bundle(folder), load_bundle(with_statistics), np.arange(5, dtype=np.uint32)
    assert set(bundle.manifest.files) == {*bare.manifest.files, "prompt_statistics.safetensors"}
    assert bundle.fingerprint == bare.fingerprint
    name = LAYERS[0].name
    assert torch.equal(bundle.generate(ids)[name].b, bare.generate(ids)[name].b)
    assert bare.statistics is None
    assert bare.novelty(ids) is None
    assert bare.generate_with_novelty(ids)[1] is None


def test_damaged_or_foreign_statistics_are_refused(
    with_statistics: Path, tokenizer: ChatTokenizer, flip_byte: Callable[[Path, int], None]
) -> None:
    path = with_statistics / "prompt_statistics.safetensors"
    statistics, whole = load_bundle(with_statistics).statistics, path.read_bytes()
    assert statistics is not None
    for index in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole)
        flip_byte(path, index)
        with pytest.raises(CorruptRecord, match=r"prompt_statistics.safetensors is not the file that the bundle was"):
            load_bundle(with_statistics)
    path.unlink()
    with pytest.raises(CorruptRecord, match=r"lacks .*prompt_statistics.safetensors"):
        load_bundle(with_statistics)
    narrow = replace(statistics, mean_D=statistics.mean_D[:-1])
    save(with_statistics, tokenizer, statistics=narrow)
    with pytest.raises(
        CorruptRecord, match=r"the prompt statistics have the tensors .*'mean': \[15\].*export the bundle"
    ):
        load_bundle(with_statistics)


def test_a_bundle_that_reads_hidden_states_needs_the_student(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    attention = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    student = AutoModelForCausalLM.from_config(Qwen3Config(**shape, **attention)).eval()
    config = CONFIG.model_copy(update={"featurizer": "hidden@1"})
    save(tmp_path / "bundle", tokenizer, config=config, hypernetwork=AgenticHyperNetwork(config, LAYERS, 16))
    assert not (tmp_path / "bundle" / "embeddings.safetensors").exists()
    with pytest.raises(ConfigError, match=r"reads hidden@1 of the student, which was not loaded; train one with `feat"):
        load_bundle(tmp_path / "bundle")
    featurizer = make_featurizer("hidden@1", student)
    ids = np.arange(9, dtype=np.uint32)
    made = load_bundle(tmp_path / "bundle", featurizer).generate(ids)
    hidden = student(input_ids=torch.arange(9)[None], output_hidden_states=True).hidden_states[1]
    torch.manual_seed(0)
    other = load_bundle(tmp_path / "bundle", EmbeddingFeaturizer(torch.randn(30, 16))).generate(ids)
    name = LAYERS[0].name
    expected = load_file(tmp_path / "bundle" / "hypernetwork.safetensors")
    network = AgenticHyperNetwork(config, LAYERS, 16)
    network.load_state_dict(expected)
    torch.testing.assert_close(made[name].a, network(hidden, torch.ones(1, 9, dtype=torch.bool))[name].a[0])
    assert not torch.allclose(made[name].a, other[name].a, atol=1e-3)


def test_a_bundle_holds_the_static_adapter_it_started_from(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {LAYERS[0].name: LoRAPair(torch.randn(2, 16), torch.randn(24, 2))}
    network = AgenticHyperNetwork(CONFIG, LAYERS, 16, warm_start=base)
    save(tmp_path / "bundle", tokenizer, hypernetwork=network, mode="warm_start", warm_start="ab" * 32)
    bundle = load_bundle(tmp_path / "bundle")
    made = bundle.generate(np.arange(5, dtype=np.uint32))
    assert torch.equal(made[LAYERS[0].name].a, base[LAYERS[0].name].a)
    assert torch.equal(made[LAYERS[0].name].b, base[LAYERS[0].name].b)
    assert (bundle.manifest.mode, bundle.manifest.warm_start) == ("warm_start", "ab" * 32)
    # A manifest that contradicts the weights.
    save(tmp_path / "bundle", tokenizer, hypernetwork=network)
    with pytest.raises(CorruptRecord, match="does not fit its manifest"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"mode": "warm_start"}, "mode 'warm_start' contradicts the static adapter None"),
        ({"mode": "from_zero", "warm_start": "ab"}, "mode 'from_zero' contradicts the static adapter ab"),
        ({"mode": "static"}, "a static adapter needs no bundle"),
        ({"mode": "cold"}, "'from_zero', 'warm_start' or 'static'"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    fields: dict[str, str], reason: str, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=reason):
        save(tmp_path / "bundle", tokenizer, **fields)
