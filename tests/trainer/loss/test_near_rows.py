"""Test divergences of two nearly equal distributions, where the first-order terms cancel."""

from __future__ import annotations

import pytest
import torch
from loss_oracle import Case, oracle, relative

from hyperagent_trainer.loss.distillation import compute_distillation_loss
from hyperagent_trainer.loss.options import LossOptions

OPTIONS = {
    "forward_kl": LossOptions(),
    "reverse_kl": LossOptions(divergence="reverse_kl"),
    "jsd": LossOptions(divergence="jsd", jsd_beta=0.2),
}


def near_case(distance: float) -> Case:
    """Make a teacher that is confident of one id, and a student whose log-odds to the others differ by `distance`.

    The whole difference is in a bucket of 2 %, so that the terms of odd order do not cancel.
    """
    logprobs = torch.tensor([[0.98, 0.012]], dtype=torch.float64).log().float()
    tail = torch.tensor([0.008], dtype=torch.float64).log().float()
    # With an identity head the hidden states are the logits.
    student = torch.cat([logprobs[0].double(), (tail.double() - torch.log(torch.tensor(2.0).double())).expand(2)])
    student = student + torch.tensor([0.0, distance, distance, distance], dtype=torch.float64)
    return Case(
        student[None], torch.eye(4, dtype=torch.float64), torch.tensor([[0, 1]]), logprobs, tail, torch.tensor([0])
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("distance", [1e-6, 1e-5, 9e-4, -9e-4, 2e-3, 0.3, -0.9, 3.0, -4.0])
def test_the_loss_keeps_its_digits(distance: float, options: LossOptions) -> None:
    """In float64 the loss is of order distance**2, and the next term is smaller by at most a factor of the distance."""
    case = near_case(distance)
    hidden = case.hidden.clone().requires_grad_()
    loss = compute_distillation_loss(hidden, case.head, case.rows(), vocab_size=4, options=options)
    loss.backward()
    assert hidden.grad is not None
    expected, expected_gradient = oracle(case, 4, options)
    assert expected.item() > 1e-4 * distance**2
    # Logits near 5 are rounded at 1e-15, so a difference of 1e-6 keeps nine digits.
    assert relative(loss.detach(), expected) < max(1e-9, 2e-14 / abs(distance))
    assert relative(hidden.grad, expected_gradient) < max(1e-9, 2e-14 / abs(distance))
