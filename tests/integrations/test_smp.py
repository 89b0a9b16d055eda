"""smp's classes by their names, against their formulas written out (values compared with smp 0.6 when they were written)."""

import copy
import math
import pickle

import pytest
import torch
from cases import each_dimension, make_case
from torch.nn import functional as F

from densecal.integrations import smp
from densecal.losses import DiceSemimetricLoss, LabelSmoothingLoss

OVERLAP = {"DiceLoss": (0.5, 0.5), "JaccardLoss": (1.0, 1.0), "TverskyLoss": (0.3, 0.7)}
each_overlap = pytest.mark.parametrize("kind", OVERLAP)


def build(kind, mode, **options):
    alpha, beta = OVERLAP[kind]
    return getattr(smp, kind)(mode, **options, **({"alpha": alpha, "beta": beta} if kind == "TverskyLoss" else {}))


def labels_for(case, mode):
    """Predictions, label as given, labels (N, C, *), ignored pixels marked 255."""
    if mode == "multiclass":
        one_hot = F.one_hot(case.label_map.clamp_min(0), 3).movedim(-1, 1).double()
        return case.logits, case.label_map.masked_fill(~case.valid, 255), one_hot
    regions = (case.soft_labels > 0.3).long()
    if mode == "binary":
        regions = regions[:, :1]
        return case.logits[:, :1], regions[:, 0].masked_fill(~case.valid, 255), regions.double()
    return case.logits, regions.masked_fill(~case.valid.unsqueeze(1), 255), regions.double()


def overlap(probs, one_hot, valid, alpha, beta, *, smooth=0.0, log=False):
    """One value per channel, by the product form, which is right for hard labels."""
    values = []
    for c in range(probs.shape[1]):
        p, y = probs[:, c][valid], one_hot[:, c][valid]
        tp = (p * y).sum().item()
        fp, fn = p.sum().item() - tp, y.sum().item() - tp
        score = (tp + smooth) / (tp + alpha * fp + beta * fn + smooth)
        values.append(0.0 if y.sum() == 0 else -math.log(score) if log else 1 - score)
    return values


@each_dimension
@each_overlap
@pytest.mark.parametrize("mode", ["binary", "multiclass", "multilabel"])
@pytest.mark.parametrize("options", [{}, {"smooth": 1.0}, {"log_loss": True}], ids=["plain", "smooth", "log"])
def test_overlap(spatial, kind, mode, options):
    case = make_case(spatial)
    case.label_map[case.label_map == 2] = 1  # a class without a pixel adds 0 and counts
    logits, label, one_hot = labels_for(case, mode)
    probs = logits.softmax(1) if mode == "multiclass" else logits.sigmoid()
    values = overlap(probs, one_hot, case.valid, *OVERLAP[kind], smooth=options.get("smooth", 0.0), log=options.get("log_loss", False))
    expected = sum(values) / len(values)
    assert build(kind, mode, ignore_index=255, **options)(logits, label).item() == pytest.approx(expected, rel=1e-6)
    value = build(kind, mode, ignore_index=255, from_logits=False, **options)(probs, label)
    assert value.item() == pytest.approx(expected, rel=1e-6)


@each_overlap
def test_overlap_of_some_classes_with_weights(kind):
    case = make_case((5, 7))
    _, label, one_hot = labels_for(case, "multiclass")
    values = overlap(case.logits.softmax(1), one_hot, case.valid, *OVERLAP[kind])
    weighted = build(kind, "multiclass", ignore_index=255, classes=[0, 2], class_weights=[1.0, 5.0, 3.0])(case.logits, label)
    assert weighted.item() == pytest.approx((values[0] + 3 * values[2]) / 4)
    if kind == "TverskyLoss":
        power = build(kind, "multiclass", ignore_index=255, gamma=1.5)(case.logits, label)
        assert power.item() == pytest.approx((sum(values) / 3) ** 1.5)


def test_dice_is_the_semimetric_where_every_class_is_there():
    case = make_case((5, 7))
    expected = DiceSemimetricLoss(weight_ce=0.0, weight_dml=1.0, smooth=0.0)(case.logits, case.label_map)
    torch.testing.assert_close(smp.DiceLoss("multiclass")(case.logits, case.label_map), expected)


@each_overlap
def test_soft_labels_are_the_minimum(kind):
    case = make_case((5, 7))
    assert abs(build(kind, "multiclass")(case.soft_labels.clamp_min(1e-9).log(), case.soft_labels).item()) < 1e-12


@each_dimension
@pytest.mark.parametrize("mode", ["binary", "multiclass", "multilabel"])
@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 0.25, "gamma": 1.0}, {"normalized": True}, {"reduced_threshold": 0.4, "reduction": "sum"}],
    ids=["plain", "alpha", "normalized", "reduced"],
)
def test_focal(spatial, mode, options):
    case = make_case(spatial)
    logits, label, one_hot = labels_for(case, mode)
    values = []
    for c in range(logits.shape[1]):
        total, factors, count = 0.0, 0.0, 0
        for z, y in zip(logits[:, c][case.valid].tolist(), one_hot[:, c][case.valid].tolist(), strict=True):
            p = 1 / (1 + math.exp(-z if y else z))
            threshold = options.get("reduced_threshold")
            factor = 1.0 if threshold and p < threshold else ((1 - p) / (threshold or 1.0)) ** options.get("gamma", 2.0)
            alpha = options.get("alpha")
            total -= factor * math.log(p) * (1.0 if alpha is None else alpha if y else 1 - alpha)
            factors, count = factors + factor, count + 1
        total /= factors if options.get("normalized") else 1.0
        values.append(total if options.get("reduction") == "sum" else total / count)
    loss = smp.FocalLoss(mode, ignore_index=255, **options)
    assert loss(logits, label).item() == pytest.approx(sum(values) / len(values), rel=1e-6)


def test_focal_of_probabilities_and_with_weights():
    case = make_case((5, 7))
    logits, label, _ = labels_for(case, "multilabel")
    expected = smp.FocalLoss("multilabel", ignore_index=255)(logits, label)
    torch.testing.assert_close(smp.FocalLoss("multilabel", ignore_index=255, from_logits=False)(logits.sigmoid(), label), expected)
    # In multiclass mode smp reads log-probabilities as logits.
    logits, label, _ = labels_for(case, "multiclass")
    as_logits = smp.FocalLoss("multiclass", ignore_index=255)(logits.log_softmax(1), label)
    torch.testing.assert_close(smp.FocalLoss("multiclass", ignore_index=255, from_logits=False)(logits.softmax(1), label), as_logits)
    parts = [smp.FocalLoss("multiclass", ignore_index=255, class_weights=F.one_hot(torch.tensor(c), 3))(logits, label) for c in range(3)]
    weighted = smp.FocalLoss("multiclass", ignore_index=255, class_weights=[1.0, 2.0, 3.0])(logits, label)
    torch.testing.assert_close(weighted, (parts[0] + 2 * parts[1] + 3 * parts[2]) / 6)


def test_soft_cross_entropy_counts_valid_pixels_only():
    case = make_case((5, 7))
    expected = F.cross_entropy(case.logits, case.label_map, label_smoothing=0.1)
    loss = smp.SoftCrossEntropyLoss(smooth_factor=0.1)
    torch.testing.assert_close(loss(case.logits, case.label_map), expected)
    assert isinstance(loss, LabelSmoothingLoss)
    torch.testing.assert_close(smp.SoftCrossEntropyLoss()(case.logits, case.label_map), F.cross_entropy(case.logits, case.label_map))


LOSSES = {
    "tversky": lambda **options: smp.TverskyLoss("multiclass", gamma=1.5, **options),
    "log": lambda **options: smp.JaccardLoss("multiclass", classes=[0, 2], log_loss=True, **options),
    "focal": lambda **options: smp.FocalLoss("multiclass", gamma=1.5, **options),
    "normalized": lambda **options: smp.FocalLoss("multiclass", normalized=True, reduced_threshold=0.5, **options),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


@each_loss
def test_gradient_is_right_and_zero_at_ignored_pixels(name):
    case = make_case((2, 3), seed=3)
    logits = case.logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: LOSSES[name]()(z, case.label_map), logits)
    LOSSES[name]()(logits, case.label_map).backward()
    assert logits.grad is not None
    assert not case.valid.all()
    assert not logits.grad.movedim(1, -1)[~case.valid].any()


@each_loss
def test_copies_and_compilation(name):
    case = make_case((5, 7), dtype=torch.float32)
    loss = LOSSES[name](class_weights=[0.5, 1.0, 2.0])
    expected = loss(case.logits, case.label_map)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(case.logits, case.label_map), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(case.logits, case.label_map), expected)


@each_loss
def test_no_valid_pixel_is_zero_on_the_graph(name):
    case = make_case((5, 7), ignored=1.1)
    logits = case.logits.requires_grad_()
    value = LOSSES[name]()(logits, case.label_map)
    value.backward()
    assert abs(value.item()) < 1e-30
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: smp.DiceLoss("multi"), r"Expected `mode` to be one of \('binary', 'multiclass', 'multilabel'\), but got 'multi'"),
        (lambda: smp.DiceLoss("binary", classes=[0]), "Expected no `classes` in binary mode"),
        (lambda: smp.JaccardLoss("binary", class_weights=[1.0]), "Expected no `class_weights` in binary mode"),
        (lambda: smp.FocalLoss("binary", alpha=2.0), r"Expected `alpha` in \[0, 1\]"),
        (lambda: smp.FocalLoss("binary", reduction="none"), "Expected `reduction` to be one of"),
        (lambda: smp.SoftCrossEntropyLoss(dim=2), "Expected `dim` to be one of"),
        (lambda: smp.DiceLoss("binary")(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)), "Expected one channel in binary mode, but got 2"),
        (
            lambda: smp.DiceLoss("multiclass", class_weights=[1.0])(torch.zeros(1, 2, 3), torch.zeros(1, 3).long()),
            "one class weight for each of the 2",
        ),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
