"""Run the pre-flight: check that this student, network and loss can be trained, before training starts.

    student     vocabulary, frozen, targets of every layer             `preflight.student`
    attention   a fused kernel with correct results                    `student.attention`
    injection   exact start, every target reached, routing, samples    `preflight.injection`
    gradients   step 0, step 1, balance, magnitudes                    `preflight.gradients`
    memory      memory of a step, compared with the machine's          `preflight.memory`

Everything runs on the real parts, the student's own forward pass and the trainer's injector, network, loss and optimizer,
with a batch of random tokens. Only copies of the network are trained, for one step, and no global random state is used, so
training is the same with and without a pre-flight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from hyperagent_trainer.network.adapted_student import AdaptedStudent, AdapterNetwork
from hyperagent_trainer.preflight.gradients import check_gradients
from hyperagent_trainer.preflight.injection import check_injection, check_start
from hyperagent_trainer.preflight.memory import MemoryBudget, check_memory
from hyperagent_trainer.preflight.probe import Probe
from hyperagent_trainer.preflight.student import check_student
from hyperagent_trainer.report import Check, PreflightReport

OptimizerFactory = Callable[[AdapterNetwork], torch.optim.Optimizer]
"""Makes the optimizer that training will use, with the learning rate of its first step."""


def run_preflight(
    adapted: AdaptedStudent, make_optimizer: OptimizerFactory, budget: MemoryBudget, *, attention: Check
) -> PreflightReport:
    """Run every check and return the report; `adapted` is not changed.

    Args:
        adapted: the adapted student that is about to be trained, before its first step.
        budget: the size of a step, for the estimate of its memory.
        attention: the check of the attention kernel in use.

    Raises:
        HyperagentError: the parts do not fit together, such as an adapter of another student.
    """
    probe = Probe(_with_network(adapted, copy.deepcopy(adapted.network)))
    checks: list[Check] = [*check_student(adapted.student, probe.target_names), attention]
    # The targets must be layers of the student before anything can be injected into them.
    if all(check.passed for check in checks):
        start = check_start(probe)
        checks.append(start)
        if start.measured["not finite"]:
            return PreflightReport(tuple(checks))
        checks += check_injection(probe)
        # These train the probe's network for one step, so they come after the checks that need the initial network.
        checks += check_gradients(probe, make_optimizer)
        checks.append(check_memory(probe, budget))
    return PreflightReport(tuple(checks))


def _with_network(adapted: AdaptedStudent, network: AdapterNetwork) -> AdaptedStudent:
    other = copy.copy(adapted)
    other.network = network
    return other
