"""What a distillation costs, from the lengths of trajectories: FLOPs and GPU-hours, before anything runs.

Only matrix products are counted, a multiplication and an addition as two; with W parameters in the products that
every token takes part in, A = heads x head dimension, L layers of full attention and R FLOPs of recurrent state a token,
a forward pass over a trajectory of T tokens with N rows of the head takes

    linear     2 W T
    attention  2 A T^2 L      (scores and values, half of the square each, since a token sees no later one)
    recurrent  R T
    head       2 H N          (H: hidden size x vocabulary)

The teacher runs forward once. The student's weights are frozen, so its backward pass has no products for weights: with
all layers recomputed (activation checkpointing) it executes 3 x linear, 4.5 x attention and recurrent (FlashAttention's
backward is 2.5 forward passes, arXiv:2307.08691), and 2 x head, whose gradient is taken in the forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from hyperagent.errors import ConfigError, DataError

Lengths = NDArray[np.int64]

TEACHER_UTILISATION = 0.3
"""Share of the peak that a teacher's prefill is taken to reach; an assumption until it is measured."""
STUDENT_UTILISATION = 0.35
"""Share of the peak that the student's executed FLOPs are taken to reach; an assumption until it is measured."""


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind in one box."""

    name: str
    num_gpus: int
    peak_flops: float
    """Per second and GPU, dense bfloat16, as the vendor's data sheet states it without sparsity."""
    memory_bytes: float
    """Per GPU."""


# NVIDIA's data sheets of A100 SXM, H100 SXM, H200 SXM and HGX B200.
_GPUS = {"a100": (312e12, 80e9), "h100": (989e12, 80e9), "h200": (989e12, 141e9), "b200": (2250e12, 180e9)}
MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        f"{count}x{gpu}": Machine(f"{count}x{gpu}", count, peak, memory)
        for gpu, (peak, memory) in _GPUS.items()
        for count in (1, 8)
    }
)


@dataclass(frozen=True)
class ModelShape:
    """What a model's products cost."""

    name: str
    num_parameters: float
    linear_parameters: float
    """W: in the products of one token; of a mixture of experts, those of the experts it is routed to."""
    attention_width: int
    """A: query heads x head dimension."""
    num_attention_layers: int
    """L."""
    head_parameters: int
    """H."""
    recurrent_flops: float = 0.0
    """R: forward, per token, of all layers with a recurrent state."""

    def forward_flops(self, num_tokens: Lengths, num_rows: Lengths) -> dict[str, NDArray[np.float64]]:
        """FLOPs of each kind for trajectories of [n] tokens with [n] rows of the head."""
        tokens, rows = num_tokens.astype(np.float64), num_rows.astype(np.float64)
        return {
            "linear": 2 * self.linear_parameters * tokens,
            "attention": 2.0 * self.attention_width * self.num_attention_layers * tokens**2,
            "recurrent": self.recurrent_flops * tokens,
            "head": 2.0 * self.head_parameters * rows,
        }


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
    # value heads of 128; 10 of 512 experts of 512, and a shared one. The recurrence is chunked in 64 tokens: three
    # products with the state, and five within a chunk.
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
    recurrent_flops=36 * 32 * (6 * 128 * 128 + 10 * 64 * 128),
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


def machine_named(name: str) -> Machine:
    """One of `MACHINES`.

    Raises:
        ConfigError: there is no such machine; names those there are.
    """
    if name not in MACHINES:
        raise ConfigError(f"no machine is called {name!r}; choose one of {', '.join(MACHINES)}")
    return MACHINES[name]


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
    forward = student.forward_flops(num_student_tokens, num_supervised)
    student_flops = (
        3 * forward["linear"] + 4.5 * (forward["attention"] + forward["recurrent"]) + 2 * forward["head"]
    ) * epochs
    teacher_total = estimate(np.asarray(teacher_flops), rows).total
    student_total = estimate(student_flops, rows).total
    teacher_gpu_hours = teacher_total / (TEACHER_UTILISATION * machine.peak_flops) / 3600
    student_gpu_hours = student_total / (STUDENT_UTILISATION * machine.peak_flops) / 3600
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
        teacher_hours=teacher_gpu_hours / machine.num_gpus,
        student_hours=student_gpu_hours / machine.num_gpus,
        teacher_weight_bytes=2 * teacher.num_parameters,
        student_weight_bytes=2 * student.num_parameters,
        machine_memory_bytes=machine.num_gpus * machine.memory_bytes,
    )
