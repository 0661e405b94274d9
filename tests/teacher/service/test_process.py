"""Test `hyperagent serve teacher` as a process."""

from __future__ import annotations

import multiprocessing
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_identity import data_identity
from pydantic import ValidationError
from teacher_process import START_TIMEOUT_S, TOKEN, free_port, teacher

from hyperagent.cache.local import LocalCache
from hyperagent.cache.maintenance.verify import verify
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.errors import ServiceError
from hyperagent.wire.client import TeacherClient
from hyperagent.wire.outcome import Outcome
from hyperagent_teacher.config import TeacherSettings


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_a_port_in_use_is_one_line_and_exit_code_1(
    taken_port: int, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    with teacher(model_folders["qwen3_moe"], tmp_path / "cache", taken_port) as process:
        output, errors = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 1
    assert output == ""
    assert errors.splitlines() == [
        f"error: cannot listen on 127.0.0.1:{taken_port}: the port is taken or the address is not this machine's; "
        "stop the other process, or give another --port"
    ]


@pytest.mark.parametrize(
    ("given", "expected"), [(None, (2.0,)), ("", ()), ("2,4", (2.0, 4.0)), (" 0.5 , 2", (0.5, 2.0))]
)
def test_temperatures_are_given_as_one_text(given: str | None, expected: tuple[float, ...]) -> None:
    settings = TeacherSettings(model=Path("m"), temperatures=given)  # type: ignore[arg-type]
    assert settings.row_temperatures == expected


@pytest.mark.parametrize("bad", ["1", "2,2", "4,2", "0", "-2", "nan", "1e9", "warm"])
def test_what_are_no_temperatures_is_refused(bad: str) -> None:
    with pytest.raises(ValidationError, match="temperatures"):
        TeacherSettings(model=Path("m"), temperatures=bad)  # type: ignore[arg-type]


def test_the_public_interface_has_no_rows_at_temperatures() -> None:
    assert TeacherSettings(model=Path("m"), backend="vllm", capture="flat").row_temperatures == ()


def _serve_a_model_that_hangs(model: str, cache: str) -> None:
    from hyperagent_teacher.engines.transformers import TransformersEngine
    from hyperagent_teacher.service.server import serve

    real = TransformersEngine._check_stop

    def hang(engine: TransformersEngine, stop: threading.Event) -> None:
        # The first canary passes: two layers, one step of the head and one part count as progress. All later work hangs.
        if engine.progress >= 4:
            time.sleep(3600)
        real(engine, stop)

    TransformersEngine._check_stop = hang  # type: ignore[method-assign]
    settings = TeacherSettings(
        model=Path(model), cache=Path(cache), port=0, top_k=8, engine_timeout_s=2.0, engine_restart_s=0.5
    )
    serve(settings, token=TOKEN)


def test_a_model_that_hangs_ends_the_process(model_folders: dict[str, Path], tmp_path: Path) -> None:
    arguments = (str(model_folders["qwen3"]), str(tmp_path / "cache"))
    process = multiprocessing.get_context("spawn").Process(target=_serve_a_model_that_hangs, args=arguments)
    process.start()
    process.join(START_TIMEOUT_S)
    assert process.exitcode == 1


async def test_sigterm_ends_a_population_between_trajectories_with_exit_code_0(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = model_folders["qwen3_next"]
    port = free_port()
    tokenizer = ChatTokenizer(folder).identity
    token_ids = np.arange(200, dtype=np.uint32)
    trajectories = ((f"t{last}", token_ids, np.arange(1, last, dtype=np.uint32)) for last in range(2, 200))
    written = []
    with teacher(folder, tmp_path / "cache", port, HYPERAGENT_TEACHER_TOP_K="8") as process:
        async with TeacherClient(f"127.0.0.1:{port}", TOKEN) as client:
            await client.wait_until_serving(START_TIMEOUT_S)

            async def populate() -> None:
                async for outcome in client.populate(trajectories, data=data_identity(tokenizer)):
                    assert outcome.outcome is Outcome.WRITTEN
                    written.append(outcome.cache_key)
                    if len(written) == 3:
                        process.send_signal(signal.SIGTERM)

            with pytest.raises(ServiceError, match=f"no teacher answers at 127.0.0.1:{port}|it is shutting down"):
                await populate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert 3 <= len(written) < 198
    cache = LocalCache.open(tmp_path / "cache")
    assert cache.identity.top_k == 8
    assert all(cache.is_intact(key) for key in written)
    assert verify(cache).damaged == ()
