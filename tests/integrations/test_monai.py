"""MONAI's classes by their names: values and gradients against MONAI itself."""

import copy
import pickle

import pytest
import torch
from cases import make_case

from densecal.integrations import monai as ours
from densecal.losses import NACLLoss

theirs = pytest.importorskip("monai.losses")

SHAPES = {"2d": (7, 9), "3d": (5, 6, 7)}
each_shape = pytest.mark.parametrize("spatial", SHAPES.values(), ids=SHAPES.keys())


def agree(mine, other, logits, target, *, target_of_other=None, tolerance=1e-6):
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value, expected = mine(a, target), other(b, target if target_of_other is None else target_of_other)
    torch.testing.assert_close(value, expected.to(value.dtype), rtol=tolerance, atol=tolerance)
    value.sum().backward()
    expected.sum().backward()
    assert b.grad is not None
    torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance * b.grad.abs().max().item())


# --- neighbour-aware calibration loss ---


@each_shape
@pytest.mark.parametrize("distance_type", ["l1", "l2"])
@pytest.mark.parametrize(
    "options",
    [{}, {"kernel_size": 5, "alpha": 0.3}, {"kernel_ops": "gaussian"}, {"kernel_ops": "gaussian", "sigma": 0.6, "kernel_size": 7}],
    ids=["mean", "mean-k5", "gaussian", "narrow"],
)
def test_nacl(spatial, distance_type, options):
    case = make_case(spatial, ignored=0.0)
    arguments = {"classes": 3, "dim": len(spatial), "distance_type": distance_type, **options}
    agree(ours.NACLLoss(**arguments), theirs.NACLLoss(**arguments), case.logits, case.label_map)


def test_nacl_takes_its_arguments_by_position():
    case = make_case((7, 9), ignored=0.0)
    arguments = (3, 2, 5, "gaussian", "l2", 0.2, 1.5)
    agree(ours.NACLLoss(*arguments), theirs.NACLLoss(*arguments), case.logits, case.label_map)


@each_shape
@pytest.mark.parametrize("kernel_ops", ["mean", "gaussian"])
def test_our_own_nacl_takes_monais_arguments(spatial, kernel_ops):
    case = make_case(spatial, ignored=0.0)
    arguments = (3, len(spatial), 3, kernel_ops, "l2", 0.2, 1.5)
    agree(NACLLoss(*arguments, padding_mode="zeros"), theirs.NACLLoss(*arguments), case.logits, case.label_map)


def test_an_argument_is_not_given_under_both_its_names():
    for options, message in [
        ({"weight": 0.3, "alpha": 0.2}, "Expected one of `weight` and `alpha`, which are the same, but got 0.3 and 0.2"),
        ({"distance": "l2", "distance_type": "l1"}, "Expected one of `distance` and `distance_type`"),
        ({"border": "renormalize", "padding_mode": "zeros"}, "Expected one of `border` and `padding_mode`"),
        ({"kernel": "svls", "kernel_ops": "mean"}, "Expected one of `kernel` and `kernel_ops`"),
        ({"kernel_ops": "gaussian"}, "Expected `border` to be 'zeros' with MONAI's kernel_ops='gaussian', but got 'replicate'"),
        ({"kernel_ops": "box"}, "Expected `kernel` to be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            NACLLoss(**options)
    with pytest.raises(ValueError, match=r"Expected logits that fit classes=4, but got \(1, 3, 5\)"):
        NACLLoss(classes=4)(torch.zeros(1, 3, 5), torch.zeros(1, 5, dtype=torch.long))


def test_nacl_leaves_ignored_pixels_out():
    case = make_case((7, 9))
    for kernel_ops in ("mean", "gaussian"):
        logits = case.logits.clone().requires_grad_()
        loss = ours.NACLLoss(3, 2, kernel_ops=kernel_ops)
        loss(logits, case.label_map).backward()
        assert logits.grad is not None
        assert not logits.grad.movedim(1, -1)[~case.valid].any()
        dirty = torch.where(case.valid.unsqueeze(1), case.logits, torch.nan)
        assert torch.equal(loss(dirty, case.label_map), loss(case.logits, case.label_map))


# --- overlap ---

OVERLAP = {
    "default": {},
    "no-background": {"include_background": False},
    "batch": {"batch": True},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "batch-none": {"reduction": "none", "batch": True},
    "smooth": {"smooth_nr": 0.0, "smooth_dr": 1.0},
}
DICE = {
    **OVERLAP,
    "jaccard": {"jaccard": True, "smooth_nr": 2.0, "smooth_dr": 1e-3},
    "squared": {"squared_pred": True},
    "weight": {"weight": [0.5, 2.0, 1.0], "batch": True},
    "one-weight": {"weight": 3.0},
    "foreground-weight": {"weight": [0.5, 2.0], "include_background": False},
}
TVERSKY = {**OVERLAP, "alpha": {"alpha": 0.3, "beta": 0.7, "smooth_nr": 0.5}}
LOSSES = [("DiceLoss", name, options) for name, options in DICE.items()] + [("TverskyLoss", name, options) for name, options in TVERSKY.items()]
each_overlap = pytest.mark.parametrize(("kind", "options"), [(k, o) for k, _, o in LOSSES], ids=[f"{k}-{n}" for k, n, _ in LOSSES])


@each_shape
@each_overlap
def test_overlap_of_a_label_map(spatial, kind, options):
    case = make_case(spatial, ignored=0.0)
    arguments = {"softmax": True, "to_onehot_y": True, **options}
    agree(getattr(ours, kind)(**arguments), getattr(theirs, kind)(**arguments), case.logits, case.label_map.unsqueeze(1))


@each_overlap
def test_overlap_of_soft_labels(kind, options):
    case = make_case((7, 9), ignored=0.0)
    arguments = {"softmax": True, "soft_label": True, **options}
    agree(getattr(ours, kind)(**arguments), getattr(theirs, kind)(**arguments), case.logits, case.soft_labels)
    # The form is the right one whatever `soft_label` says.
    torch.testing.assert_close(
        getattr(ours, kind)(softmax=True, **options)(case.logits, case.soft_labels), getattr(ours, kind)(**arguments)(case.logits, case.soft_labels)
    )


@pytest.mark.parametrize("kind", ["DiceLoss", "TverskyLoss"])
def test_overlap_of_regions_probabilities_and_one_channel(kind):
    mine, other = getattr(ours, kind), getattr(theirs, kind)
    case = make_case((7, 9), ignored=0.0)
    regions = (case.soft_labels > 0.3).double()
    agree(mine(sigmoid=True), other(sigmoid=True), case.logits, regions)
    agree(mine(other_act=torch.special.ndtr), other(other_act=torch.special.ndtr), case.logits, regions)
    agree(mine(), other(), case.logits.sigmoid(), regions)
    assert torch.equal(mine(sigmoid=True)(case.logits, regions.long()), mine(sigmoid=True)(case.logits, regions))
    one = regions[:, :1]
    with pytest.warns(UserWarning, match="single channel prediction"):
        agree(mine(sigmoid=True, to_onehot_y=True), other(sigmoid=True, to_onehot_y=True), case.logits[:, :1], one)


@each_shape
@pytest.mark.parametrize("kind", ["DiceLoss", "TverskyLoss"])
def test_overlap_with_ignored_pixels(spatial, kind):
    case = make_case(spatial)
    label_map = case.label_map.masked_fill(~case.valid, 255).unsqueeze(1)
    arguments = {"softmax": True, "to_onehot_y": True, "ignore_index": 255}
    agree(getattr(ours, kind)(**arguments), getattr(theirs, kind)(**arguments), case.logits, label_map)


def test_image_without_a_valid_pixel_is_not_averaged():
    case = make_case((7, 9))
    case.label_map[1] = -100
    loss = ours.DiceLoss(softmax=True, to_onehot_y=True, smooth_nr=0.0)
    torch.testing.assert_close(loss(case.logits, case.label_map.unsqueeze(1)), loss(case.logits[:1], case.label_map[:1].unsqueeze(1)))


def test_soft_labels_are_the_minimum():
    case = make_case((7, 9), ignored=0.0)
    for loss in (ours.DiceLoss(softmax=True), ours.TverskyLoss(softmax=True)):
        assert abs(loss(case.soft_labels.log(), case.soft_labels).item()) < 1e-12


# --- Dice and cross-entropy ---


@each_shape
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"include_background": False, "batch": True, "lambda_dice": 0.3, "lambda_ce": 2.0},
        {"jaccard": True, "label_smoothing": 0.2},
        {"weight": torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), "squared_pred": True},
        {"weight": torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), "include_background": False},
    ],
    ids=["default", "sum", "no-background", "jaccard", "weight", "foreground-weight"],
)
def test_dice_ce(spatial, options):
    case = make_case(spatial, ignored=0.0)
    arguments = {"softmax": True, "to_onehot_y": True, **options}
    agree(ours.DiceCELoss(**arguments), theirs.DiceCELoss(**arguments), case.logits, case.label_map.unsqueeze(1))
    arguments = {"softmax": True, **options}
    one_hot = torch.nn.functional.one_hot(case.label_map, 3).movedim(-1, 1).double()
    agree(ours.DiceCELoss(**arguments), theirs.DiceCELoss(**arguments), case.logits, one_hot)


def test_dice_ce_of_one_channel_and_of_regions():
    case = make_case((7, 9), ignored=0.0)
    regions = (case.soft_labels > 0.3).double()
    agree(ours.DiceCELoss(sigmoid=True), theirs.DiceCELoss(sigmoid=True), case.logits, regions)
    weight = torch.tensor([3.0], dtype=torch.float64)
    one = (case.logits[:, :1], regions[:, :1])
    agree(ours.DiceCELoss(sigmoid=True, weight=weight), theirs.DiceCELoss(sigmoid=True, weight=weight), *one)


# --- all ---


@pytest.mark.parametrize(
    "loss",
    [ours.NACLLoss(3, 2, kernel_ops="gaussian"), ours.DiceCELoss(softmax=True, to_onehot_y=True), ours.TverskyLoss(softmax=True, to_onehot_y=True)],
    ids=["nacl", "dice-ce", "tversky"],
)
def test_copies_half_precision_and_compilation(loss):
    case = make_case((7, 9), dtype=torch.float32)
    label_map = case.label_map.unsqueeze(1)
    expected = loss(case.logits, label_map)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(case.logits, label_map), expected)
    half = case.logits.bfloat16()
    torch.testing.assert_close(loss(half, label_map), loss(half.float(), label_map))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(case.logits, label_map), expected)


@pytest.mark.parametrize("kind", ["DiceLoss", "DiceCELoss", "TverskyLoss"])
def test_no_valid_pixel_is_zero_on_the_graph(kind):
    case = make_case((7, 9), ignored=1.1)
    logits = case.logits.requires_grad_()
    value = getattr(ours, kind)(softmax=True, to_onehot_y=True)(logits, case.label_map.unsqueeze(1))
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_wrong_options_are_named():
    case = make_case((7, 9), ignored=0.0)
    with pytest.raises(ValueError, match="Expected at most one of `sigmoid`, `softmax` and `other_act`"):
        ours.DiceLoss(sigmoid=True, softmax=True)
    with pytest.raises(TypeError, match="Expected `other_act` to be a function"):
        ours.DiceLoss(other_act="tanh")
    with pytest.raises(ValueError, match="Expected 2 values in `weight`, one per counted channel, but got 3"):
        ours.DiceLoss(softmax=True, to_onehot_y=True, include_background=False, weight=[1.0, 1.0, 1.0])(case.logits, case.label_map.unsqueeze(1))
    with pytest.raises(ValueError, match="Set `to_onehot_y=True` for a label map"):
        ours.DiceLoss(softmax=True)(case.logits, case.label_map.unsqueeze(1))
    with pytest.raises(ValueError, match="Expected logits of 4 classes and 2 spatial dimensions"):
        ours.NACLLoss(4, 2)(case.logits, case.label_map)
    with pytest.raises(ValueError, match="Expected `kernel_ops` to be one of"):
        ours.NACLLoss(3, 2, kernel_ops="svls")
    with pytest.raises(ValueError, match=r"Expected `label_smoothing` in \[0, 1\]"):
        ours.DiceCELoss(label_smoothing=2.0)
