"""The teacher's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from hyperagent.config import StrictModel


class TeacherSettings(StrictModel):
    """What `hyperagent serve teacher` is told."""

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
    max_tokens: int = Field(131_072, ge=2, le=1 << 20)
    """Longest sequence accepted; the model's own limit holds where it is lower."""
    max_pending_requests: int = Field(8, ge=1)
    """Most requests scored or waiting at once; each may hold one sequence's hidden states in memory."""
    redis_url: str | None = None
    """The cache's hot tier, such as redis://127.0.0.1:6379/0; the cache works without."""
    redis_ttl_s: int = Field(86_400, ge=1)
    """Seconds a record stays in the hot tier."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The weights' own dtype for "auto"."""
    device: str = "auto"
    """One of "auto", "cpu", "cuda" and "cuda:N"; "auto" is a GPU if there is one."""
    allow_remote: bool = False
    """Listen on an address that other machines can reach; traffic is not encrypted."""
    reflection: bool = False
    """Let clients such as grpcurl ask for the service's description."""
    stop_grace_s: float = Field(30.0, ge=0, le=3600)
    """Seconds that requests in progress have to end before they are cancelled."""
