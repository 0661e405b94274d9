"""`hyperagent serve teacher`: the teacher, from the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[
        Path,
        typer.Option(
            help="Folder of the model: config.json and safetensors weights.", envvar="HYPERAGENT_TEACHER_MODEL"
        ),
    ],
    backend: Annotated[
        str,
        typer.Option(help="What runs the model: transformers or vllm.", envvar="HYPERAGENT_TEACHER_BACKEND"),
    ] = "transformers",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the tokenizer and chat template; by default the model's.",
            envvar="HYPERAGENT_TEACHER_TOKENIZER",
        ),
    ] = None,
    cache: Annotated[Path, typer.Option(help="Folder of the cache to fill.", envvar="HYPERAGENT_TEACHER_CACHE")] = Path(
        "cache"
    ),
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="The only folder that tokens files are read from; without it none are.",
            envvar="HYPERAGENT_TEACHER_DATA_DIR",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.", envvar="HYPERAGENT_TEACHER_HOST")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", envvar="HYPERAGENT_TEACHER_PORT")
    ] = 8701,
    top_k: Annotated[
        int,
        typer.Option(
            help="Ids kept per row in the cache, and the most a request may ask for.", envvar="HYPERAGENT_TEACHER_TOP_K"
        ),
    ] = 128,
    temperatures: Annotated[
        str | None,
        typer.Option(
            help="Those besides 1 at which rows can be trained on, such as 2,4, or '' for none; by default 2.",
            envvar="HYPERAGENT_TEACHER_TEMPERATURES",
        ),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            help="Longest sequence accepted, in tokens; the model's own limit holds where it is lower.",
            envvar="HYPERAGENT_TEACHER_MAX_TOKENS",
        ),
    ] = 131_072,
    max_pending_requests: Annotated[
        int,
        typer.Option(
            help="Most requests scored or waiting at once; more are refused.",
            envvar="HYPERAGENT_TEACHER_MAX_PENDING_REQUESTS",
        ),
    ] = 8,
    chunk_kib: Annotated[
        int,
        typer.Option(help="Rows in one message of an answer, in KiB.", envvar="HYPERAGENT_TEACHER_CHUNK_KIB"),
    ] = 512,
    row_memory_mib: Annotated[
        int,
        typer.Option(
            help="Most memory for rows of requests in progress, in MiB; more requests wait.",
            envvar="HYPERAGENT_TEACHER_ROW_MEMORY_MIB",
        ),
    ] = 256,
    codec: Annotated[
        str | None,
        typer.Option(
            help="How a new cache stores rows: exact, compact (the default) or archive.",
            envvar="HYPERAGENT_TEACHER_CODEC",
        ),
    ] = None,
    kept_mass: Annotated[
        float | None,
        typer.Option(
            help="A new cache keeps of a row only the likeliest ids that reach this probability, such as 0.999.",
            envvar="HYPERAGENT_TEACHER_KEPT_MASS",
        ),
    ] = None,
    min_k: Annotated[
        int | None,
        typer.Option(
            help="The fewest ids that a row keeps all the same; 8 by default.", envvar="HYPERAGENT_TEACHER_MIN_K"
        ),
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(help="The cache's hot tier, such as redis://127.0.0.1:6379/0.", envvar="HYPERAGENT_REDIS_URL"),
    ] = None,
    redis_ttl_s: Annotated[
        int,
        typer.Option(help="Seconds a record stays in the hot tier.", envvar="HYPERAGENT_REDIS_TTL_S"),
    ] = 86_400,
    dtype: Annotated[
        str,
        typer.Option(help="auto (the weights' own), float32, bfloat16 or float16.", envvar="HYPERAGENT_TEACHER_DTYPE"),
    ] = "auto",
    head_dtype: Annotated[
        str,
        typer.Option(
            help="Of the head's product: auto (the model's), or float32, which has hardly any ties.",
            envvar="HYPERAGENT_TEACHER_HEAD_DTYPE",
        ),
    ] = "auto",
    device: Annotated[
        str,
        typer.Option(
            help="Transformers: auto (a GPU if there is one), cpu, cuda or cuda:N.", envvar="HYPERAGENT_TEACHER_DEVICE"
        ),
    ] = "auto",
    capture: Annotated[
        str,
        typer.Option(
            help="vLLM: tensors (exact, fast, known releases only) or flat (vLLM's public interface).",
            envvar="HYPERAGENT_TEACHER_CAPTURE",
        ),
    ] = "tensors",
    engine_args: Annotated[
        str,
        typer.Option(
            help='vLLM: JSON of further engine arguments, such as {"tensor_parallel_size": 8}.',
            envvar="HYPERAGENT_TEACHER_ENGINE_ARGS",
        ),
    ] = "{}",
    engine_timeout_s: Annotated[
        float,
        typer.Option(
            help="Seconds an engine with work may get nothing done before the teacher stops serving.",
            envvar="HYPERAGENT_TEACHER_ENGINE_TIMEOUT_S",
        ),
    ] = 10.0,
    engine_restart_s: Annotated[
        float,
        typer.Option(
            help="Seconds it may hang before it is started afresh.", envvar="HYPERAGENT_TEACHER_ENGINE_RESTART_S"
        ),
    ] = 60.0,
    tls_certificate: Annotated[
        Path | None,
        typer.Option(
            help="PEM file with the certificate chain to serve TLS.", envvar="HYPERAGENT_TEACHER_TLS_CERTIFICATE"
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(help="PEM file with its private key.", envvar="HYPERAGENT_TEACHER_TLS_KEY"),
    ] = None,
    allow_remote: Annotated[
        bool,
        typer.Option(
            "--allow-remote",
            help="Permit an address that other machines can reach although traffic is not encrypted.",
            envvar="HYPERAGENT_TEACHER_ALLOW_REMOTE",
        ),
    ] = False,
    reflection: Annotated[
        bool,
        typer.Option(
            "--reflection",
            help="Let clients such as grpcurl ask for the service's description.",
            envvar="HYPERAGENT_TEACHER_REFLECTION",
        ),
    ] = False,
    stop_grace_s: Annotated[
        float,
        typer.Option(
            help="Seconds that requests in progress have to end before they are cancelled.",
            envvar="HYPERAGENT_TEACHER_STOP_GRACE_S",
        ),
    ] = 30.0,
) -> None:
    """Serve a teacher over gRPC: score token sequences, fill the cache with its top-k rows."""
    given = dict(locals())  # every option is a setting of the same name
    from hyperagent.auth import ensure_token
    from hyperagent.config import parse
    from hyperagent.logs import configure_logging
    from hyperagent_teacher.config import TeacherSettings

    configure_logging(service="teacher")
    settings = parse(given, TeacherSettings, source="hyperagent serve teacher")
    # gRPC's core logs to standard error on its own; what a person can mend reaches them as an error already.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a bar would stand between the log's JSON lines
    from hyperagent_teacher.service.server import serve as serve_teacher

    serve_teacher(settings, token=ensure_token())
