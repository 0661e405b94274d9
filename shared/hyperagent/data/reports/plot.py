"""Plot a histogram of the lengths of a file's trajectories, as PNG."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from hyperagent.data.reports.inspect import FileReport
from hyperagent.errors import DataError
from hyperagent.storage.files import write_atomically

_BINS = 40


def write_histogram(path: Path, report: FileReport, *, max_tokens: int) -> None:
    """Plot tokens and supervised tokens per trajectory on a logarithmic axis, with the limit of tokens marked.

    Raises:
        DataError: no row was rendered.
        StorageError: a file system operation failed.
    """
    # Use Figure directly: pyplot has global state and may need a display.
    from matplotlib.figure import Figure

    if not report.rendered:
        raise DataError("no row was rendered, so there is nothing to plot; see the refusals")
    tokens = np.array([row.tokens for row in report.rendered])
    supervised = np.array([row.supervised_tokens for row in report.rendered])
    edges = np.geomspace(max(1, supervised.min()), max(tokens.max(), max_tokens) * 1.1, _BINS + 1)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(tokens, bins=edges.tolist(), alpha=0.7, label=f"tokens, {tokens.sum():,} in all")
    axes.hist(supervised, bins=edges.tolist(), alpha=0.7, label=f"supervised tokens, {supervised.sum():,} in all")
    axes.axvline(max_tokens, color="black", linestyle="--", linewidth=1, label=f"{max_tokens:,} tokens")
    axes.set(xscale="log", xlabel="tokens per trajectory", ylabel="trajectories")
    axes.set_title(f"{len(report.rendered):,} trajectories, {len(report.refused):,} refused")
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_atomically(path, content.getvalue())
