"""One function over many rows, in worker processes, in order and within bounded memory."""

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

# A process takes seconds to start, which few rows do not repay.
_ROWS_WORTH_A_POOL = 200
_ROWS_PER_TASK = 4
_TASKS_PER_WORKER = 4

_function: Callable[[Any], Any]


def available_cores() -> int:
    """Cores that this process may use, where the system can say so, and otherwise those of the machine."""
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
        function: pickled to every process, once, as the items and results are; the processes are of our own making,
            and nothing is unpickled that came from elsewhere.
        num_items: how many there are; it decides whether processes are worth starting.
        num_workers: processes; 1 runs in this one, None takes one per core where that pays.

    Raises:
        ServiceError: a process was killed.
    """
    if num_workers is None:
        num_workers = available_cores() if num_items >= _ROWS_WORTH_A_POOL else 1
    if num_workers == 1:
        yield from map(function, items)
        return
    # Forking would copy threads' locks in whatever state they are; a fresh interpreter has none.
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
                "a worker process was killed, most likely for want of memory; use fewer with --workers"
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
    # Ctrl-C reaches every process of the terminal; the one that started these ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes are the parallelism; threads of the tokenizers in each would only fight over the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _function = function


def _run(items: list[Any]) -> list[Any]:
    return [_function(item) for item in items]
