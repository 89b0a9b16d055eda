"""Label maps over images: readable over any picture, at its own size."""

import numpy as np
import pytest
import torch

from densecal.labels import LabelSchema
from densecal.report import label_overlay

STREET = LabelSchema(("sky", "road"), ignore_index=255, background=None, palette=((128, 128, 128), (128, 64, 128)))
STRUCTURE = LabelSchema(("background", "lesion"), palette=((0, 0, 0), (200, 0, 0)))


def test_label_overlay_fills_and_outlines_over_the_image_in_grey():
    image = np.full((9, 8, 3), (255, 0, 0), np.uint8)  # red: as bright as 0.299 of white
    label = np.zeros((9, 8), np.int64)
    label[:, 4:] = 1
    label[8] = 255
    picture = label_overlay(image, label, STREET)
    assert picture.shape == (9, 8, 3)
    assert picture.dtype == np.uint8
    for column, color in ((0, STREET.palette[0]), (7, STREET.palette[1])):
        assert picture[0, column].tolist() == [round(0.6 * c + 0.4 * 0.299 * 255) for c in color]
    assert picture[0, 3].tolist() == list(STREET.palette[0])
    assert picture[0, 4].tolist() == list(STREET.palette[1])
    assert {tuple(pixel) for pixel in picture[8].tolist()} == {(128, 128, 128), (158, 158, 158)}  # no class is striped


def test_label_overlay_leaves_the_background_as_it_is():
    image = torch.linspace(-1, 1, 30).view(5, 6)
    picture = label_overlay(image, torch.zeros(5, 6, dtype=torch.long), STRUCTURE)
    assert (picture == picture[..., :1]).all()
    assert picture[0, 0, 0] == 0
    assert picture[-1, -1, 0] == 255
    label = torch.zeros(5, 6, dtype=torch.long)
    label[2, 2] = 1
    changed = (label_overlay(image, label, STRUCTURE) != picture).any(-1)
    assert changed.sum() == 1
    assert label_overlay(image, label, STRUCTURE)[2, 2].tolist() == [200, 0, 0]


def test_label_overlay_draws_thicker_lines_in_larger_pictures():
    label = np.zeros((4, 2048), np.int64)
    label[:, 1024:] = 1
    row = label_overlay(np.zeros((4, 2048), np.uint8), label, STREET)[0]
    assert (row == STREET.palette[0]).all(-1).sum() == (row == STREET.palette[1]).all(-1).sum() == 3


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 5, 4), (5, 4)], ids=["channels-first", "channels", "size"])
def test_label_overlay_errors(shape):
    with pytest.raises(ValueError, match=r"Expected `image` \(H, W\) or \(H, W, 3\) and `label_map` \(H, W\) of the same size"):
        label_overlay(np.zeros(shape), np.zeros((4, 5), np.int64), STREET)


REGIONS = LabelSchema(("core", "whole"), 255, None, ((200, 0, 0), (0, 0, 200)), "sigmoid", ((2,), (1, 2)))


def test_label_overlay_of_regions_has_the_smaller_on_top_and_every_outline():
    whole, core = np.zeros((2, 24, 24), np.int64)
    whole[4:20, 4:20] = 1
    core[8:16, 8:22] = 1
    maps = np.stack([core, whole])
    maps[:, 0] = 255
    picture = label_overlay(np.full((24, 24), 255, np.uint8), maps, REGIONS)
    fill = {name: tuple(round(0.45 * c + 0.55 * 255) for c in color) for name, color in zip(REGIONS.names, REGIONS.palette, strict=True)}
    assert tuple(picture[6, 6]) == fill["whole"]
    assert tuple(picture[12, 12]) == fill["core"]
    assert tuple(picture[8, 12]) == (200, 0, 0)
    assert tuple(picture[12, 19]) == (0, 0, 200)  # the outline of the larger one, within the smaller
    assert tuple(picture[22, 2]) == (255, 255, 255)
    assert {tuple(pixel) for pixel in picture[0].tolist()} == {(128, 128, 128), (158, 158, 158)}
    with pytest.raises(ValueError, match=r"`label_map` \(2, H, W\) of the same size"):
        label_overlay(np.zeros((24, 24)), core, REGIONS)
