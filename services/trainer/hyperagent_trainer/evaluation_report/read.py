"""Read the JSON file of an evaluation."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from hyperagent.config import describe
from hyperagent.errors import DataError
from hyperagent_trainer.evaluation_report.schema import EvaluationReport


def read_evaluation(path: Path) -> EvaluationReport:
    """Read and check `evaluation.json`.

    Raises:
        DataError: the file is missing or unreadable, is not JSON, is of another version, or has unknown, missing or invalid
            fields, NaN and infinity included; the message names every one of them.
    """
    try:
        return EvaluationReport.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"there is no file {path}; `hyperagent evaluate` writes one") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give the JSON file of an evaluation") from error
    except ValidationError as error:
        raise DataError(
            f"{path} is no evaluation of version 1: {describe(error)}; write it again with `hyperagent evaluate`"
        ) from error
