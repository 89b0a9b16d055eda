"""Average calibration error as a term: arithmetic, loops, the metric's bins, gradients."""

import pytest
import reference_penalties as reference
import torch
from cases import each_dimension, make_case

from densecal.ops.binning import accumulate_bins, accumulate_soft_bins
from densecal.targets import one_hot_target
from densecal.terms import MarginalL1ACE


def make_target(case, kind="hard"):
    dims = case.label_map.ndim - 1
    if kind == "sigmoid":
        regions = torch.where(case.valid.unsqueeze(1), (case.soft_labels > 0.3).long(), -100)
        return one_hot_target(regions, 3, activation="sigmoid", spatial_dims=dims, dtype=torch.float64)
    return one_hot_target(case.label_map if kind == "hard" else case.soft_labels, 3, spatial_dims=dims, dtype=torch.float64)


@each_dimension
@pytest.mark.parametrize("kind", ["hard", "soft", "sigmoid"])
@pytest.mark.parametrize("binning", ["hard", "soft"])
@pytest.mark.parametrize("num_bins", [1, 4, 20])
def test_error_matches_the_loops(spatial, kind, binning, num_bins):
    case = make_case(spatial)
    target = make_target(case, kind)
    probs = case.logits.sigmoid() if kind == "sigmoid" else case.logits.softmax(1)
    rows = torch.tensor(reference.classwise_calibration_errors(probs, target.probs, case.valid, num_bins, soft=binning == "soft"))
    for reduction, expected in (("none", rows), ("mean", rows.mean()), ("sum", rows.sum())):
        value = MarginalL1ACE(num_bins=num_bins, binning=binning, reduction=reduction)(case.logits, target)
        torch.testing.assert_close(value, expected.double(), rtol=1e-6, atol=1e-7)


def test_error_by_hand():
    p = torch.tensor([0.1, 0.2, 0.3, 0.9], dtype=torch.float64)
    target = one_hot_target(torch.tensor([[1, 0, 1, 1]]), 2, dtype=torch.float64)
    logits = torch.stack([1 - p, p]).log().unsqueeze(0)
    # Class 1, two bins: means 0.2 against 2/3, 0.9 against 1; class 0 is its mirror image.
    assert MarginalL1ACE(num_bins=2)(logits, target).item() == pytest.approx(((2 / 3 - 0.2) + 0.1) / 2)
    # Soft bins around 0.25 and 0.75: 0.3 gives a tenth of itself to the upper one, 0.9 lies beyond both.
    lower, upper = (1 + 0 + 0.9 - 0.1 - 0.2 - 0.27) / 2.9, (0.1 + 1 - 0.03 - 0.9) / 1.1
    assert MarginalL1ACE(num_bins=2, binning="soft")(logits, target).item() == pytest.approx((lower + upper) / 2)


def test_empty_bins_do_not_dilute():
    target = one_hot_target(torch.tensor([[0, 0]]), 2, dtype=torch.float64)
    logits = torch.tensor([[[0.7, 0.7], [0.3, 0.3]]], dtype=torch.float64).log()
    for num_bins in (1, 10, 1000):
        assert MarginalL1ACE(num_bins=num_bins)(logits, target).item() == pytest.approx(0.3)


def test_calibrated_prediction_has_no_error():
    case = make_case((5, 7), ignored=0.0)
    target = make_target(case, "soft")
    for binning in ("hard", "soft"):
        assert MarginalL1ACE(binning=binning)(case.soft_labels.log(), target).item() < 1e-12


def test_one_image_and_class_is_the_average_of_the_metric_s_bins():
    case = make_case((5, 7), batch=1)
    target = make_target(case)
    p = case.logits.softmax(1)
    values = MarginalL1ACE(num_bins=15, reduction="none")(case.logits, target)
    for c in range(3):
        bins = accumulate_bins(p[:, c], target.probs[:, c], num_bins=15, valid=case.valid)
        assert values[0, c].item() == pytest.approx((bins.mean_confidence - bins.accuracy).abs().nanmean().item())


def test_soft_bins_hold_as_much_as_hard_ones():
    p, q = torch.rand(2, 3, 50, dtype=torch.float64), torch.rand(2, 3, 50, dtype=torch.float64)
    p[0, 0, :2] = torch.tensor([0.0, 1.0])
    row, valid = torch.arange(3).view(1, 3, 1), torch.rand(2, 1, 50) > 0.3
    options = {"num_bins": 7, "row": row, "num_rows": 3, "valid": valid}
    hard, soft = accumulate_bins(p, q, **options), accumulate_soft_bins(p, q, **options)
    for name in ("count", "confidence", "correct"):
        torch.testing.assert_close(getattr(soft, name).sum(-1), getattr(hard, name).sum(-1).double())


@pytest.mark.parametrize("kind", ["hard", "soft", "sigmoid"])
@pytest.mark.parametrize("binning", ["hard", "soft"])
def test_gradient_flows_through_the_mean_probability_only(kind, binning):
    case = make_case((2, 3), seed=3)
    term, target = MarginalL1ACE(num_bins=4, binning=binning), make_target(case, kind)
    logits = case.logits.requires_grad_()
    if binning == "hard":  # a soft bin's shares are constants for the gradient, not for the value
        assert torch.autograd.gradcheck(lambda z: term(z, target), logits)
    term(logits, target).backward()
    assert not case.valid.all()
    assert logits.grad is not None
    assert logits.grad.any()
    at_ignored = logits.grad.movedim(1, -1)[~case.valid]
    assert torch.equal(at_ignored, torch.zeros_like(at_ignored))


def test_gradient_of_a_soft_bin_is_its_share():
    # One pixel between the centres 0.25 and 0.75 of sigmoid bins: in both bins the mean is p, so d error / dp is sign(p - q), whatever the shares.
    logits = torch.tensor([[[0.2]]], dtype=torch.float64, requires_grad=True)
    MarginalL1ACE(num_bins=2, binning="soft")(logits, one_hot_target(torch.zeros(1, 1, 1), 1, activation="sigmoid")).backward()
    p = logits.detach().sigmoid()
    torch.testing.assert_close(logits.grad, p * (1 - p))


def test_background_weights_and_empty_images():
    case = make_case((5, 7))
    target = make_target(case)
    each = MarginalL1ACE(reduction="none")(case.logits, target)
    torch.testing.assert_close(MarginalL1ACE(include_background=False)(case.logits, target), each[:, 1:].mean())
    weights = torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(MarginalL1ACE(class_weights=weights)(case.logits, target), (each * weights).mean())
    torch.testing.assert_close(
        MarginalL1ACE(class_weights=weights, include_background=False)(case.logits, target), (each[:, 1:] * weights[1:]).mean()
    )
    case.label_map[1] = -100
    torch.testing.assert_close(MarginalL1ACE()(case.logits, make_target(case)), each[0].mean())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MarginalL1ACE(num_bins=0), "Expected `num_bins` to be greater than 0"),
        (lambda: MarginalL1ACE(binning="gaussian"), "Expected `binning` to be one of"),
        (lambda: MarginalL1ACE(reduction="avg"), "Expected `reduction` to be one of"),
        (
            lambda: MarginalL1ACE(include_background=False)(torch.zeros(1, 1, 2), one_hot_target(torch.zeros(1, 1, 2), 1, activation="sigmoid")),
            "A single foreground channel has no background",
        ),
        (lambda: accumulate_soft_bins(torch.zeros(3), torch.zeros(2), num_bins=2), "Expected `correct` of the shape of `confidence`"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
