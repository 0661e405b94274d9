"""Request and response models of the adapter service, shared by the service and its client."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from hyperagent.config import StrictModel


class Novelty(StrictModel):
    """How unlike the training prompts of the hypernetwork a prompt is."""

    distance: float
    """Distance from the training prompts, about 1 for a prompt like them."""
    threshold: float
    """Distance up to which a prompt is usual: 99% of the held-out prompts are not farther away."""
    is_unusual: bool
    """Whether the distance is above the threshold; the adapter may then be worse than none."""


class StoredAdapter(StrictModel):
    """Contents of `adapter.json`."""

    id: str
    created_at: datetime
    prompt_tokens: int
    """Length in tokens of the prompt that the adapter was generated for; the prompt itself is not stored."""
    rank: int
    bytes: int
    """Size of `adapter_model.safetensors` in bytes."""
    sha256: dict[str, str]
    """SHA-256 digests (hex) of the two files by name."""
    base_model: str
    """Student model that the adapter applies to."""
    bundle: str
    """Fingerprint of the bundle that generated the adapter."""
    data: str
    """Fingerprint of the data that the bundle was trained on."""
    novelty: Novelty | None = None
    """How unlike the training prompts the prompt is; null if the bundle had no statistics of them."""


class LeaseRequest(StrictModel):
    """Request to keep an adapter from being evicted or deleted."""

    ttl_s: float = Field(60.0, gt=0, le=86_400)
    """Seconds until the lease ends unless it is renewed."""


class Lease(StrictModel):
    """A lease on an adapter."""

    holder: str
    expires_at: datetime


class PromptBody(StrictModel):
    """Prompt to generate an adapter for."""

    prompt: str = Field(description="Text of the task.")
    system: str | None = Field(None, description="System prompt; only if the hypernetwork reads it.")
    tools: list[dict[str, Any]] | None = Field(
        None, description="Tools, as in a chat completion; only if the hypernetwork reads them."
    )
    extra: str | None = Field(
        None, description="Further text, such as a repository map; only if the hypernetwork reads it."
    )

    def parts(self) -> dict[str, Any]:
        """Return the parts that were sent, null ones included, by their names in the condition."""
        return {"task" if name == "prompt" else name: getattr(self, name) for name in self.model_fields_set}


class AdapterBody(StoredAdapter):
    """An adapter and links to its files."""

    links: dict[str, str]
    """Links to the adapter and its two files."""


class AdaptersBody(BaseModel):
    adapters: list[AdapterBody]
    next: str | None = Field(description="Link to the next page; null on the last page.")


class BundleBody(BaseModel):
    """Description of the bundle that generates the adapters."""

    fingerprint: str
    base_model: str
    student_weights: str
    teacher: str
    data: str = Field(description="Fingerprint of the data that the hypernetwork was trained on.")
    condition: tuple[str, ...] = Field(description="Parts that a request must contain; the task is sent as `prompt`.")
    rank: int
    alpha: float
    num_layers: int = Field(description="Linear layers that an adapter modifies.")
    max_prompt_tokens: int
    step: int = Field(description="Optimizer steps the hypernetwork was trained for.")
