"""Generation of the two files of an adapter from a prompt's text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.pipeline.views import Condition, condition_ids
from hyperagent.errors import DataError, InvalidRequest
from hyperagent.http.adapter_models import Novelty
from hyperagent.identity import require_same
from hyperagent.model.bundle import Bundle
from hyperagent.model.peft_io import AdapterFiles, encode_adapter


class AdapterGenerator:
    """Generate adapters with a bundle and its tokenizer; not thread-safe."""

    def __init__(self, bundle: Bundle, *, dtype: torch.dtype = torch.bfloat16) -> None:
        """Load the bundle's tokenizer.

        Args:
            dtype: of the adapters' factors. vLLM loads bfloat16 sixty times as fast as float32, because it need not convert it.

        Raises:
            ConfigError: the tokenizer cannot be loaded.
            IdentityMismatch: it is not the tokenizer that the hypernetwork was trained with.
        """
        self.bundle = bundle
        self._dtype = dtype
        self._tokenizer = ChatTokenizer(bundle.tokenizer_folder)
        require_same(
            f"the tokenizer in {bundle.tokenizer_folder}",
            expected=bundle.manifest.data.tokenizer,
            found=self._tokenizer.identity,
            remedy="export the bundle again with the student's own tokenizer",
        )

    def encode(self, parts: Mapping[str, Any]) -> NDArray[np.uint32]:
        """Return the ids [P] that the hypernetwork reads; an adapter depends only on these and the bundle.

        Args:
            parts: the condition's parts (see `hyperagent.data.pipeline.views.Condition`), exactly those that the hypernetwork
                was trained to read; None for parts that this conversation does not have.

        Raises:
            InvalidRequest: a part is missing or surplus, the task is empty, or a text cannot be read.
        """
        condition = self.bundle.manifest.condition
        if missing := [part for part in condition if part not in parts]:
            raise InvalidRequest(
                f"this hypernetwork also reads {' and '.join(missing)}; send the conversation's value, or null"
            )
        if surplus := [part for part in parts if part not in condition]:
            raise InvalidRequest(
                f"this hypernetwork does not read {' and '.join(surplus)}, only {', '.join(condition)}; omit the others"
            )
        if not parts["task"].strip():
            raise InvalidRequest("the prompt is empty; send the text of the task")
        given = {part: value for part, value in parts.items() if value is not None}
        given["task"] = _without_wrapping(given["task"])
        try:
            return condition_ids(self._tokenizer, Condition(**given), parts=condition)
        except DataError as error:
            raise InvalidRequest(f"the prompt cannot be read: {error}") from error

    def id_of(self, prompt_ids: NDArray[np.uint32]) -> str:
        """Return the id of the adapter for prompt ids [P], a digest of what it is made of."""
        kind = b"" if self._dtype == torch.float32 else str(self._dtype).encode()
        content = bytes.fromhex(self.bundle.fingerprint) + kind + prompt_ids.astype("<u4").tobytes()
        return blake3(content).hexdigest()

    def generate(self, prompt_ids: NDArray[np.uint32]) -> tuple[AdapterFiles, Novelty | None]:
        """Generate the adapter for prompt ids [P], and say how unlike the training prompts they are.

        Raises:
            InvalidRequest: an id is outside the student's embedding table.
            LimitExceeded: the prompt is longer than the hypernetwork reads.
        """
        manifest = self.bundle.manifest
        weights, found = self.bundle.generate_with_novelty(prompt_ids)
        origin = {"hyperagent_bundle": self.bundle.fingerprint, "hyperagent_data": manifest.data.fingerprint}
        files = encode_adapter(
            weights, base_model=manifest.base_model, alpha=manifest.alpha, origin=origin, dtype=self._dtype
        )
        if found is None:
            return files, None
        return files, Novelty(distance=found.distance, threshold=found.threshold, is_unusual=found.is_unusual)


def _without_wrapping(text: str) -> str:
    """Return a prompt without what editors add to a file: a byte order mark at its start, a line end at its end."""
    text = text.removeprefix("\ufeff")
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
