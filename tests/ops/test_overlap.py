"""Overlap sums: arithmetic and loops. The terms' tests cover the losses made of them."""

import pytest
import reference
import torch
from cases import each_dimension, make_case

from densecal.ops import overlap_sums, tversky_score


def test_sums_by_hand():
    # p = (0.5, 1, 0), q = (1, 0.5, 0); the last pixel does not count: P = 1.5, Q = 1.5, D = 1.
    p, q = torch.tensor([[[0.5, 1.0, 1.0]]]), torch.tensor([[[1.0, 0.5, 0.0]]])
    tp, fp, fn = overlap_sums(p, q, torch.tensor([[True, True, False]]))
    assert (tp.item(), fp.item(), fn.item()) == (1.0, 0.5, 0.5)


@each_dimension
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_score_matches_the_loops(spatial, norm):
    case = make_case(spatial)
    probs = case.logits.softmax(1)
    score = tversky_score(*overlap_sums(probs, case.soft_labels, case.valid, norm=norm), alpha=0.3, beta=0.7, smooth=0.1)
    for n in range(2):
        for c in range(3):
            p, q = (t[n, c][case.valid[n]].tolist() for t in (probs, case.soft_labels))
            assert score[n, c].item() == pytest.approx(reference.tversky(p, q, 0.3, 0.7, 0.1, 1 if norm == "l1" else 2), rel=1e-12)


def test_nothing_there_and_nothing_predicted_scores_one_with_zero_gradient():
    p = torch.zeros(1, 1, 4, requires_grad=True)
    score = tversky_score(*overlap_sums(p, torch.zeros(1, 1, 4), torch.zeros(1, 4, dtype=torch.bool)), alpha=1.0, beta=1.0, smooth=0.0)
    score.sum().backward()
    assert score.item() == 1.0
    assert p.grad is not None
    assert not p.grad.any()


def test_norm_is_checked():
    with pytest.raises(ValueError, match=r"Expected `norm` to be one of \('l1', 'l2'\), but got 'L1'"):
        overlap_sums(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), norm="L1")
