"""From a prompt's text to the two files of its adapter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hyperagent.data.tokenizer import ChatTokenizer
from hyperagent.errors import DataError, InvalidRequest
from hyperagent.identity import require_same
from hyperagent.model.bundle import Bundle
from hyperagent.model.peft_io import AdapterFiles, encode_adapter


class AdapterGenerator:
    """A bundle with its tokenizer; for one thread at a time."""

    def __init__(self, bundle: Bundle) -> None:
        """Load the bundle's tokenizer.

        Raises:
            ConfigError: the tokenizer cannot be loaded.
            IdentityMismatch: it is not the one the hypernetwork was trained with.
        """
        self.bundle = bundle
        self._tokenizer = ChatTokenizer(bundle.tokenizer_folder)
        require_same(
            f"the tokenizer in {bundle.tokenizer_folder}",
            expected=bundle.manifest.tokenizer,
            found=self._tokenizer.identity,
            remedy="export the bundle again with the student's own tokenizer",
        )

    def encode(self, prompt: str) -> NDArray[np.uint32]:
        """[P]: the ids the hypernetwork reads, which are all that an adapter depends on besides the bundle.

        Raises:
            InvalidRequest: the prompt is empty, or holds what is no text.
        """
        if not prompt.strip():
            raise InvalidRequest("the prompt is empty; send the task's text")
        try:
            # JSON can spell half a surrogate pair, which is no character and which the tokenizer cannot take.
            prompt.encode("utf-8")
            return self._tokenizer.prompt_ids(prompt)
        except (UnicodeEncodeError, DataError) as error:
            raise InvalidRequest(f"the prompt cannot be read: {error}") from error

    def generate(self, prompt_ids: NDArray[np.uint32]) -> AdapterFiles:
        """The adapter for [P] prompt ids.

        Raises:
            InvalidRequest: an id is outside the student's embedding table.
            LimitExceeded: the prompt is longer than the hypernetwork reads.
        """
        manifest = self.bundle.manifest
        weights = self.bundle.generate(prompt_ids)
        return encode_adapter(weights, base_model=manifest.base_model, alpha=manifest.alpha)
