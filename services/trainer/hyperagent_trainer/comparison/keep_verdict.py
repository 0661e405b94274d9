"""Keep an evaluation's verdict with the runs that it is about: in their folders and in their bundles' model cards.

The status page and `hyperagent export` read it there, so that they say what the report says.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hyperagent.http.run_models import RunVerdict
from hyperagent.model.bundle import read_manifest
from hyperagent.storage.files import write_atomically
from hyperagent_trainer.evaluation_report.schema import EvaluationReport
from hyperagent_trainer.export.model_card import with_verdict
from hyperagent_trainer.runs.folder import RunFolder


def keep_verdict(runs: Iterable[Path], report: EvaluationReport, out: Path) -> None:
    """Write the verdict to the folder of every evaluated run, and to the model card of its bundle.

    Args:
        runs: folders of the hypernetwork runs.
        out: folder of the report.

    Raises:
        CorruptRecord: a run's bundle is damaged.
        StorageError: the file system reported an error.
    """
    found = report.conditioning
    verdict = RunVerdict(
        verdict=found.verdict,
        reason=found.reason,
        margin=found.margin,
        step=report.run.step,
        split=report.split,
        num_repositories=report.num_repositories,
        num_seeds=report.num_seeds,
        report=str(out.resolve()),
    )
    for run in map(RunFolder, runs):
        run.write_verdict(verdict)
        card = run.bundle / "README.md"
        if card.is_file():
            changed = with_verdict(card.read_text(encoding="utf-8"), verdict, step=read_manifest(run.bundle).step)
            write_atomically(card, changed.encode())
