"""What the adapter service reads and answers; the service and its client share these models."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from hyperagent.config import StrictModel


class StoredAdapter(StrictModel):
    """What `adapter.json` holds."""

    id: str
    created_at: datetime
    prompt_tokens: int
    """Length of the prompt it was made for; the prompt itself is not kept."""
    rank: int
    bytes: int
    """Size of `adapter_model.safetensors`."""
    sha256: dict[str, str]
    """Digest (hex) of each of the two files, by name."""
    base_model: str
    """The student it belongs to."""
    bundle: str
    """Fingerprint of the bundle that made it."""
    data: str
    """Fingerprint of the data that the bundle was trained on."""


class PromptBody(StrictModel):
    """What to make an adapter for."""

    prompt: str = Field(description="The task's text.")
    system: str | None = Field(None, description="The system prompt; only if the hypernetwork reads it.")
    tools: list[dict[str, Any]] | None = Field(None, description="Tools, as in a chat completion; likewise.")
    extra: str | None = Field(None, description="Further text, such as a repository map; likewise.")

    def parts(self) -> dict[str, Any]:
        """What was sent, null or not, by the condition's names."""
        return {"task" if name == "prompt" else name: getattr(self, name) for name in self.model_fields_set}


class AdapterBody(StoredAdapter):
    """An adapter, and where its files are."""

    links: dict[str, str]
    """Addresses of the adapter and of its two files."""


class AdaptersBody(BaseModel):
    adapters: list[AdapterBody]
    next: str | None = Field(description="Address of the next page; null on the last one.")


class BundleBody(BaseModel):
    """What makes the adapters."""

    fingerprint: str
    base_model: str
    student_weights: str
    teacher: str
    data: str = Field(description="Fingerprint of the data it was trained on.")
    condition: tuple[str, ...] = Field(description="What a request must hold; the task is its prompt.")
    rank: int
    alpha: float
    num_layers: int = Field(description="Linear layers that an adapter changes.")
    max_prompt_tokens: int
    step: int = Field(description="Optimizer steps the hypernetwork was trained for.")
