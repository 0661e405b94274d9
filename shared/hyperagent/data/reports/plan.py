"""Estimate the cost of a distillation in FLOPs and GPU-hours from the lengths of trajectories.

Operations are counted by `hyperagent.flops`: the teacher runs forward once, the student is trained with all layers
recomputed. `hyperagent plan` (trainer) counts the student's operations in the same way, but answers a different
question: the time and memory that the steps of a recipe need on a machine, with adapters, hypernetwork and idle time,
for a split that is already tokenized.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hyperagent.errors import DataError
from hyperagent.flops import EXECUTED, Lengths, ModelShape, delta_rule_flops
from hyperagent.hardware import Machine

TEACHER_UTILISATION = 0.3
"""Assumed fraction of the peak FLOPS that a teacher's prefill reaches; not yet measured."""
STUDENT_UTILISATION = 0.35
"""Assumed fraction of the peak FLOPS that the student's executed FLOPs reach; not yet measured.

`hyperagent plan` does not count recomputation, a third of the executed FLOPs, so it reports the same speed as 23 %."""


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
    """Estimated total over all rows, from a sample of them."""

    total: float
    standard_error: float
    """Standard error of the total, for a sample drawn without replacement; 0 if all rows were sampled."""


@dataclass(frozen=True)
class DataPlan:
    """Estimated cost of a distillation."""

    rows: int
    sampled_rows: int
    tokens: Estimate
    """Tokens in the teacher's view."""
    supervised_tokens: Estimate
    student_tokens: Estimate
    teacher_flops: float
    student_flops: float
    """FLOPs of all epochs, recomputation included."""
    teacher_gpu_hours: float
    student_gpu_hours: float
    teacher_hours: float
    """Wall time in hours on all of the machine's GPUs."""
    student_hours: float
    """Wall time in hours on all of the machine's GPUs."""
    teacher_weight_bytes: float
    """Bytes of the teacher's weights in bfloat16."""
    student_weight_bytes: float
    """Bytes of the student's weights in bfloat16."""
    machine_memory_bytes: float

    @property
    def teacher_fits(self) -> bool:
        """Whether the teacher's weights leave a fifth of the machine's memory free."""
        return self.teacher_weight_bytes <= 0.8 * self.machine_memory_bytes


def estimate(sample: NDArray[np.float64], rows: int) -> Estimate:
    """Estimate the total of `rows` values from a sample [n] of them (Cochran, Sampling Techniques, section 2.9).

    Raises:
        DataError: the sample is empty.
    """
    n = len(sample)
    if n == 0:
        raise DataError("no row was sampled, so the cost cannot be estimated; use a larger sample")
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
    """Estimate the cost of a distillation from a sample of trajectories.

    Args:
        num_tokens: tokens per row in the teacher's view, shape [n]; a row that cannot be used is 0 in all three arrays.
        num_supervised: supervised tokens per row, shape [n].
        num_student_tokens: tokens per row in the student's view, shape [n].
        rows: number of rows that the sample represents.

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
