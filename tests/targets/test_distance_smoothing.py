"""Distances and the smoothing that fades with them: arithmetic, loops, limits, millimetres."""

import math

import pytest
import reference_targets as reference
import torch
from cases import each_dimension, make_case

from densecal.losses import CompoundLoss, DeepSupervisionLoss
from densecal.ops import nearest_distance
from densecal.targets import DistanceSmoothingTarget, boundary_smoothing_target, distance_smoothing_target, label_smoothing_target, one_hot_target
from densecal.terms import CrossEntropy

BIG = {1: (40,), 2: (14, 13), 3: (9, 8, 7)}


def sparse(spatial, batch=2):
    """A few marked pixels."""
    generator = torch.Generator().manual_seed(4)
    return torch.rand(batch, *spatial, generator=generator) < 2 / math.prod(spatial)


def halves(spatial):
    """Two classes with a straight border, a third in a corner, some pixels ignored."""
    label_map = torch.zeros(2, *spatial, dtype=torch.long)
    label_map[:, spatial[0] // 2 :] = 1
    label_map[(1, *[slice(0, 2)] * len(spatial))] = 2
    label_map[(0, *[-1] * len(spatial))] = -100
    return label_map


@each_dimension
@pytest.mark.parametrize("spaced", [False, True], ids=["voxel", "mm"])
def test_distances_match_the_loops_up_to_the_limit(spatial, spaced):
    spatial, dims = BIG[len(spatial)], len(spatial)
    spacing = [2.0, 0.5, 1.0][:dims] if spaced else [1.0] * dims
    mask = sparse(spatial)
    expected = reference.distances(mask, spacing)
    reach = [2, 6, 4][:dims]
    limit = min(r * s for r, s in zip(reach, spacing, strict=True))
    found = nearest_distance(mask.unsqueeze(1), reach=reach, spacing=spacing if spaced else None, dtype=torch.float64)[:, 0]
    torch.testing.assert_close(found, expected.where(expected <= limit + 1e-9, math.inf))
    assert found.isinf().any()
    everything = nearest_distance(mask.unsqueeze(1), reach=120, spacing=spacing if spaced else None, dtype=torch.float64)[:, 0]
    torch.testing.assert_close(everything, expected)


def test_share_by_hand():
    probs = distance_smoothing_target(torch.tensor([[0, 0, 0, 1]]), 2, smoothing=0.4, scale=2.0).probs
    torch.testing.assert_close(probs[0, 1], torch.tensor([0.2 * math.exp(-1), 0.2 * math.exp(-0.5), 0.2, 0.8]))


@each_dimension
def test_target_matches_the_loops(spatial):
    spatial, dims = BIG[len(spatial)], len(spatial)
    label_map = halves(spatial)
    plain = one_hot_target(label_map, 3, spatial_dims=dims, dtype=torch.float64)
    far = reference.distances(reference.boundary(label_map, [3] * dims), [1.0] * dims)
    share = 0.3 * torch.exp(-far / 0.7) * (far <= 3)
    target = distance_smoothing_target(label_map, 3, smoothing=0.3, scale=0.7, spatial_dims=dims, dtype=torch.float64)
    torch.testing.assert_close(target.probs, reference.smoothed(plain.one_hot, plain.valid, share))


@each_dimension
def test_a_small_scale_is_boundary_smoothing_and_a_large_one_label_smoothing(spatial):
    label_map, dims = halves(BIG[len(spatial)]), len(spatial)
    small = distance_smoothing_target(label_map, 3, scale=1e-3, kernel_size=5, spatial_dims=dims).probs
    assert torch.equal(small, boundary_smoothing_target(label_map, 3, kernel_size=5, spatial_dims=dims).probs)
    large = distance_smoothing_target(label_map, 3, scale=1e9, reach=50, spatial_dims=dims).probs
    torch.testing.assert_close(large, label_smoothing_target(label_map, 3, smoothing=0.5, spatial_dims=dims).probs)


def test_a_volume_repeated_along_depth_is_its_slice():
    label_map = halves((14, 13))
    volume = label_map.unsqueeze(1).expand(-1, 3, -1, -1)
    flat, deep = (distance_smoothing_target(y, 3, spatial_dims=y.ndim - 1).probs for y in (label_map, volume))
    torch.testing.assert_close(deep, flat.unsqueeze(2).expand_as(deep))


def test_no_boundary_is_no_smoothing():
    label_map = torch.full((1, 5, 6), 2)
    assert torch.equal(distance_smoothing_target(label_map, 3).probs, one_hot_target(label_map, 3).probs)


def test_each_region_has_its_own_distances():
    regions = torch.tensor([[[0, 0, 0, 1], [1, 1, 1, 1]]])
    probs = distance_smoothing_target(regions, 2, activation="sigmoid", spatial_dims=1).probs
    torch.testing.assert_close(probs[0, 0], torch.tensor([0.25 * math.exp(-2), 0.25 * math.exp(-1), 0.25, 0.75]))
    assert probs[0, 1].tolist() == [1.0] * 4


def test_millimetres_follow_the_spacing_of_each_image():
    label_map = halves((14, 13))
    target = DistanceSmoothingTarget(unit="mm", scale=2.0, reach=6)
    assert target.needs == ("spacing",)
    probs = target(label_map, 3, context={"spacing": torch.tensor([[2.0, 2.0], [4.0, 4.0]])}).probs
    for i, scale in enumerate([1.0, 0.5]):
        alone = distance_smoothing_target(label_map[i : i + 1], 3, scale=scale, reach=6).probs
        torch.testing.assert_close(probs[i : i + 1], alone)


def test_loss_gives_no_gradient_at_ignored_pixels_and_the_right_one_elsewhere():
    case = make_case((3, 3))
    loss = CompoundLoss(DistanceSmoothingTarget(), {"ce": {"term": CrossEntropy()}})
    logits = case.logits.requires_grad_()
    loss(logits, case.label_map).backward()
    assert not logits.grad.movedim(1, -1)[~case.valid].any()
    assert torch.autograd.gradcheck(lambda z: loss(z, case.label_map), logits)


def test_loss_compiles_into_one_graph_and_follows_the_resolution():
    torch._dynamo.reset()
    case = make_case((4, 6), dtype=torch.float32)
    loss = CompoundLoss(DistanceSmoothingTarget(unit="mm", reach=1), {"ce": {"term": CrossEntropy()}})
    context = {"spacing": torch.tensor([1.0, 0.7])}
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.logits, case.label_map, context=context), loss(case.logits, case.label_map, context=context))
    assert DeepSupervisionLoss(loss)([case.logits, case.logits[..., ::2]], case.label_map, context=context).isfinite()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DistanceSmoothingTarget(smoothing=-0.1), r"Expected `smoothing` in \[0, 1\]"),
        (lambda: DistanceSmoothingTarget(scale=0.0), "Expected `scale` to be greater than 0"),
        (lambda: DistanceSmoothingTarget(kernel_size=2), "Expected `kernel_size` to be odd"),
        (lambda: DistanceSmoothingTarget(reach=0), "Expected `reach` to be 1 pixel or more"),
        (lambda: DistanceSmoothingTarget(unit="mm"), "Expected `reach` in pixels where the scale is in mm"),
        (lambda: DistanceSmoothingTarget(unit="cm"), "Expected `unit` to be one of"),
        (lambda: nearest_distance(torch.ones(1, 1, 4, dtype=torch.bool), reach=0), "Expected `reach` to be 1 pixel or more"),
        (lambda: nearest_distance(torch.ones(1, 1, 4, dtype=torch.bool), reach=1, spacing=[1.0, 2.0]), r"Expected `spacing` of shape \(1,\)"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
