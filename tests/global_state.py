"""Process-wide state that a test must leave as it found it: otherwise the next tests depend on the order of all of them."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
# Set during a test by pytest, by pytest-timeout, and by the first import of torch's compiler.
IGNORED_VARIABLES = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
# pytest-timeout sets SIGALRM; torch's DataLoader sets SIGCHLD for good when it first has workers.
IGNORED_SIGNALS = (signal.SIGALRM, signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP)
LIMITS = ("RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_NOFILE")


def snapshot() -> dict[str, Any]:
    """Return the process-wide state by name; the state of a library is absent until the library is imported.

    Warning filters are absent: pytest restores them after each test.
    """
    state: dict[str, Any] = {
        f"environment variable {name}": value for name, value in os.environ.items() if name not in IGNORED_VARIABLES
    }
    state |= {
        f"handler of {number.name}": signal.getsignal(number)
        for number in signal.Signals
        if number not in IGNORED_SIGNALS
    }
    state |= {f"limit {name}": resource.getrlimit(getattr(resource, name)) for name in LIMITS}
    state |= {
        "working directory": Path.cwd(),
        "sys.path": tuple(sys.path),
        "sys.excepthook": sys.excepthook,
        "garbage collection": gc.isenabled(),
        "socket timeout": socket.getdefaulttimeout(),
        # Not set until it is first used; the first of all methods is the default.
        "start method of processes": multiprocessing.get_start_method(allow_none=True)
        or multiprocessing.get_all_start_methods()[0],
        "NumPy's handling of floating-point errors": tuple(np.geterr().items()),
    }
    return state | _logging_state() | _structlog_state() | _torch_state() | _matplotlib_state()


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return a line for each piece of state that changed between two snapshots.

    Environment variables that appeared or vanished count; state of a library that was imported in between does not.
    """
    names = [
        name for name in {**before, **after} if (name in before and name in after) or name.startswith("environment ")
    ]
    return [
        f"{name}: {before.get(name)!r} became {after.get(name)!r}"
        for name in names
        if before.get(name) != after.get(name)
    ]


@contextmanager
def seeded() -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch, and restore their states at the end."""
    states = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    torch_state = torch.get_rng_state() if torch else None
    random.seed(SEED)
    np.random.seed(SEED)
    if torch:
        torch.manual_seed(SEED)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    if torch:
        torch.set_rng_state(torch_state)


def _logging_state() -> dict[str, Any]:
    # pytest adds handlers of its own to the root logger and takes them away again.
    root = logging.getLogger()
    handlers = [handler for handler in root.handlers if not type(handler).__module__.startswith("_pytest")]
    levels = {
        name: logger.level
        for name, logger in logging.root.manager.loggerDict.items()
        if name.startswith("hyperagent") and isinstance(logger, logging.Logger) and logger.level != logging.NOTSET
    }
    return {
        "level of the root logger": root.level,
        "handlers of the root logger": handlers,
        "levels of loggers": levels,
        "logging.disable": logging.root.manager.disable,
    }


def _structlog_state() -> dict[str, Any]:
    structlog = sys.modules.get("structlog")
    return {"configuration of structlog": dict(structlog.get_config())} if structlog else {}


def _torch_state() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    return {
        "torch threads": torch.get_num_threads(),
        "torch default dtype": torch.get_default_dtype(),
        "torch default device": torch.get_default_device(),
        "torch deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch precision of float32 products": torch.get_float32_matmul_precision(),
        "torch gradients": torch.is_grad_enabled(),
        "torch autocast": torch.is_autocast_enabled("cpu"),
        "torch process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "torch oneDNN": torch.backends.mkldnn.enabled,
        "torch cuDNN flags": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
    }


def _matplotlib_state() -> dict[str, Any]:
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return {}
    import matplotlib as mpl

    return {"matplotlib backend": mpl.get_backend(), "open figures": tuple(pyplot.get_fignums())}
