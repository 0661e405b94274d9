"""Write and read bundles: everything needed to turn a prompt into an adapter, usually without the student.

bundle.json               manifest: the student and teacher it belongs to, shapes, and digests of the files
hypernetwork.safetensors  the hypernetwork's weights, with the static adapter that it started from, if any
embeddings.safetensors    the student's frozen embedding table, if the hypernetwork reads embeddings
tokenizer/                the student's tokenizer files
README.md                 the model card, which has no digest
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hyperagent.config import parse
from hyperagent.errors import ConfigError, CorruptRecord, InvalidRequest, LimitExceeded
from hyperagent.identity import canonical_json
from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.config import EMBEDDINGS
from hyperagent.model.featurizer import EmbeddingFeaturizer, PromptFeaturizer
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.manifest import NetworkManifest
from hyperagent.model.static_lora import StaticLoRA
from hyperagent.storage.files import new_directory

FORMAT_VERSION = 4
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class BundleManifest(NetworkManifest):
    """The content of `bundle.json`."""

    format_version: int = FORMAT_VERSION
    base_model: str
    """Name or path of the student, written into every adapter."""
    teacher: str
    """Fingerprint of the teacher that the hypernetwork learned from."""
    condition: tuple[str, ...]
    """Parts of a trajectory that the hypernetwork reads (`hyperagent.data.pipeline.views.Part`)."""
    max_prompt_tokens: int = Field(ge=1)
    """Longest prompt that the hypernetwork was trained to read, in tokens."""
    step: int = Field(ge=0)
    """Number of optimizer steps that the hypernetwork was trained for."""
    files: dict[str, str] = Field(default_factory=dict)
    """BLAKE3 digest (hex) of every file except `bundle.json` and the model card, by path inside the bundle."""

    @property
    def rank(self) -> int:
        return self.hypernetwork.rank

    @property
    def alpha(self) -> float:
        return self.hypernetwork.alpha

    @model_validator(mode="after")
    def _holds_a_hypernetwork(self) -> BundleManifest:
        if self.mode == "static":
            raise ValueError("a static adapter needs no bundle, since it is already a PEFT folder; use that folder")
        return self


class Bundle:
    """A loaded bundle, which generates adapters on the CPU."""

    def __init__(
        self, folder: Path, manifest: BundleManifest, hypernetwork: AgenticHyperNetwork, featurizer: PromptFeaturizer
    ) -> None:
        self.manifest = manifest
        self.tokenizer_folder = folder / "tokenizer"
        self.fingerprint = blake3(canonical_json(manifest.model_dump(mode="json"))).hexdigest()
        """Digest of the manifest, and thereby of every file whose digest is in it."""
        self._hypernetwork = hypernetwork
        self._featurizer = featurizer

    @torch.inference_mode()
    def generate(self, prompt_ids: NDArray[np.uint32]) -> AdapterWeights:
        """Return the adapter for one prompt of P token ids: float32 a [R, I] and b [O, R] per layer.

        Raises:
            InvalidRequest: the prompt is empty or has an id outside the embedding table.
            LimitExceeded: the prompt is longer than the bundle's limit.
        """
        if prompt_ids.size == 0:
            raise InvalidRequest("the prompt is empty; send the task's text")
        if prompt_ids.size > self.manifest.max_prompt_tokens:
            raise LimitExceeded(
                f"the prompt has {prompt_ids.size} tokens, this hypernetwork reads at most {self.manifest.max_prompt_tokens}; shorten it"
            )
        if int(prompt_ids.max()) >= self._featurizer.num_ids:
            raise InvalidRequest(
                f"prompt id {int(prompt_ids.max())} is outside the embedding table of {self._featurizer.num_ids} rows; "
                "tokenize with the bundle's tokenizer"
            )
        ids_1P = torch.from_numpy(prompt_ids.astype(np.int64))[None]
        mask_1P = self._hypernetwork.readable(ids_1P, torch.ones_like(ids_1P, dtype=torch.bool))
        batched = self._hypernetwork(self._featurizer(ids_1P), mask_1P)
        return {name: LoRAPair(pair.a[0].clone(), pair.b[0].clone()) for name, pair in batched.items()}


def save_bundle(
    folder: Path,
    manifest: BundleManifest,
    *,
    hypernetwork: AgenticHyperNetwork,
    embeddings: Tensor,
    tokenizer_folder: Path,
    card: str,
) -> BundleManifest:
    """Write a bundle, completely or not at all, and return the manifest with the files' digests.

    Args:
        embeddings: the student's embedding table; written if the hypernetwork reads embeddings.
        tokenizer_folder: folder of the student's tokenizer files.
        card: the model card in Markdown.

    Raises:
        ConfigError: a tokenizer file is missing.
        StorageError: the file system refuses.
    """
    if missing := [name for name in TOKENIZER_FILES if not (tokenizer_folder / name).is_file()]:
        raise ConfigError(f"the tokenizer folder {tokenizer_folder} lacks {', '.join(missing)}; copy the student's")
    with new_directory(folder) as temporary:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in hypernetwork.state_dict().items()}
        (temporary / "hypernetwork.safetensors").write_bytes(save(weights))
        if manifest.hypernetwork.featurizer == EMBEDDINGS:
            (temporary / "embeddings.safetensors").write_bytes(
                save({"embeddings": embeddings.detach().cpu().contiguous()})
            )
        (temporary / "tokenizer").mkdir()
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer_folder / name, temporary / "tokenizer" / name)
        files = {
            str(p.relative_to(temporary)): blake3(p.read_bytes()).hexdigest()
            for p in sorted(temporary.rglob("*"))
            if p.is_file()
        }
        # The model card has no digest because users edit it.
        (temporary / "README.md").write_text(card, encoding="utf-8")
        manifest = manifest.model_copy(update={"files": files})
        (temporary / "bundle.json").write_text(
            json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8"
        )
    return manifest


def load_bundle(folder: Path, featurizer: PromptFeaturizer | None = None) -> Bundle:
    """Read a bundle and check every file against its digest.

    Args:
        featurizer: `make_featurizer` of the student, for a hypernetwork that reads hidden states; not needed for one
            that reads embeddings, whose table is in the bundle.

    Raises:
        ConfigError: there is no bundle, it has an unknown format version, or it needs the student's featurizer.
        CorruptRecord: a file is missing, or differs from the one that was written.
    """
    try:
        raw = json.loads((folder / "bundle.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} is not a bundle: {error}; train one with `hyperagent train` or `hyperagent demo`"
        ) from error
    if not isinstance(raw, dict) or raw.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{folder}/bundle.json does not have format version {FORMAT_VERSION}; export it again with this release"
        )
    manifest = parse(raw, BundleManifest, source=str(folder / "bundle.json"))
    reads = manifest.hypernetwork.featurizer
    if reads != EMBEDDINGS and featurizer is None:
        raise ConfigError(
            f"the hypernetwork in {folder} reads {reads} of the student, which was not loaded; "
            f"train one with `featurizer: {EMBEDDINGS}` to make adapters without the student"
        )
    contents = {name: _checked(folder / name, digest) for name, digest in manifest.files.items()}
    try:
        if featurizer is None:
            featurizer = EmbeddingFeaturizer(load(contents["embeddings.safetensors"])["embeddings"])
        hypernetwork = hypernetwork_of(manifest, load(contents["hypernetwork.safetensors"]))
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise CorruptRecord(
            f"the hypernetwork in {folder} does not fit its manifest: {' '.join(str(error).split())}"
        ) from error
    return Bundle(folder, manifest, hypernetwork, featurizer)


def hypernetwork_of(manifest: NetworkManifest, weights: dict[str, Tensor]) -> AgenticHyperNetwork:
    """Return the frozen hypernetwork of a manifest with the given weights.

    Raises:
        KeyError, RuntimeError: the weights belong to another hypernetwork.
    """
    config, layers = manifest.hypernetwork, manifest.layers
    # The weights include the static adapter; until they are loaded, one of the same shape takes its place.
    place = StaticLoRA(layers, rank=config.rank, alpha=config.alpha).adapter()
    made = AgenticHyperNetwork(
        config,
        layers,
        weights["encoder.norm_input.weight"].shape[0],
        warm_start=place if manifest.mode == "warm_start" else None,
        common_V=torch.zeros_like(weights["common_V"]),
    )
    made.load_state_dict(weights, strict=True)
    return made.eval().requires_grad_(False)


def _checked(path: Path, digest: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorruptRecord(f"the bundle lacks {path}: {error.strerror}; copy or export it again") from error
    if blake3(content).hexdigest() != digest:
        raise CorruptRecord(f"{path} is not the file that the bundle was made with; copy or export it again")
    return content
