"""What a test does where a program or a file that it needs is missing."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def skip_or_fail(reason: str) -> NoReturn:
    """Skip the test; in CI, which must not skip anything, fail it."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI must not skip this test")
    pytest.skip(reason)
