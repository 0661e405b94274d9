"""Metrics of single rows against a float64 computation over the whole vocabulary, and against the training loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hyperagent_trainer.comparison import row_metrics as module
from hyperagent_trainer.comparison.row_metrics import RowMetrics, row_metrics, teacher_metrics
from hyperagent_trainer.data.teacher_rows import TeacherRows
from hyperagent_trainer.loss.distillation import compute_distillation_loss

NUM_ROWS, SIZE, VOCAB, PADDED, TOP_K = 7, 12, 40, 48, 5


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, TeacherRows]:
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(NUM_ROWS, SIZE, generator=generator)
    head_VD = torch.randn(PADDED, SIZE, generator=generator)
    p_NV = (2 * torch.randn(NUM_ROWS, VOCAB, generator=generator, dtype=torch.float64)).softmax(1)
    kept = p_NV.topk(TOP_K, dim=1)
    logprobs_NK, ids_NK = kept.values.log().float(), kept.indices.clone()
    # The last row keeps one id less, padded as in the cache.
    logprobs_NK[-1, -1], ids_NK[-1, -1] = -torch.inf, ids_NK[-1, 0]
    tail_N = (1 - logprobs_NK.double().exp().sum(1)).log().float()
    target_N = torch.randint(VOCAB, (NUM_ROWS,), generator=generator)
    target_N[0] = ids_NK[0, 1]
    return hidden_ND, head_VD, TeacherRows(ids_NK, logprobs_NK, tail_N, target_N)


def by_hand(hidden_ND: torch.Tensor, head_VD: torch.Tensor, rows: TeacherRows) -> RowMetrics:
    kl, nll, agrees, exact = [], [], [], []
    assert rows.target_ids_N is not None
    for n in range(NUM_ROWS):
        logits = [float(hidden_ND[n].double() @ head_VD[v].double()) for v in range(VOCAB)]
        log_z = math.log(sum(math.exp(z) for z in logits))
        q = [math.exp(z - log_z) for z in logits]
        kept = {
            int(i): math.exp(float(lp))
            for i, lp in zip(rows.ids_NK[n], rows.logprobs_NK[n], strict=True)
            if lp > -torch.inf
        }
        tail_q = sum(q[v] for v in range(VOCAB) if v not in kept)
        tail_p = math.exp(float(rows.tail_logmass_N[n]))
        total = sum(kept.values()) + tail_p
        kl.append(
            sum(p / total * math.log(p / total / q[i]) for i, p in kept.items())
            + tail_p / total * math.log(tail_p / total / tail_q)
        )
        best = int(np.argmax(logits))
        nll.append(-math.log(q[int(rows.target_ids_N[n])]))
        agrees.append(best == max(kept, key=lambda i: kept[i]))
        exact.append(best == int(rows.target_ids_N[n]))
    return RowMetrics(np.array(kl), np.array(nll), np.array(agrees), np.array(exact))


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_every_metric_equals_its_definition_in_chunks_of_any_size(
    chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_rows * 4 * VOCAB)
    hidden_ND, head_VD, rows = inputs()
    found, wanted = row_metrics(hidden_ND, head_VD, rows, vocab_size=VOCAB), by_hand(hidden_ND, head_VD, rows)
    # The logits are float32, of size about ten.
    np.testing.assert_allclose(found.kl_N, wanted.kl_N, rtol=1e-5)
    np.testing.assert_allclose(found.nll_N, wanted.nll_N, rtol=1e-5)
    assert found.agrees_N.tolist() == wanted.agrees_N.tolist()
    assert found.exact_N.tolist() == wanted.exact_N.tolist()


def test_the_divergences_add_up_to_the_training_loss() -> None:
    hidden_ND, head_VD, rows = inputs(1)
    loss = compute_distillation_loss(hidden_ND, head_VD, rows, vocab_size=VOCAB)
    found = row_metrics(hidden_ND, head_VD, rows, vocab_size=VOCAB)
    assert float(found.kl_N.sum()) == pytest.approx(float(loss), rel=1e-5)


def test_the_teacher_itself_has_no_divergence_and_the_likelihood_that_it_stored() -> None:
    _, _, rows = inputs()
    found = teacher_metrics(rows)
    assert not found.kl_N.any()
    assert found.agrees_N.all()
    assert found.nll_N[0] == pytest.approx(-float(rows.logprobs_NK[0, 1]))
    assert not found.exact_N[0]
    assert rows.target_ids_N is not None
    for n in range(1, NUM_ROWS):
        if int(rows.target_ids_N[n]) not in rows.ids_NK[n].tolist():
            assert found.nll_N[n] == pytest.approx(-float(rows.tail_logmass_N[n]))


def test_draws_are_averaged() -> None:
    one, other = (row_metrics(*inputs(seed)[:2], inputs(seed)[2], vocab_size=VOCAB) for seed in (2, 3))
    mean = RowMetrics.mean([one, other])
    np.testing.assert_allclose(mean.kl_N, (one.kl_N + other.kl_N) / 2)
    assert mean.exact_N is one.exact_N
