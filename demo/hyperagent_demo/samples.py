"""Names of the generated samples; imports nothing, because the command line needs them at its start."""

from __future__ import annotations

from typing import Literal

SampleName = Literal["rules", "tasks"]
"""House rules that only the system prompt states, or tasks in invented repositories."""
