"""The teacher's settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, Json, field_validator, model_validator

from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.services import Service
from hyperagent.settings import ServiceSettings, Setting
from hyperagent.topk import DEFAULT_TEMPERATURES

_MODEL = Setting("Model")
_ROWS = Setting("Rows and cache")
_REQUESTS = Setting("Requests")
_NETWORK = Setting("Network")
_PROCESS = Setting("Process")


class TeacherSettings(ServiceSettings):
    """The settings of `hyperagent serve teacher`."""

    variable_prefix: ClassVar[str] = "HYPERAGENT_TEACHER_"

    model: Annotated[Path, _MODEL]
    """Folder of the model: config.json, safetensors weights and, by default, the tokenizer."""
    backend: Annotated[Literal["transformers", "vllm"], _MODEL] = "transformers"
    """What runs the model: Transformers in this process, or vLLM in an environment that has it."""
    tokenizer: Annotated[Path | None, _MODEL] = None
    """Folder of tokenizer.json and the chat template; by default the model's."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], _MODEL] = "auto"
    """Dtype of the model; "auto" is that of the weights."""
    head_dtype: Annotated[Literal["auto", "float32"], _MODEL] = "auto"
    """Dtype of the head's product; "auto" is the model's. float32 has hardly any ties, and needs memory for a larger head."""
    device: Annotated[str, _MODEL] = "auto"
    """Transformers: auto (a GPU if there is one), cpu, cuda or cuda:N."""
    capture: Annotated[Literal["tensors", "flat"], _MODEL] = "tensors"
    """vLLM: take the rows as tensors (exact, fast, known releases only) or flat through vLLM's public interface."""
    engine_args: Annotated[Json[dict[str, Any]] | dict[str, Any], _MODEL] = Field(default_factory=dict)
    """vLLM: JSON of further engine arguments, such as {"tensor_parallel_size": 8}."""

    cache: Annotated[Path, _ROWS] = Path("cache")
    """Folder of the cache to fill; it belongs to one teacher and refuses any other."""
    data_dir: Annotated[Path | None, _ROWS] = None
    """The only folder that tokens files are read from; without it none are."""
    top_k: Annotated[int, _ROWS] = Field(128, ge=1)
    """Ids kept per row in the cache, and the most a request may ask for."""
    temperatures: Annotated[tuple[float, ...] | None, _ROWS] = None
    """Temperatures besides 1 at which rows can be trained on without error, rising, such as 2,4, or '' for none; by default
    2, or none with --capture flat."""
    codec: Annotated[Literal["exact", "compact", "archive"] | None, _ROWS] = None
    """How a new cache stores rows; by default compact. An existing cache keeps its own codec."""
    kept_mass: Annotated[float | None, _ROWS] = Field(None, gt=0, le=1)
    """A new cache keeps of a row only the most likely ids that reach this probability together, such as 0.999; by default 1."""
    min_k: Annotated[int | None, _ROWS] = Field(None, ge=1)
    """Fewest ids that a row keeps whatever their probability; by default 8."""
    redis_url: Annotated[str | None, replace(_ROWS, variable="HYPERAGENT_REDIS_URL")] = None
    """The cache's hot tier, such as redis://127.0.0.1:6379/0; the cache works without it."""
    redis_ttl_s: Annotated[int, replace(_ROWS, variable="HYPERAGENT_REDIS_TTL_S")] = Field(86_400, ge=1)
    """Seconds a record stays in the hot tier."""

    max_tokens: Annotated[int, _REQUESTS] = Field(131_072, ge=2, le=1 << 20)
    """Longest sequence accepted, in tokens; the model's own limit holds where it is lower."""
    max_pending_requests: Annotated[int, _REQUESTS] = Field(8, ge=1)
    """Most requests scored or waiting at once, each of which may hold one sequence's hidden states in memory; more are
    refused."""
    row_memory_mib: Annotated[int, _REQUESTS] = Field(256, ge=1)
    """Most memory for the rows of all requests in progress, in MiB; further requests wait, and one that is larger is
    refused."""
    chunk_kib: Annotated[int, _REQUESTS] = Field(512, ge=64, le=2048)
    """Rows in one message of an answer, in KiB."""

    host: Annotated[str, _NETWORK] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, _NETWORK] = Field(Service.TEACHER.default_port, ge=0, le=65_535)
    """Port to listen on; 0 takes a free one, which the log names."""
    tls_certificate: Annotated[Path | None, _NETWORK] = None
    """PEM file with the server's certificate chain; traffic is then encrypted, and any host may be listened on."""
    tls_key: Annotated[Path | None, _NETWORK] = None
    """PEM file with the certificate's private key."""
    allow_remote: Annotated[bool, _NETWORK] = False
    """Permit an address that other machines can reach although traffic is not encrypted."""
    reflection: Annotated[bool, _NETWORK] = False
    """Let clients such as grpcurl ask for the service's description."""

    engine_timeout_s: Annotated[float, _PROCESS] = Field(10.0, gt=0, le=3600)
    """Seconds an engine with work may make no progress before the teacher stops serving."""
    engine_restart_s: Annotated[float, _PROCESS] = Field(60.0, ge=0)
    """Seconds it may hang before it is started again."""
    stop_grace_s: Annotated[float, _PROCESS] = Field(30.0, ge=0, le=3600)
    """Seconds that requests in progress have to end before they are canceled."""

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
