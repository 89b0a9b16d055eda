"""The same numbers as other packages give, wherever the definition is the same.

| here | there | tolerance | ignored pixels |
|---|---|---|---|
| top label: expected, root mean square, maximum | torchmetrics ``MulticlassCalibrationError`` l1, l2, max | 2e-6 | both |
| one sigmoid channel, classwise: the same three | torchmetrics ``BinaryCalibrationError`` | 2e-6 | both |
| classwise per class: the same three | torch-uncertainty ``ClasswiseCalibrationError`` | 2e-6 | dropped before |
| top label: the same three | torch-uncertainty ``CalibrationError`` | 2e-6 | dropped before |
| classwise, ``pooling="image"``: expected, average, maximum | MONAI ``CalibrationErrorMetric`` and its reductions | 2e-6 | MONAI has none |
| bins per image and class | MONAI ``calibration_binning`` | 2e-6 | MONAI has none |
| top label: expected, average, maximum | netcal ``ECE``, ``ACE`` (average), ``MCE`` | 1e-6 | dropped before |
| negative log-likelihood, Brier score | torch-uncertainty ``CategoricalNLL``, ``BrierScore`` | 2e-6 | dropped before |

torchmetrics, and torch-uncertainty, which computes with it, differ on purpose: they close bins below, [lower, upper), so that a confidence on an edge goes up
and not down as in the papers' (lower, upper], and they have a bin more than they were asked for, which holds the confidences of exactly 1 alone.
"""

from types import SimpleNamespace

import pytest
import torch
from cases import make_case

from densecal.metrics import brier_score, calibration_error, classwise_calibration_error, negative_log_likelihood
from densecal.ops.binning import accumulate_bins

NORMS = {"expected": "l1", "root_mean_square": "l2", "maximum": "max"}
REDUCTIONS = {"expected": "expected", "average": "average", "maximum": "maximum"}

each_shape = pytest.mark.parametrize("spatial", [(7, 9), (5, 6, 7)], ids=["2d", "3d"])
each_number_of_bins = pytest.mark.parametrize("num_bins", [5, 10, 15])


@pytest.fixture(scope="module")
def peers():
    """The other packages, imported once; that takes seconds."""
    import monai.metrics
    import netcal.metrics
    import torch_uncertainty.metrics
    import torchmetrics.classification

    return SimpleNamespace(
        torchmetrics=torchmetrics.classification,
        monai=monai.metrics,
        netcal=netcal.metrics,
        torch_uncertainty=torch_uncertainty.metrics,
    )


def sample(spatial, *, ignored=0.2, num_classes=4):
    case = make_case(spatial, num_classes=num_classes, batch=3, ignored=ignored, dtype=torch.float32)
    return case.logits.softmax(1), case.label_map


def pixels(probs, label):
    """The pixels that count, ``(P, C)`` and ``(P,)``, for those who know no ignored ones."""
    valid = (label != -100).flatten()
    return probs.movedim(1, -1).flatten(0, -2)[valid], label.flatten()[valid]


def close(ours, theirs, tolerance=2e-6):
    torch.testing.assert_close(ours.double(), torch.as_tensor(theirs).double(), atol=tolerance, rtol=0)


@each_shape
@each_number_of_bins
@pytest.mark.parametrize("measure", NORMS)
def test_top_label_equals_torchmetrics_and_torch_uncertainty(peers, spatial, num_bins, measure):
    probs, label = sample(spatial)
    ours = calibration_error(probs, label, measure=measure, num_bins=num_bins)
    theirs = peers.torchmetrics.MulticlassCalibrationError(4, n_bins=num_bins, norm=NORMS[measure], ignore_index=-100)
    close(ours, theirs(probs, label))
    theirs = peers.torch_uncertainty.CalibrationError(task="multiclass", num_classes=4, num_bins=num_bins, norm=NORMS[measure])
    close(ours, theirs(*pixels(probs, label)))


@each_shape
@each_number_of_bins
@pytest.mark.parametrize("measure", NORMS)
def test_sigmoid_equals_torchmetrics(peers, spatial, num_bins, measure):
    probs, label = sample(spatial, num_classes=2)
    ours = classwise_calibration_error(probs[:, 1:], label, activation="sigmoid", measure=measure, num_bins=num_bins)
    theirs = peers.torchmetrics.BinaryCalibrationError(n_bins=num_bins, norm=NORMS[measure], ignore_index=-100)
    close(ours, theirs(probs[:, 1], label))


@each_shape
@pytest.mark.parametrize("measure", NORMS)
def test_classwise_equals_torch_uncertainty(peers, spatial, measure):
    probs, label = sample(spatial)
    for average, reduction in (("macro", "mean"), ("none", "none")):
        ours = classwise_calibration_error(probs, label, measure=measure, average=average)
        theirs = peers.torch_uncertainty.classification.ClasswiseCalibrationError(4, num_bins=15, norm=NORMS[measure], reduction=reduction)
        close(ours, theirs(*pixels(probs, label)))


@each_shape
@each_number_of_bins
@pytest.mark.parametrize("measure", REDUCTIONS)
@pytest.mark.parametrize("background", [None, 0], ids=["all-classes", "no-background"])
def test_classwise_per_image_equals_monai(peers, spatial, num_bins, measure, background):
    probs, label = sample(spatial, ignored=0.0)
    one_hot = torch.nn.functional.one_hot(label, 4).movedim(-1, 1)
    options = {"measure": measure, "num_bins": num_bins, "pooling": "image"}
    for reduction, ours in (
        ("mean", classwise_calibration_error(probs, label, background=background, **options)),
        ("mean_batch", classwise_calibration_error(probs, label, average="none", **options)[0 if background is None else 1 :]),
    ):
        theirs = peers.monai.CalibrationErrorMetric(
            num_bins=num_bins, include_background=background is None, calibration_reduction=REDUCTIONS[measure], metric_reduction=reduction
        )
        theirs(y_pred=probs, y=one_hot)
        close(ours, theirs.aggregate().squeeze())


@each_shape
@each_number_of_bins
def test_bins_equal_monai(peers, spatial, num_bins):
    probs, label = sample(spatial, ignored=0.0)
    one_hot = torch.nn.functional.one_hot(label, 4).movedim(-1, 1)
    mean_p, mean_gt, count = peers.monai.calibration_binning(probs, one_hot, num_bins=num_bins)
    row = torch.arange(3 * 4).view(3, 4, 1)
    bins = accumulate_bins(probs.flatten(2), one_hot.bool().flatten(2), num_bins=num_bins, row=row, num_rows=12).view(3, 4, num_bins)
    torch.testing.assert_close(bins.count.double(), count.nan_to_num().double())
    torch.testing.assert_close(bins.mean_confidence.float(), mean_p, equal_nan=True, atol=2e-6, rtol=0)
    torch.testing.assert_close(bins.accuracy.float(), mean_gt, equal_nan=True, atol=2e-6, rtol=0)


@each_shape
@each_number_of_bins
@pytest.mark.parametrize(("measure", "name"), [("expected", "ECE"), ("average", "ACE"), ("maximum", "MCE")])
def test_top_label_equals_netcal(peers, spatial, num_bins, measure, name):
    probs, label = sample(spatial)
    theirs = getattr(peers.netcal, name)(num_bins).measure(*(x.numpy() for x in pixels(probs, label)))
    close(calibration_error(probs, label, measure=measure, num_bins=num_bins), theirs, tolerance=1e-6)


@each_shape
def test_scoring_rules_equal_torch_uncertainty(peers, spatial):
    probs, label = sample(spatial)
    close(negative_log_likelihood(probs, label), peers.torch_uncertainty.CategoricalNLL()(*pixels(probs, label)))
    close(brier_score(probs, label), peers.torch_uncertainty.BrierScore(4)(*pixels(probs, label)))


def test_torchmetrics_gives_certain_pixels_a_bin_of_their_own(peers):
    # Two pixels of confidence 0.9, both right, and two certain ones, one of them wrong. One bin: | 3/4 - 0.95 |; two: 2/4 |1 - 0.9| + 2/4 |1/2 - 1|.
    probs = torch.tensor([[[0.9, 0.9, 1.0, 1.0], [0.1, 0.1, 0.0, 0.0]]])
    label = torch.tensor([[0, 0, 0, 1]])
    theirs = peers.torchmetrics.MulticlassCalibrationError(2, n_bins=4)(probs, label)
    close(calibration_error(probs, label, num_bins=4), 0.2)
    close(theirs, 2 / 4 * 0.1 + 2 / 4 * 0.5)


def test_a_confidence_on_an_edge_goes_down_here_and_up_in_torchmetrics(peers):
    # Four bins. 0.75 (right) and 0.7 (wrong) share (0.5, 0.75] here: |1/2 - 0.725|. There 0.75 goes into [0.75, 1): 1/2 |1 - 0.75| + 1/2 |0 - 0.7|.
    probs = torch.tensor([[[0.75, 0.7], [0.25, 0.3]]])
    label = torch.tensor([[0, 1]])
    close(calibration_error(probs, label, num_bins=4), 0.225)
    up = 1 / 2 * 0.25 + 1 / 2 * 0.7
    close(peers.torchmetrics.MulticlassCalibrationError(2, n_bins=4)(probs, label), up)
    close(calibration_error(probs, label, num_bins=4), peers.netcal.ECE(4).measure(*(x.numpy() for x in pixels(probs, label))))  # netcal: down, too
    one_hot = torch.nn.functional.one_hot(label, 2).movedim(-1, 1)
    assert peers.monai.calibration_binning(probs, one_hot, num_bins=4)[2][0, 0, 2] == 2  # and MONAI
