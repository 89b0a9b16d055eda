"""Boundary label smoothing: arithmetic, loops, identities, ignored pixels and borders."""

import pytest
import reference_targets as reference
import torch
from cases import each_dimension, make_case

from densecal.losses import BoundarySmoothingLoss, LabelSmoothingLoss
from densecal.targets import BoundarySmoothingTarget, boundary_mask, boundary_smoothing_target, label_smoothing_target, one_hot_target

SIDES = {1: (5,), 2: (3, 5), 3: (3, 1, 5)}


def blocks(spatial, seed=0):
    """Labels with areas of one class, so that not every pixel is at a boundary; some pixels ignored."""
    label_map = make_case(spatial, ignored=0.0, seed=seed).label_map
    for axis in range(1, label_map.ndim):
        size = label_map.shape[axis]
        label_map = label_map.index_select(axis, torch.arange(size) // 4)
    label_map[(0, *[-1] * len(spatial))] = -100
    return label_map


def test_two_classes_by_hand():
    probs = boundary_smoothing_target(torch.tensor([[0, 0, 0, 1, 1]]), 2, smoothing=0.4).probs
    torch.testing.assert_close(probs[0, 1], torch.tensor([0.0, 0.0, 0.2, 0.8, 1.0]))


def test_the_outside_makes_no_boundary():
    assert not boundary_mask(torch.ones(1, 2, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)).any()
    label_map = torch.ones(1, 4, 4, dtype=torch.long)
    assert torch.equal(boundary_smoothing_target(label_map, 2).probs, one_hot_target(label_map, 2).probs)


def test_a_window_that_touches_an_ignored_pixel_stays_one_hot():
    target = boundary_smoothing_target(torch.tensor([[0, 1, 1, -100, 0, 1, 1]]), 2)
    torch.testing.assert_close(target.probs[0, 1], torch.tensor([0.25, 0.75, 1.0, 0.0, 0.0, 0.75, 1.0]))


@each_dimension
def test_matches_the_loops(spatial):
    dims = len(spatial)
    label_map = blocks(tuple(2 * s for s in spatial))
    expected = reference.boundary(label_map, SIDES[dims])
    plain = one_hot_target(label_map, 3, spatial_dims=dims, dtype=torch.float64)
    mask = boundary_mask(plain.one_hot, plain.valid, kernel_size=SIDES[dims])
    assert torch.equal(mask[:, 0], expected)
    assert expected.any()
    assert not expected.all()
    probs = boundary_smoothing_target(label_map, 3, smoothing=0.3, kernel_size=SIDES[dims], spatial_dims=dims, dtype=torch.float64).probs
    torch.testing.assert_close(probs, reference.smoothed(plain.one_hot, plain.valid, 0.3 * expected.double()))


def test_no_smoothing_is_the_labels_and_a_window_of_one_sees_no_boundary():
    case = make_case((5, 7))
    plain = one_hot_target(case.label_map, 3).probs
    assert torch.equal(boundary_smoothing_target(case.label_map, 3, smoothing=0.0).probs, plain)
    assert torch.equal(boundary_smoothing_target(case.label_map, 3, kernel_size=1).probs, plain)


def test_a_window_over_everything_is_label_smoothing():
    case = make_case((5, 7), ignored=0.0)
    probs = boundary_smoothing_target(case.label_map, 3, smoothing=0.1, kernel_size=15).probs
    torch.testing.assert_close(probs, label_smoothing_target(case.label_map, 3, smoothing=0.1).probs)
    torch.testing.assert_close(
        BoundarySmoothingLoss(smoothing=0.1, kernel_size=15)(case.logits, case.label_map), LabelSmoothingLoss()(case.logits, case.label_map)
    )


def test_a_volume_repeated_along_depth_is_its_slice():
    label_map = blocks((8, 9))
    volume = label_map.unsqueeze(1).expand(-1, 4, -1, -1)
    flat, deep = boundary_smoothing_target(label_map, 3).probs, boundary_smoothing_target(volume, 3).probs
    assert torch.equal(deep, flat.unsqueeze(2).expand_as(deep))


def test_class_permutation_permutes_the_target():
    label_map, order = blocks((8, 9)), torch.tensor([2, 0, 1])
    relabelled = torch.where(label_map >= 0, order[label_map.clamp_min(0)], label_map)
    torch.testing.assert_close(boundary_smoothing_target(relabelled, 3).probs[:, order], boundary_smoothing_target(label_map, 3).probs)


def test_soft_labels_change_where_their_largest_class_does():
    label_map = blocks((8, 9))
    plain = one_hot_target(label_map, 3)
    soft = torch.where(plain.valid.unsqueeze(1), 0.7 * plain.one_hot + 0.1, -100.0)
    target = one_hot_target(soft, 3)
    assert torch.equal(boundary_mask(target.one_hot, target.valid), boundary_mask(plain.one_hot, plain.valid))


def test_each_region_has_its_own_boundary():
    regions = torch.tensor([[[0, 0, 1, 1], [1, 1, 1, 1]]])
    probs = boundary_smoothing_target(regions, 2, activation="sigmoid", spatial_dims=1).probs
    torch.testing.assert_close(probs, torch.tensor([[[0.0, 0.25, 0.75, 1.0], [1.0, 1.0, 1.0, 1.0]]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BoundarySmoothingTarget(smoothing=1.5), r"Expected `smoothing` in \[0, 1\], but got 1.5"),
        (lambda: BoundarySmoothingTarget(kernel_size=4), "Expected `kernel_size` to be odd"),
        (lambda: BoundarySmoothingLoss(kernel_size=(3, 3))(torch.zeros(1, 2, 4), torch.zeros(1, 4).long()), "one per spatial axis"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
