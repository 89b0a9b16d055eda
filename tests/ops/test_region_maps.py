"""Regions of label maps and of shares, against a loop over the pixels."""

import itertools

import pytest
import torch

from densecal.labels import LabelSchema
from densecal.ops import region_maps

REGIONS = ((1, 3), (3,), (0, 2, 3))
SCHEMA = LabelSchema(("a", "b", "c"), 255, None, activation="sigmoid", regions=REGIONS)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8])
@pytest.mark.parametrize("spatial", [(7,), (5, 4), (3, 2, 4)], ids=["1d", "2d", "3d"])
def test_region_maps_of_a_label_map(spatial, dtype):
    label = torch.randint(0, 5, (2, 1, *spatial), generator=torch.Generator().manual_seed(0))
    label = torch.where(label == 4, 255, label).to(dtype)
    maps = region_maps(label, SCHEMA)
    assert maps.shape == (2, 3, *spatial)
    assert maps.dtype == torch.int32
    for place in itertools.product(range(2), *map(range, spatial)):
        n, *x = place
        value = int(label[n, 0, *x])
        expected = [255] * 3 if value == 255 else [int(value in classes) for classes in REGIONS]
        assert maps[n, :, *x].tolist() == expected


def test_region_maps_of_shares():
    shares = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]).T[None]  # (1, 4, 3 pixels)
    expected = [[0.375, 255.0, 1.0], [0.125, 255.0, 0.0], [0.75, 255.0, 0.0]]
    assert region_maps(shares, SCHEMA)[0].tolist() == expected


def test_region_maps_of_classes_is_the_label_itself():
    label = torch.zeros(1, 1, 3)
    assert region_maps(label, LabelSchema(("a", "b"))) is label
    assert region_maps(label, LabelSchema(("own maps",), background=None, activation="sigmoid")) is label


@pytest.mark.parametrize("label", [torch.zeros(1, 3, 5), torch.zeros(1, 2, 5, dtype=torch.long)], ids=["few-shares", "channels"])
def test_region_maps_errors(label):
    with pytest.raises(ValueError, match=r"Expected (one share for each class|a label map of shape)"):
        region_maps(label, SCHEMA)
