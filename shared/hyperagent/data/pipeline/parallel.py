"""Map a function over many rows in worker processes, in order and with bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from hyperagent.errors import ServiceError

Item = TypeVar("Item")
Result = TypeVar("Result")

# A process takes seconds to start, which does not pay off for fewer rows.
_ROWS_WORTH_A_POOL = 200
_ROWS_PER_TASK = 4
_TASKS_PER_WORKER = 4

_function: Callable[[Any], Any]


def available_cores() -> int:
    """Return the number of cores this process may use, or the machine's if the system cannot report it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_rows(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    num_items: int,
    num_workers: int | None = None,
) -> Iterator[Result]:
    """Yield the function's result for every item, in the items' order.

    Args:
        function: pickled once per process. Items and results are pickled as well. The processes are our own children,
            so nothing from outside is unpickled.
        num_items: number of items; it decides whether starting processes pays off.
        num_workers: number of processes; 1 runs in this process, None starts one per core if that pays off.

    Raises:
        ServiceError: a process was killed.
    """
    if num_workers is None:
        num_workers = available_cores() if num_items >= _ROWS_WORTH_A_POOL else 1
    if num_workers == 1:
        yield from map(function, items)
        return
    # A fork would copy other threads' locks in their current state; a fresh interpreter has none.
    context = multiprocessing.get_context("spawn")
    pending: deque[Future[list[Result]]] = deque()
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start, initargs=(function,)) as pool:
        try:
            for task in _batches(items):
                pending.append(pool.submit(_run, task))
                if len(pending) == num_workers * _TASKS_PER_WORKER:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except BrokenProcessPool as error:
            raise ServiceError(
                "a worker process was killed, most likely because memory ran out; use fewer processes with --workers"
            ) from error
        finally:
            for future in pending:
                future.cancel()


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == _ROWS_PER_TASK:
            yield batch
            batch = []
    if batch:
        yield batch


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    # Ctrl-C reaches every process of the terminal; the parent process ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes already use all cores; the tokenizers' own threads would only compete for them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _function = function


def _run(items: list[Any]) -> list[Any]:
    return [_function(item) for item in items]
