"""Cross-entropy per pixel: arithmetic, loops, PyTorch."""

import math

import pytest
import reference
import torch
from cases import each_dimension, make_case

from densecal.ops import soft_cross_entropy, uniform_cross_entropy


def test_soft_cross_entropy_by_hand():
    logits = torch.tensor([[[math.log(3.0)], [0.0]]])  # p = (3/4, 1/4)
    value = soft_cross_entropy(logits, torch.tensor([[[0.5], [0.5]]]), torch.tensor([[True]]))
    assert value.item() == pytest.approx(-0.5 * math.log(3 / 4) - 0.5 * math.log(1 / 4))


@each_dimension
def test_soft_cross_entropy_matches_the_loops(spatial):
    case = make_case(spatial)
    weights = [0.5, 1.0, 2.0]
    value = soft_cross_entropy(case.logits, case.soft_labels, case.valid, class_weights=torch.tensor(weights))
    assert value.sum().item() == pytest.approx(reference.cross_entropy(case.logits, case.soft_labels, case.valid, weights), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 2.0])], ids=["even", "weighted"])
def test_uniform_cross_entropy_equals_the_dense_form(smoothing, weights):
    case = make_case((5, 7))
    label_map = case.label_map.clamp_min(0)
    probs = (1 - smoothing) * torch.nn.functional.one_hot(label_map, 3).movedim(-1, 1).double() + smoothing / 3
    torch.testing.assert_close(
        uniform_cross_entropy(case.logits, label_map, case.valid, smoothing=smoothing, class_weights=weights),
        soft_cross_entropy(case.logits, probs, case.valid, class_weights=weights),
    )


def test_sigmoid_sums_binary_cross_entropies_over_channels():
    case = make_case((5, 7))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(case.logits, case.soft_labels, reduction="none").sum(1)
    value = soft_cross_entropy(case.logits, case.soft_labels, case.valid, activation="sigmoid")
    torch.testing.assert_close(value, torch.where(case.valid, expected, 0.0))


def test_gradients():
    case = make_case((2, 3))
    logits = case.logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: soft_cross_entropy(z, case.soft_labels, case.valid), logits)
    assert torch.autograd.gradcheck(lambda z: uniform_cross_entropy(z, case.label_map.clamp_min(0), case.valid, smoothing=0.2), logits)


def test_activation_is_checked():
    with pytest.raises(ValueError, match="Expected `activation` to be one of"):
        soft_cross_entropy(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), torch.ones(1, 1, dtype=torch.bool), activation="relu")
