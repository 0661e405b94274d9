"""Load an adapter with PEFT, as a user would, and compare its logits with those of the training process.

`python -m hyperagent_demo.peft_check JOB.json` prints one JSON line with `max_abs_diff`. It imports nothing from the
trainer or the adapter service: only Transformers and PEFT process the downloaded files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from hyperagent.config import StrictModel


class PeftCheckJob(StrictModel):
    """Contents of JOB.json."""

    student: Path
    adapter: Path
    """Folder with the two downloaded files."""
    probe: Path
    """File written by the training process: token ids, and its logits for them."""


@torch.inference_mode()
def max_abs_diff(job: PeftCheckJob) -> dict[str, float]:
    """Return the largest absolute difference of the float32 logits, and the adapter's effect on them."""
    probe = load(job.probe.read_bytes())
    student = AutoModelForCausalLM.from_pretrained(job.student, local_files_only=True, dtype=torch.float32).eval()
    token_ids = probe["token_ids"][None]
    bare = student(input_ids=token_ids).logits[0]
    adapted = PeftModel.from_pretrained(student, job.adapter).eval()(input_ids=token_ids).logits[0]
    return {
        "max_abs_diff": float((adapted - probe["logits"]).abs().max()),
        "adapter_effect": float((adapted - bare).abs().max()),
    }


if __name__ == "__main__":
    result = max_abs_diff(PeftCheckJob.model_validate_json(Path(sys.argv[1]).read_bytes()))
    sys.stdout.write(json.dumps(result) + "\n")
