"""Define the teacher's settings."""

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
    """Engine that runs the model: Transformers in this process, or vLLM where it is installed."""
    tokenizer: Annotated[Path | None, _MODEL] = None
    """Folder with tokenizer.json and the chat template; by default the model's folder."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], _MODEL] = "auto"
    """Dtype of the model; "auto" uses the dtype of the weights."""
    head_dtype: Annotated[Literal["auto", "float32"], _MODEL] = "auto"
    """Dtype of the head's product; "auto" uses the model's. float32 has hardly any ties but needs memory for a larger head."""
    device: Annotated[str, _MODEL] = "auto"
    """Transformers: auto (a GPU if there is one), cpu, cuda or cuda:N."""
    capture: Annotated[Literal["tensors", "flat"], _MODEL] = "tensors"
    """vLLM: read the rows as tensors (exact, fast, known releases only) or flat through vLLM's public interface."""
    engine_args: Annotated[Json[dict[str, Any]] | dict[str, Any], _MODEL] = Field(default_factory=dict)
    """vLLM: further engine arguments as JSON, such as {"tensor_parallel_size": 8}."""

    cache: Annotated[Path, _ROWS] = Path("cache")
    """Folder of the cache to fill; a cache belongs to one teacher and refuses any other."""
    data_dir: Annotated[Path | None, _ROWS] = None
    """The only folder that tokens files are read from; if not set, none are read."""
    top_k: Annotated[int, _ROWS] = Field(128, ge=1)
    """Ids kept per row in the cache, and the largest k that a request may ask for."""
    temperatures: Annotated[tuple[float, ...] | None, _ROWS] = None
    """Temperatures other than 1 at which the rows can be trained on exactly, in increasing order, such as 2,4, or '' for
    none; by default 2, or none with --capture flat."""
    codec: Annotated[Literal["exact", "compact", "archive"] | None, _ROWS] = None
    """Codec that a new cache stores rows with; by default compact. An existing cache keeps its codec."""
    kept_mass: Annotated[float | None, _ROWS] = Field(None, gt=0, le=1)
    """Total probability, such as 0.999, after which a new cache drops a row's remaining ids; by default 1."""
    min_k: Annotated[int | None, _ROWS] = Field(None, ge=1)
    """Minimum number of ids that a row keeps regardless of their probability; by default 8."""
    redis_url: Annotated[str | None, replace(_ROWS, variable="HYPERAGENT_REDIS_URL")] = None
    """URL of the cache's hot tier, such as redis://127.0.0.1:6379/0; the cache works without it."""
    redis_ttl_s: Annotated[int, replace(_ROWS, variable="HYPERAGENT_REDIS_TTL_S")] = Field(86_400, ge=1)
    """Seconds a record stays in the hot tier."""

    max_tokens: Annotated[int, _REQUESTS] = Field(131_072, ge=2, le=1 << 20)
    """Longest sequence accepted, in tokens; the model's own limit applies where it is lower."""
    max_pending_requests: Annotated[int, _REQUESTS] = Field(8, ge=1)
    """Maximum number of requests scored or waiting at once, each of which may hold one sequence's hidden states in memory;
    more are refused."""
    row_memory_mib: Annotated[int, _REQUESTS] = Field(256, ge=1)
    """Memory limit for the rows of all requests in progress, in MiB; further requests wait, and a single larger request
    is refused."""
    chunk_kib: Annotated[int, _REQUESTS] = Field(512, ge=64, le=2048)
    """Size of the rows in one response message, in KiB."""

    host: Annotated[str, _NETWORK] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, _NETWORK] = Field(Service.TEACHER.default_port, ge=0, le=65_535)
    """Port to listen on; 0 picks a free port, which is logged."""
    tls_certificate: Annotated[Path | None, _NETWORK] = None
    """PEM file with the server's certificate chain; with it traffic is encrypted and the service may listen on any host."""
    tls_key: Annotated[Path | None, _NETWORK] = None
    """PEM file with the certificate's private key."""
    allow_remote: Annotated[bool, _NETWORK] = False
    """Allow an address that other machines can reach although traffic is not encrypted."""
    reflection: Annotated[bool, _NETWORK] = False
    """Serve gRPC reflection, so that clients such as grpcurl can list the methods."""

    engine_timeout_s: Annotated[float, _PROCESS] = Field(10.0, gt=0, le=3600)
    """Seconds that an engine with work may make no progress before the teacher stops serving."""
    engine_restart_s: Annotated[float, _PROCESS] = Field(60.0, ge=0)
    """Further seconds that the engine may hang before it is restarted."""
    stop_grace_s: Annotated[float, _PROCESS] = Field(30.0, ge=0, le=3600)
    """Seconds that requests in progress have to finish at shutdown before they are canceled."""

    @property
    def cache_settings(self) -> CacheSettings:
        """The cache settings that are set here; the others keep their defaults."""
        given = {"codec": self.codec, "kept_mass": self.kept_mass, "min_k": self.min_k}
        return CacheSettings(**{name: value for name, value in given.items() if value is not None})

    @property
    def row_temperatures(self) -> tuple[float, ...]:
        """The temperatures given, or the default for the engine."""
        if self.temperatures is None:
            return () if self.backend == "vllm" and self.capture == "flat" else DEFAULT_TEMPERATURES
        return self.temperatures

    @field_validator("temperatures", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        # The command line and the environment give one string, which may be empty.
        return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("temperatures")
    @classmethod
    def _are_temperatures(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is None or (all(0.1 <= t <= 100 and t != 1 for t in value) and list(value) == sorted(set(value))):
            return value
        raise ValueError("give different temperatures from 0.1 to 100 in increasing order, without 1, such as 2,4")

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both --tls-certificate and --tls-key; give both or neither")
        return self
