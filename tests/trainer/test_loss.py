"""The loss against a float64 oracle that follows the definition and lets autograd find the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hyperagent.errors import InvalidRequest
from hyperagent_trainer.loss import compute_distillation_loss


def oracle(
    hidden: Tensor, head: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Forward KL over the buckets "each kept id" and "any other id", all probabilities written out."""
    q = (hidden.double() @ head.double().T / temperature).softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(len(ids)):
        kept = torch.zeros(q.shape[1], dtype=torch.bool)
        kept[ids[n]] = True
        p_kept, p_rest = logprobs[n].double().exp(), tail[n].double().exp()
        total = total + (p_kept * (logprobs[n].double() - q[n, ids[n]].log())).sum()
        if p_rest > 0:
            total = total + p_rest * (tail[n].double() - q[n, ~kept].sum().log())
    return total * temperature**2


def rows(n: int, k: int, vocab: int, *, spread: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A random teacher's top-k rows."""
    generator = torch.Generator().manual_seed(seed)
    logp = (torch.randn(n, vocab, generator=generator, dtype=torch.float64) * spread).log_softmax(-1)
    top, ids = logp.topk(k, dim=-1)
    rest = logp.scatter(1, ids, -torch.inf).logsumexp(-1)
    return ids, top.float(), rest.float()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize(("n", "k", "vocab", "chunk"), [(1, 1, 7, 1), (5, 4, 33, 2), (9, 128, 500, 4), (6, 8, 40, 64)])
def test_loss_and_gradient_equal_the_definition(n: int, k: int, vocab: int, chunk: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(vocab, 16, generator=generator)
    hidden = torch.randn(n, 16, generator=generator).requires_grad_()
    ids, logprobs, tail = rows(n, k, vocab)

    loss = compute_distillation_loss(
        hidden, head, ids, logprobs, tail, vocab_size=vocab, chunk_rows=chunk, temperature=temperature
    )
    (loss / n).backward()

    exact = hidden.detach().double().requires_grad_()
    expected = oracle(exact, head, ids, logprobs, tail, temperature=temperature)
    (expected / n).backward()
    assert hidden.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_rows_that_keep_fewer_ids_are_padded() -> None:
    generator = torch.Generator().manual_seed(5)
    head = torch.randn(40, 16, generator=generator)
    hidden = torch.randn(6, 16, generator=generator).requires_grad_()
    counts = [8, 3, 1, 8, 5, 2]
    cut = [rows(6, k, 40) for k in counts]
    ids, logprobs, tail = rows(6, 8, 40)
    for n, (k, (_, _, tails)) in enumerate(zip(counts, cut, strict=True)):
        ids[n, k:], logprobs[n, k:], tail[n] = ids[n, 0], -torch.inf, tails[n]

    loss = compute_distillation_loss(hidden, head, ids, logprobs, tail, vocab_size=40, chunk_rows=4)
    loss.backward()

    exact = hidden.detach().double().requires_grad_()
    parts = [
        oracle(exact[n : n + 1], head, ids[n : n + 1, :k], logprobs[n : n + 1, :k], tail[n : n + 1])
        for n, k in enumerate(counts)
    ]
    expected = torch.stack(parts).sum()
    expected.backward()
    assert hidden.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_every_id_kept_leaves_no_tail_and_no_nan() -> None:
    head = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ids, logprobs, tail = rows(3, 6, 6)
    assert tail.isneginf().all()

    loss = compute_distillation_loss(hidden, head, ids, logprobs, tail, vocab_size=6, chunk_rows=2)
    loss.backward()

    exact = hidden.detach().double().requires_grad_()
    oracle(exact, head, ids, logprobs, tail).backward()
    assert hidden.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_a_sure_student_keeps_its_tail() -> None:
    """With logits this far apart 1 - sum(q) is 0 in float32, and its log -inf; the log-sum-exp is not."""
    head = torch.eye(8) * 60
    hidden = torch.eye(8)[:1].clone().requires_grad_()
    ids = torch.tensor([[0, 1]])
    logprobs = torch.tensor([[0.9, 0.06]]).log()
    tail = torch.tensor([0.04]).log()

    loss = compute_distillation_loss(hidden, head, ids, logprobs, tail, vocab_size=8, chunk_rows=1)

    expected = oracle(hidden.detach(), head, ids, logprobs, tail)
    assert loss.isfinite()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_student_that_equals_the_teacher_has_no_loss_and_no_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    head, hidden = torch.randn(50, 8, generator=generator), torch.randn(4, 8, generator=generator).requires_grad_()
    logp = (hidden.detach().double() @ head.double().T).log_softmax(-1)
    top, ids = logp.topk(5, dim=-1)
    tail = logp.scatter(1, ids, -torch.inf).logsumexp(-1)

    loss = compute_distillation_loss(hidden, head, ids, top.float(), tail.float(), vocab_size=50, chunk_rows=3)
    loss.backward()

    assert hidden.grad is not None
    assert abs(loss.item()) < 1e-5
    assert float(hidden.grad.abs().max()) < 1e-4


def test_padding_rows_of_the_head_take_no_part() -> None:
    generator = torch.Generator().manual_seed(4)
    head, hidden = torch.randn(40, 8, generator=generator), torch.randn(4, 8, generator=generator)
    ids, logprobs, tail = rows(4, 5, 40)
    padded = torch.cat([head, torch.full((24, 8), 100.0)])

    plain = compute_distillation_loss(hidden, head, ids, logprobs, tail, vocab_size=40, chunk_rows=2)
    with_padding = compute_distillation_loss(hidden, padded, ids, logprobs, tail, vocab_size=40, chunk_rows=2)

    assert torch.equal(plain, with_padding)


def test_what_cannot_be_computed_is_refused() -> None:
    head, hidden = torch.randn(40, 8), torch.randn(4, 8)
    ids, logprobs, tail = rows(4, 5, 40)
    none = torch.zeros(0, 5, dtype=torch.int64)
    with pytest.raises(InvalidRequest, match="must be frozen"):
        compute_distillation_loss(
            hidden, head.clone().requires_grad_(), ids, logprobs, tail, vocab_size=40, chunk_rows=2
        )
    with pytest.raises(InvalidRequest, match="no supervised rows"):
        compute_distillation_loss(hidden[:0], head, none, logprobs[:0], tail[:0], vocab_size=40, chunk_rows=2)
    with pytest.raises(InvalidRequest, match="disagree in shape"):
        compute_distillation_loss(hidden, head, ids, logprobs, tail[:3], vocab_size=40, chunk_rows=2)
    with pytest.raises(InvalidRequest, match="different tokenizers"):
        compute_distillation_loss(hidden, head, ids, logprobs, tail, vocab_size=30, chunk_rows=2)
