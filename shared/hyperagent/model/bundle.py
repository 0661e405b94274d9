"""Write and read bundles: everything needed to turn a prompt into an adapter, usually without the student.

bundle.json                    manifest: the student and teacher it belongs to, shapes, and digests of the files
hypernetwork.safetensors       the hypernetwork's weights, with the static adapter that it started from, if any
embeddings.safetensors         the student's frozen embedding table, if the hypernetwork reads embeddings
prompt_statistics.safetensors  the distribution of the training prompts' features, if it was known when exporting
tokenizer/                     the student's tokenizer files
README.md                      the model card, which has no digest
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from hyperagent.config import parse
from hyperagent.errors import ConfigError, CorruptRecord, InvalidRequest, LimitExceeded
from hyperagent.identity import canonical_json
from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.config import EMBEDDINGS
from hyperagent.model.featurizer import EmbeddingFeaturizer, PromptFeaturizer
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.manifest import NetworkManifest
from hyperagent.model.prompt_distance import PromptNovelty, PromptStatistics, feature_of
from hyperagent.model.static_lora import StaticLoRA
from hyperagent.storage.files import new_directory

FORMAT_VERSION = 4
STATISTICS_FILE = "prompt_statistics.safetensors"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Files that a tokenizer may consist of; only the first must be there."""


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
        self,
        folder: Path,
        manifest: BundleManifest,
        hypernetwork: AgenticHyperNetwork,
        featurizer: PromptFeaturizer,
        statistics: PromptStatistics | None,
    ) -> None:
        self.manifest = manifest
        self.tokenizer_folder = folder / "tokenizer"
        self.fingerprint = _fingerprint(manifest)
        """Digest of the manifest, and thereby of every file that decides what the adapters are."""
        self.statistics = statistics
        """Distribution of the training prompts' features; None if it was not known when the bundle was exported."""
        self._hypernetwork = hypernetwork
        self._featurizer = featurizer

    def generate(self, prompt_ids: NDArray[np.uint32]) -> AdapterWeights:
        """Return the adapter for one prompt of P token ids: float32 a [R, I] and b [O, R] per layer.

        Raises:
            InvalidRequest: the prompt is empty or has an id outside the embedding table.
            LimitExceeded: the prompt is longer than the bundle's limit.
        """
        return self.generate_with_novelty(prompt_ids)[0]

    @torch.inference_mode()
    def generate_with_novelty(self, prompt_ids: NDArray[np.uint32]) -> tuple[AdapterWeights, PromptNovelty | None]:
        """Return what `generate` and `novelty` return, from one forward pass; raises the same errors."""
        features_1PE, mask_1P = self._inputs(prompt_ids)
        with _outputs_of(self._hypernetwork.encoder) as latents:
            batched = self._hypernetwork(features_1PE, mask_1P)
        adapter = {name: LoRAPair(pair.a[0].clone(), pair.b[0].clone()) for name, pair in batched.items()}
        return adapter, self._novelty(latents[0])

    @torch.inference_mode()
    def novelty(self, prompt_ids: NDArray[np.uint32]) -> PromptNovelty | None:
        """Return how unlike the training prompts one prompt of P token ids is; None if the bundle has no statistics.

        Raises:
            InvalidRequest, LimitExceeded: see `generate`.
        """
        return self._novelty(self._hypernetwork.encoder(*self._inputs(prompt_ids)))

    def _inputs(self, prompt_ids: NDArray[np.uint32]) -> tuple[Tensor, Tensor]:
        """Return the features [1, P, E] of a prompt and the mask [1, P] of the tokens to read."""
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
        return self._featurizer(ids_1P), mask_1P

    def _novelty(self, latents_1LD: Tensor) -> PromptNovelty | None:
        return None if self.statistics is None else self.statistics.novelty(feature_of(latents_1LD[0]))


def save_bundle(
    folder: Path,
    manifest: BundleManifest,
    *,
    hypernetwork: AgenticHyperNetwork,
    embeddings: Tensor,
    tokenizer_folder: Path,
    card: str,
    statistics: PromptStatistics | None = None,
) -> BundleManifest:
    """Write a bundle, completely or not at all, and return the manifest with the files' digests.

    Args:
        embeddings: the student's embedding table; written if the hypernetwork reads embeddings.
        tokenizer_folder: folder of the student's tokenizer files.
        card: the model card in Markdown.
        statistics: the distribution of the training prompts' features; without it, the bundle recognizes no unusual prompt.

    Raises:
        ConfigError: there is no tokenizer.
        StorageError: the file system refuses.
    """
    if not (tokenizer_folder / "tokenizer.json").is_file():
        raise ConfigError(f"the tokenizer folder {tokenizer_folder} lacks tokenizer.json; copy the student's")
    with new_directory(folder) as temporary:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in hypernetwork.state_dict().items()}
        (temporary / "hypernetwork.safetensors").write_bytes(save(weights))
        if manifest.hypernetwork.featurizer == EMBEDDINGS:
            (temporary / "embeddings.safetensors").write_bytes(
                save({"embeddings": embeddings.detach().cpu().contiguous()})
            )
        if statistics is not None:
            (temporary / STATISTICS_FILE).write_bytes(statistics.encode())
        copy_tokenizer(tokenizer_folder, temporary / "tokenizer")
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


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy every file that a tokenizer and its chat templates consist of.

    Raises:
        OSError: a file cannot be copied.
    """
    target.mkdir(exist_ok=True)
    for pattern in _TOKENIZER_FILES:
        for path in source.glob(pattern):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def read_manifest(folder: Path) -> BundleManifest:
    """Read what a bundle is, without its weights.

    Raises:
        ConfigError: there is no bundle, or it has an unknown format version.
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
    return parse(raw, BundleManifest, source=str(folder / "bundle.json"))


def load_bundle(folder: Path, featurizer: PromptFeaturizer | None = None) -> Bundle:
    """Read a bundle and check every file against its digest.

    Args:
        featurizer: `make_featurizer` of the student, for a hypernetwork that reads hidden states; not needed for one
            that reads embeddings, whose table is in the bundle.

    Raises:
        ConfigError: there is no bundle, it has an unknown format version, or it needs the student's featurizer.
        CorruptRecord: a file is missing, or differs from the one that was written.
    """
    manifest = read_manifest(folder)
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
    statistics = None
    if STATISTICS_FILE in contents:
        statistics = PromptStatistics.decode(contents[STATISTICS_FILE], width=manifest.hypernetwork.width)
    return Bundle(folder, manifest, hypernetwork, featurizer, statistics)


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


def _fingerprint(manifest: BundleManifest) -> str:
    """Return the digest of a manifest without the prompt statistics, which describe prompts and change no adapter."""
    files = {name: digest for name, digest in manifest.files.items() if name != STATISTICS_FILE}
    content = manifest.model_copy(update={"files": files}).model_dump(mode="json")
    return blake3(canonical_json(content)).hexdigest()


@contextmanager
def _outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of a module while a network that contains it runs."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _checked(path: Path, digest: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorruptRecord(f"the bundle lacks {path}: {error.strerror}; copy or export it again") from error
    if blake3(content).hexdigest() != digest:
        raise CorruptRecord(f"{path} is not the file that the bundle was made with; copy or export it again")
    return content
