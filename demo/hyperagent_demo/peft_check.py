"""Load an adapter with PEFT, as any user would, and compare its logits with those of the training process.

`python -m hyperagent_demo.peft_check JOB.json` prints one JSON line with `max_abs_diff`. It imports nothing of the
trainer or the adapter service: only Transformers and PEFT stand between the downloaded files and the numbers.
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
    """What the process is told."""

    student: Path
    adapter: Path
    """Folder with the two downloaded files."""
    probe: Path
    """What the training process wrote: token ids, and its logits for them."""


@torch.inference_mode()
def max_abs_diff(job: PeftCheckJob) -> dict[str, float]:
    """Largest absolute difference of two float32 logits, and how far the adapter moves the student at all."""
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
