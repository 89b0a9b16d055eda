"""Boundary pixels: loops, ignored pixels, borders."""

import itertools

import pytest
import torch
from cases import each_dimension, make_case

from densecal.ops import boundary_region, face_boundary


@each_dimension
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_boundary_matches_the_loops(spatial, kernel_size):
    case = make_case(spatial)
    found = boundary_region(case.label_map.unsqueeze(1).double(), case.valid, kernel_size=kernel_size)
    reach = kernel_size // 2
    for image, *x in itertools.product(range(2), *map(range, spatial)):
        window = itertools.product(*(range(max(a - reach, 0), min(a + reach + 1, side)) for a, side in zip(x, spatial, strict=True)))
        labels = {case.label_map[(image, *y)].item() for y in window} - {-100}
        assert found[(image, 0, *x)].item() == (case.valid[(image, *x)].item() and len(labels) > 1)


def test_channels_of_one_hot_labels_say_the_same():
    case = make_case((5, 7))
    one_hot = torch.nn.functional.one_hot(case.label_map.clamp_min(0), 3).movedim(-1, 1).double()
    by_number = boundary_region(case.label_map.unsqueeze(1).double(), case.valid)
    assert torch.equal(boundary_region(one_hot, case.valid).any(1, keepdim=True), by_number)


def test_window_may_differ_per_axis():
    labels = torch.tensor([[[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]]])
    valid = torch.ones(1, 2, 3, dtype=torch.bool)
    assert boundary_region(labels, valid, kernel_size=(3, 1)).all()
    assert not boundary_region(labels, valid, kernel_size=(1, 3)).any()
    with pytest.raises(ValueError, match="Expected `kernel_size` to be odd"):
        boundary_region(labels, valid, kernel_size=2)


@each_dimension
def test_face_boundary_is_the_window_of_three_along_each_axis(spatial):
    case = make_case(spatial)
    labels = case.label_map.unsqueeze(1)
    expected = torch.zeros_like(labels, dtype=torch.bool)
    for axis in range(len(spatial)):
        window = [3 if other == axis else 1 for other in range(len(spatial))]
        expected |= boundary_region(labels.double(), case.valid, kernel_size=window)
    assert torch.equal(face_boundary(labels, case.valid), expected)


def test_face_boundary_corners_do_not_touch():
    labels = torch.tensor([[[[0, 0, 0], [0, 1, 0], [0, 0, 0]]]])
    valid = torch.ones(1, 3, 3, dtype=torch.bool)
    assert face_boundary(labels, valid)[0, 0].int().tolist() == [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
