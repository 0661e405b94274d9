"""The teacher's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, Json, field_validator, model_validator

from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.config import StrictModel
from hyperagent.topk import DEFAULT_TEMPERATURES


class TeacherSettings(StrictModel):
    """What `hyperagent serve teacher` is told."""

    backend: Literal["transformers", "vllm"] = "transformers"
    """What runs the model: Transformers in this process, or vLLM."""
    model: Path
    """Folder of the model: config.json and safetensors weights."""
    tokenizer: Path | None = None
    """Folder of the tokenizer and its chat template; by default the model's."""
    cache: Path = Path("cache")
    """Folder of the cache that PopulateCache fills."""
    data_dir: Path | None = None
    """The only folder that tokens files are read from; without it none are."""
    host: str = "127.0.0.1"
    port: int = Field(8701, ge=0, le=65_535)
    """0 takes a free one, which the log names."""
    top_k: int = Field(128, ge=1)
    """Ids kept per row in the cache, and the most a request may ask for."""
    temperatures: tuple[float, ...] | None = None
    """Those besides 1 at which rows can be trained on without error, rising; by default 2, or none with capture flat."""
    max_tokens: int = Field(131_072, ge=2, le=1 << 20)
    """Longest sequence accepted; the model's own limit holds where it is lower."""
    max_pending_requests: int = Field(8, ge=1)
    """Most requests scored or waiting at once; each may hold one sequence's hidden states in memory."""
    chunk_kib: int = Field(512, ge=64, le=2048)
    """Rows in one message of an answer, in KiB."""
    row_memory_mib: int = Field(256, ge=1)
    """Most memory for rows of requests in progress; more requests wait, a larger one is refused."""
    codec: Literal["exact", "compact", "archive"] | None = None
    """How a new cache stores rows, "compact" by default; one that is there keeps its own way."""
    kept_mass: float | None = Field(None, gt=0, le=1)
    """Of a row, a new cache keeps only the most likely ids that reach this probability together; 1 by default."""
    min_k: int | None = Field(None, ge=1)
    """The fewest ids that a row keeps all the same; 8 by default."""
    redis_url: str | None = None
    """The cache's hot tier, such as redis://127.0.0.1:6379/0; the cache works without."""
    redis_ttl_s: int = Field(86_400, ge=1)
    """Seconds a record stays in the hot tier."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The weights' own dtype for "auto"."""
    head_dtype: Literal["auto", "float32"] = "auto"
    """Of the head's product: the model's own for "auto"; float32 has hardly any ties, at the price of a larger head."""
    device: str = "auto"
    """Transformers: one of "auto", "cpu", "cuda" and "cuda:N"; "auto" is a GPU if there is one."""
    capture: Literal["tensors", "flat"] = "tensors"
    """vLLM: how rows leave it, by the tap or by its public interface."""
    engine_args: Json[dict[str, Any]] | dict[str, Any] = Field(default_factory=dict)
    """vLLM: further arguments of its engine, such as {"tensor_parallel_size": 8}."""
    engine_timeout_s: float = Field(10.0, gt=0, le=3600)
    """How long an engine with work may get nothing done before the teacher stops serving."""
    engine_restart_s: float = Field(60.0, ge=0)
    """How long it may hang before it is started afresh."""
    tls_certificate: Path | None = None
    """PEM file with the server's certificate chain; traffic is encrypted then."""
    tls_key: Path | None = None
    """PEM file with the certificate's private key."""
    allow_remote: bool = False
    """Listen on an address that other machines can reach although traffic is not encrypted."""
    reflection: bool = False
    """Let clients such as grpcurl ask for the service's description."""
    stop_grace_s: float = Field(30.0, ge=0, le=3600)
    """Seconds that requests in progress have to end before they are cancelled."""

    @property
    def cache_settings(self) -> CacheSettings:
        """What is said here of how rows are stored."""
        said = {"codec": self.codec, "kept_mass": self.kept_mass, "min_k": self.min_k}
        return CacheSettings(**{name: value for name, value in said.items() if value is not None})

    @property
    def row_temperatures(self) -> tuple[float, ...]:
        """The temperatures that are said, or else the default."""
        if self.temperatures is None:
            return () if self.backend == "vllm" and self.capture == "flat" else DEFAULT_TEMPERATURES
        return self.temperatures

    @field_validator("temperatures", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        # On the command line and in the environment they come as one text, which may be empty.
        return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("temperatures")
    @classmethod
    def _are_temperatures(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is None or (all(0.1 <= t <= 100 and t != 1 for t in value) and list(value) == sorted(set(value))):
            return value
        raise ValueError("give different temperatures from 0.1 to 100 in rising order, without 1, such as 2,4")

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both --tls-certificate and --tls-key")
        return self
