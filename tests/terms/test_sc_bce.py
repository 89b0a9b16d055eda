"""Cross-entropy with perturbed labels: arithmetic, loops, the draw itself, identities."""

import math

import pytest
import reference_terms as reference
import torch
from cases import each_dimension, make_case
from torch.nn import functional as F

from densecal.losses import CompoundLoss, CrossEntropyLoss, LabelSmoothingLoss
from densecal.targets import OneHotTarget, one_hot_target, svls_target
from densecal.terms import SCBCE

WEIGHTS = [0.5, 1.0, 3.0]


def compound(activation="softmax", **options):
    return CompoundLoss(OneHotTarget(activation=activation), {"sc_bce": {"weight": 1.0, "term": SCBCE(**options)}})


def soft(case, activation):
    return one_hot_target(case.soft_labels, 3, activation=activation, spatial_dims=case.label_map.ndim - 1, dtype=torch.float64)


def test_by_hand():
    # s = 0.1 * 2 = 0.2: a label of 1 becomes 0.8; p = 3/4.
    logits = torch.tensor([[[math.log(3.0)]]])
    value = compound("sigmoid", alpha=0.1)(logits, torch.tensor([[1]]))
    assert value.item() == pytest.approx(-0.8 * math.log(0.75) - 0.2 * math.log(0.25))


@each_dimension
def test_matches_the_loops(spatial):
    case = make_case(spatial)
    levels = [0.05, 0.2]
    dims = len(spatial)
    hard = [make(case.label_map, 3, spatial_dims=dims, dtype=torch.float64) for make in (one_hot_target, svls_target)]
    term = SCBCE(class_weights=WEIGHTS, reduction="sum")
    for target in (*hard, soft(case, "softmax"), soft(case, "sigmoid")):
        expected = 0.0
        for i, level in enumerate(levels):
            of_pixel = reference.perturbed_cross_entropy(2 * level)
            if target.activation == "sigmoid":
                of_pixel = reference.over_channels(of_pixel)
            expected += reference.over_pixels(case.logits[i : i + 1], target.probs[i : i + 1], case.valid[i : i + 1], of_pixel, WEIGHTS)
        assert term(case.logits, target, context={"perturbation": levels}).item() == pytest.approx(expected, rel=1e-6)


def test_is_the_mean_over_draws():
    # One draw per image: with probability alpha the target is (1 - 2 beta) y + beta, here -1 or 2.
    logits, y = make_case((5, 7), num_classes=1, ignored=0.0).logits, torch.randint(0, 2, (2, 1, 5, 7), generator=torch.Generator().manual_seed(0))
    alpha, beta = 0.15, 2.0
    drawn, kept = (F.binary_cross_entropy_with_logits(logits, t.double()) for t in ((1 - 2 * beta) * y + beta, y))
    torch.testing.assert_close(compound("sigmoid", alpha=alpha, beta=beta)(logits, y), alpha * drawn + (1 - alpha) * kept)


def test_two_classes_are_one_channel():
    case = make_case((5, 7), num_classes=2)
    channel = case.logits[:, 1:] - case.logits[:, :1]
    torch.testing.assert_close(compound(alpha=0.1)(case.logits, case.label_map), compound("sigmoid", alpha=0.1)(channel, case.label_map))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_level_zero_is_cross_entropy(activation):
    case = make_case((5, 7))
    expected = CrossEntropyLoss(activation=activation)(case.logits, case.soft_labels)
    torch.testing.assert_close(compound(activation, alpha=0.0)(case.logits, case.soft_labels), expected)
    levels = compound(activation)(case.logits, case.soft_labels, context={"perturbation": torch.zeros(2)})
    torch.testing.assert_close(levels, expected)


def test_alpha_one_is_label_smoothing_over_the_others():
    case = make_case((5, 7))
    smoothed = LabelSmoothingLoss(smoothing=0.3, spread="others")
    torch.testing.assert_close(compound(alpha=1.0, beta=0.3)(case.logits, case.label_map), smoothed(case.logits, case.label_map))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_gradient_is_right_and_zero_at_ignored_pixels(activation):
    case = make_case((2, 3), seed=3)
    assert not case.valid.all()
    logits, target, term = case.logits.requires_grad_(), soft(case, activation), SCBCE(alpha=0.1, class_weights=WEIGHTS)
    assert torch.autograd.gradcheck(lambda z: term(z, target), logits)
    term(logits, target).backward()
    assert logits.grad is not None
    assert not logits.grad.movedim(1, -1)[~case.valid].any()


def test_options_and_side_input_are_checked():
    with pytest.raises(ValueError, match=r"Expected `alpha` under 1 / \(2 beta\) = 0.25"):
        SCBCE(alpha=0.25)
    with pytest.raises(ValueError, match="Expected `beta` to be greater than 0"):
        SCBCE(beta=0.0)
    case = make_case((5, 7))
    with pytest.raises(ValueError, match="Expected the side input 'perturbation', which SCBCE needs"):
        compound()(case.logits, case.label_map)
    with pytest.raises(ValueError, match=r"Expected `perturbation` of shape \(2,\), one level per image, but got \(3,\)"):
        compound()(case.logits, case.label_map, context={"perturbation": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"Expected `perturbation` in \[0, 1 / \(2 beta\)\) = \[0, 0.25\)"):
        compound()(case.logits, case.label_map, context={"perturbation": [0.0, 0.25]})


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    case = make_case((5, 7), dtype=torch.float32)
    context = {"perturbation": torch.tensor([0.1, 0.2])}
    value = torch.compile(compound(), fullgraph=True, backend="aot_eager")(case.logits, case.label_map, context=context)
    torch.testing.assert_close(value, compound()(case.logits, case.label_map, context=context))
