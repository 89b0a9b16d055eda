"""Regions around a structure."""

import numpy as np
import pytest
import torch
from cases import each_dimension, make_case
from scipy.ndimage import binary_dilation, generate_binary_structure

from densecal.metrics import dilate, foreground_region


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
