"""Regions around a structure, and along boundaries."""

import itertools
import math

import numpy as np
import pytest
import torch
from cases import each_dimension, make_case
from scipy.ndimage import binary_dilation, generate_binary_structure

from densecal.metrics import boundary_band, boundary_distance, dilate, foreground_region

each_boundary_shape = pytest.mark.parametrize("spatial", [(23,), (9, 8), (4, 6, 5), (7, 1)], ids=["1d", "2d", "3d", "one-column"])


def blobs(spatial):
    """Two label maps of few boundaries, soft labels with the same largest class, and where they are valid."""
    generator = torch.Generator().manual_seed(0)
    soft_labels = torch.randn(2, 3, *spatial, generator=generator)
    for axis in range(2, soft_labels.ndim):
        soft_labels = soft_labels.cumsum(axis)
    soft_labels = soft_labels.softmax(1)
    valid = torch.rand(2, *spatial, generator=generator) > 0.1
    return soft_labels.argmax(1).masked_fill(~valid, -100), soft_labels.masked_fill(~valid.unsqueeze(1), -100.0), valid


def test_dilate_one_step_is_a_cross():
    region = torch.zeros(1, 5, 5, dtype=torch.bool)
    region[0, 2, 2] = True
    assert dilate(region, 1)[0].int().tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("radius", [0, 1, 3])
@pytest.mark.parametrize("spatial", [(17,), (13, 9), (9, 11, 7), (5, 1, 6)], ids=["1d", "2d", "3d", "3d-one-slice"])
def test_dilate_equals_scipy(spatial, radius):
    region = torch.rand(2, *spatial, generator=torch.Generator().manual_seed(0)) < 0.02
    region[:, *(size // 2 for size in spatial)] = True
    structure = generate_binary_structure(len(spatial), 1)
    for image, grown in zip(region.numpy(), dilate(region, radius).numpy(), strict=True):
        np.testing.assert_array_equal(grown, binary_dilation(image, structure, iterations=radius) if radius else image)


@each_dimension
def test_foreground_region_soft_and_hard_references_agree(spatial):
    case = make_case(spatial)
    label_map = case.soft_labels.argmax(1).masked_fill(~case.valid, -100)
    expected = foreground_region(label_map, radius=1)
    assert torch.equal(foreground_region(case.soft_labels, radius=1), expected)
    assert torch.equal(foreground_region(label_map.unsqueeze(1).float(), radius=1), expected)
    assert not (expected & ~case.valid).any()


def test_foreground_region_passes_through_ignored_pixels():
    region = foreground_region(torch.tensor([[1, 255, 0, 0]]), radius=2, ignore_index=255)
    assert region.tolist() == [[True, False, True, False]]


def test_foreground_region_other_background_and_nothing_there():
    assert foreground_region(torch.tensor([[2, 2, 0]]), radius=0, background=2).tolist() == [[False, False, True]]
    assert not foreground_region(torch.zeros(1, 4, 4, dtype=torch.uint8)).any()


def test_foreground_region_negative_radius():
    with pytest.raises(ValueError, match="Expected `radius` to be 0 or greater"):
        foreground_region(torch.zeros(1, 4, dtype=torch.long), radius=-1)


def distance_by_loop(label_map, valid, reach, spacing):
    """Every pixel against every boundary pixel; a boundary pixel touches, along an axis, a valid pixel of another class."""
    spatial, boundary = label_map.shape, []
    for at in itertools.product(*map(range, spatial)):
        for axis, step in itertools.product(range(len(spatial)), (-1, 1)):
            other = (*at[:axis], at[axis] + step, *at[axis + 1 :])
            if 0 <= other[axis] < spatial[axis] and valid[at] and valid[other] and label_map[at] != label_map[other]:
                boundary.append(at)
                break
    result = np.full(spatial, np.inf)
    for at in itertools.product(*map(range, spatial)):
        if valid[at]:
            nearest = min(
                (math.dist([a * s for a, s in zip(at, spacing, strict=True)], [b * s for b, s in zip(p, spacing, strict=True)]) for p in boundary),
                default=math.inf,
            )
            result[at] = nearest if nearest <= reach + 1e-9 else math.inf
    return result


@each_boundary_shape
@pytest.mark.parametrize("spaced", [False, True], ids=["pixels", "mm"])
@pytest.mark.parametrize("reach", [1, 2.5, 40])
def test_boundary_distance_equals_a_loop(spatial, spaced, reach):
    label_map, soft_labels, valid = blobs(spatial)
    spacing = torch.tensor([[0.7, 1.5, 3.1], [1.0, 0.4, 2.0]])[:, : len(spatial)] if spaced else None
    found = boundary_distance(label_map, reach=reach, spacing=spacing)
    assert found.dtype == torch.float32
    for i in range(2):
        steps = spacing[i].double().tolist() if spaced else [1.0] * len(spatial)
        np.testing.assert_allclose(found[i].numpy(), distance_by_loop(label_map[i].numpy(), valid[i].numpy(), reach, steps), rtol=1e-6)
    assert torch.equal(boundary_distance(soft_labels, reach=reach, spacing=spacing), found)
    assert torch.equal(boundary_distance(label_map.unsqueeze(1).float(), reach=reach, spacing=spacing), found)
    assert torch.equal(boundary_band(label_map, width=reach, spacing=spacing), (found < reach * (1 - 1e-6)) & valid)
    if spaced:  # the same spacing for all, and one image after the other
        assert torch.equal(boundary_distance(label_map[1:], reach=reach, spacing=spacing[1]), found[1:])


def test_boundary_distance_rounds_nothing_away_on_the_limit():
    # 3 * 0.1 is not 0.3 in any floating type.
    label = torch.tensor([[1, 0, 0, 0, 0, 0]])
    distance = boundary_distance(label, reach=0.3, spacing=[0.1])
    torch.testing.assert_close(distance, torch.tensor([[0, 0, 0.1, 0.2, 0.3, math.inf]]))
    assert boundary_band(label, width=0.3, spacing=[0.1]).tolist() == [[True, True, True, True, False, False]]


def test_boundary_distance_of_regions_is_that_of_any():
    regions = torch.tensor([[[0, 0, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]]])
    assert boundary_distance(regions, reach=9, activation="sigmoid").tolist() == [[1, 0, 0, 1, 1, 0, 0, 1]]
    shares = torch.where(regions == 1, 0.7, 0.4)
    assert boundary_distance(shares, reach=9, activation="sigmoid").tolist() == [[1, 0, 0, 1, 1, 0, 0, 1]]
    regions[0, 0, 1] = 255
    expected = [[5, math.inf, 3, 2, 1, 0, 0, 1]]
    assert boundary_distance(regions, reach=9, activation="sigmoid", ignore_index=255).tolist() == expected
    one = torch.tensor([[0, 1, 1, 0]])
    assert torch.equal(boundary_band(one.unsqueeze(1), width=1, activation="sigmoid"), boundary_band(one, width=1))


def test_boundary_one_class_or_nothing_has_none():
    for label in (torch.zeros(2, 4, 5, dtype=torch.uint8), torch.full((2, 4, 5), -100), torch.zeros(0, 4, 5, dtype=torch.long)):
        assert boundary_distance(label, reach=3).isinf().all()
        assert not boundary_band(label).any()


def test_boundary_errors():
    label = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="Expected `reach` to be greater than 0"):
        boundary_distance(label, reach=0)
    with pytest.raises(ValueError, match="Expected `width` to be greater than 0"):
        boundary_band(label, width=-1)
    with pytest.raises(ValueError, match="Expected `activation` to be one of"):
        boundary_band(label, activation="tanh")
    with pytest.raises(ValueError, match=r"Expected `spacing` of shape \(1,\)"):
        boundary_band(label, spacing=[1.0, 2.0])
    with pytest.raises(ValueError, match="Expected labels with 1 to 3 spatial dimensions"):
        boundary_distance(torch.zeros(1, 2, 3, 4, 5, 6, dtype=torch.long), reach=1)
