"""What a distillation costs, from the lengths of trajectories: FLOPs and GPU-hours, before anything runs.

The operations are those of `hyperagent.flops`: the teacher runs forward once, the student is trained with all layers
recomputed. `hyperagent plan` (trainer) counts the student's in the same way and answers another question: what a recipe's
steps need of a machine, with its adapters, its hypernetwork, waiting and memory, of a split that is tokenized already.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hyperagent.errors import DataError
from hyperagent.flops import EXECUTED, Lengths, ModelShape, delta_rule_flops
from hyperagent.hardware import Machine

TEACHER_UTILISATION = 0.3
"""Share of the peak that a teacher's prefill is taken to reach; an assumption until it is measured."""
STUDENT_UTILISATION = 0.35
"""Share of the peak that the student's executed FLOPs are taken to reach; an assumption until it is measured.

`hyperagent plan` counts no recomputation, a third of what is executed, and so calls the same speed 23 %."""


VOCABULARY = 151_936

QWEN3_CODER_480B = ModelShape(
    # https://huggingface.co/Qwen/Qwen3-Coder-480B-A35B-Instruct/blob/main/config.json: 62 layers, hidden 6144, 96 query
    # and 8 key heads of 128, 8 of 160 experts of 2560.
    name="Qwen3-Coder-480B-A35B",
    num_parameters=480e9,
    linear_parameters=62 * (6144 * (2 * 96 + 2 * 8) * 128 + 8 * 3 * 6144 * 2560 + 6144 * 160),
    attention_width=96 * 128,
    num_attention_layers=62,
    head_parameters=6144 * VOCABULARY,
)
QWEN3_CODER_NEXT = ModelShape(
    # https://huggingface.co/Qwen/Qwen3-Coder-Next/blob/main/config.json: 48 layers, hidden 2048, every fourth of full
    # attention with 16 query (and as many gate) and 2 key heads of 256, the others Gated DeltaNet with 16 key and 32
    # value heads of 128; 10 of 512 experts of 512, and a shared one.
    name="Qwen3-Coder-Next",
    num_parameters=80e9,
    linear_parameters=(
        12 * 2048 * (2 * 16 + 2 * 2 + 16) * 256
        + 36 * 2048 * ((2 * 16 + 2 * 32) * 128 + 2 * 32 + 32 * 128)
        + 48 * (11 * 3 * 2048 * 512 + 2048 * 512)
    ),
    attention_width=16 * 256,
    num_attention_layers=12,
    head_parameters=2048 * VOCABULARY,
    recurrent_flops=36 * delta_rule_flops(value_heads=32, key_size=128, value_size=128),
)


@dataclass(frozen=True)
class Estimate:
    """A total over all rows, from a sample of them."""

    total: float
    standard_error: float
    """Of the total, for a sample drawn without replacement; 0 if the sample is everything."""


@dataclass(frozen=True)
class DataPlan:
    """What a distillation costs."""

    rows: int
    sampled_rows: int
    tokens: Estimate
    """In the teacher's view."""
    supervised_tokens: Estimate
    student_tokens: Estimate
    teacher_flops: float
    student_flops: float
    """Of all epochs, recomputation included."""
    teacher_gpu_hours: float
    student_gpu_hours: float
    teacher_hours: float
    """On all of the machine's GPUs."""
    student_hours: float
    teacher_weight_bytes: float
    student_weight_bytes: float
    """Both in bfloat16."""
    machine_memory_bytes: float

    @property
    def teacher_fits(self) -> bool:
        """Whether the teacher's weights leave a fifth of the machine's memory free."""
        return self.teacher_weight_bytes <= 0.8 * self.machine_memory_bytes


def estimate(sample: NDArray[np.float64], rows: int) -> Estimate:
    """The total of `rows` values, [n] of which are known (Cochran, Sampling Techniques, section 2.9).

    Raises:
        DataError: nothing is known.
    """
    n = len(sample)
    if n == 0:
        raise DataError("no row was sampled, so nothing can be planned")
    spread = float(np.var(sample, ddof=1)) if 1 < n < rows else 0.0
    return Estimate(float(np.mean(sample)) * rows, rows * float(np.sqrt(spread / n * (1 - n / rows))))


def plan_distillation(
    num_tokens: Lengths,
    num_supervised: Lengths,
    num_student_tokens: Lengths,
    *,
    rows: int,
    machine: Machine,
    epochs: int,
    teacher: ModelShape = QWEN3_CODER_480B,
    student: ModelShape = QWEN3_CODER_NEXT,
) -> DataPlan:
    """Plan from a sample of trajectories.

    Args:
        num_tokens: [n], in the teacher's view; a row that cannot be used has 0 of everything.
        num_supervised: [n].
        num_student_tokens: [n], in the student's view.
        rows: that the sample stands for.

    Raises:
        DataError: the sample is empty.
    """
    teacher_flops = sum(teacher.forward_flops(num_tokens, num_supervised).values())
    student_flops = sum(student.training_flops(num_student_tokens, num_supervised, EXECUTED).values())
    teacher_total = estimate(np.asarray(teacher_flops), rows).total
    student_total = epochs * estimate(np.asarray(student_flops), rows).total
    teacher_gpu_hours = teacher_total / (TEACHER_UTILISATION * machine.flops) / 3600
    student_gpu_hours = student_total / (STUDENT_UTILISATION * machine.flops) / 3600
    return DataPlan(
        rows=rows,
        sampled_rows=len(num_tokens),
        tokens=estimate(num_tokens.astype(np.float64), rows),
        supervised_tokens=estimate(num_supervised.astype(np.float64), rows),
        student_tokens=estimate(num_student_tokens.astype(np.float64), rows),
        teacher_flops=teacher_total,
        student_flops=student_total,
        teacher_gpu_hours=teacher_gpu_hours,
        student_gpu_hours=student_gpu_hours,
        teacher_hours=teacher_gpu_hours / machine.gpus,
        student_hours=student_gpu_hours / machine.gpus,
        teacher_weight_bytes=2 * teacher.num_parameters,
        student_weight_bytes=2 * student.num_parameters,
        machine_memory_bytes=machine.gpus * machine.memory_bytes,
    )
