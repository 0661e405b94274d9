"""The pre-flight: whether this student, this network and the loss between them can train, proved before they do.

    student     vocabulary, frozen, targets of every layer           `preflight_student`
    attention   a fused kernel that computes what it should           `attention`
    injection   exact start, every target reached, routing, samples   `preflight_injection`
    gradients   step 0, step 1, balance, magnitudes                  `preflight_gradients`
    memory      what a step will hold, against the machine           `memory_estimate`

Everything runs on the real parts: the student's own forward pass, the trainer's injector, network, loss and
optimizer, on a batch of random tokens. Only copies of the network are trained, for one step, and no global random
state is used, so that training is the same with a pre-flight as without.
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
"""Makes the optimizer that training will use, set for its first step."""


def run_preflight(
    adapted: AdaptedStudent, make_optimizer: OptimizerFactory, budget: MemoryBudget, *, attention: Check
) -> PreflightReport:
    """Make every check; nothing is changed, whatever they find.

    Args:
        adapted: what is about to be trained, before its first step.
        budget: the size of a step, for the estimate of its memory.
        attention: how the attention that is in use was found.

    Raises:
        HyperagentError: the parts do not fit together at all, such as an adapter of another student.
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
        # These train the probe's hypernetwork by a step, and so come last.
        checks += check_gradients(probe, make_optimizer)
        checks.append(check_memory(probe, budget))
    return PreflightReport(tuple(checks))


def _with_network(adapted: AdaptedStudent, network: AdapterNetwork) -> AdaptedStudent:
    other = copy.copy(adapted)
    other.network = network
    return other
