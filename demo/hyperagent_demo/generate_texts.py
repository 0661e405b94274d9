"""Let the student write its first turn for one held-out task: without an adapter, with its own, and with another's.

`python -m hyperagent_demo.generate_texts JOB.json` prints one JSON line with a text per arm. Like the PEFT check, it imports
nothing from the trainer or the adapter service: only Transformers and PEFT process the downloaded files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyperagent.config import StrictModel


class TextsJob(StrictModel):
    """Contents of JOB.json."""

    student: Path
    adapters: dict[str, Path]
    """Folders of the adapters, by arm."""
    token_ids: list[int]
    """The student's context: everything that it sees before its first turn."""
    end_id: int
    """Token that ends a turn."""
    max_new_tokens: int = 96


@torch.inference_mode()
def write_texts(job: TextsJob) -> dict[str, str]:
    """Return the most likely text of each arm, and of the arm `frozen` without an adapter."""
    student = AutoModelForCausalLM.from_pretrained(job.student, local_files_only=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(job.student, local_files_only=True)
    context = torch.tensor([job.token_ids])
    texts = {"frozen": _greedy(student, tokenizer, context, job)}
    names = list(job.adapters)
    adapted = PeftModel.from_pretrained(student, job.adapters[names[0]], adapter_name=names[0]).eval()
    for name in names[1:]:
        adapted.load_adapter(job.adapters[name], adapter_name=name)
    for name in names:
        adapted.set_adapter(name)
        texts[name] = _greedy(adapted, tokenizer, context, job)
    return texts


def _greedy(model: object, tokenizer: object, context: torch.Tensor, job: TextsJob) -> str:
    found = model.generate(  # type: ignore[attr-defined]
        input_ids=context,
        attention_mask=torch.ones_like(context),
        max_new_tokens=job.max_new_tokens,
        do_sample=False,
        eos_token_id=job.end_id,
        pad_token_id=job.end_id,
    )[0, context.shape[1] :]
    text: str = tokenizer.decode(found, skip_special_tokens=True)  # type: ignore[attr-defined]
    return text.strip()


if __name__ == "__main__":
    result = write_texts(TextsJob.model_validate_json(Path(sys.argv[1]).read_bytes()))
    sys.stdout.write(json.dumps(result) + "\n")
