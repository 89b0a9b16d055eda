"""Which slices are shown, and how."""

import numpy as np
import pytest

from densecal.labels import LabelSchema
from densecal.report.slices import ERROR_COLORS, PANELS, Example, slice_panels

SCHEMA = LabelSchema(("background", "lesion"), palette=((0, 0, 0), (200, 0, 0)))


def example(shape=(10, 12, 8), at=(7, 2, 5), spacing=(), **kwargs):
    label = np.zeros(shape, dtype=np.int64)
    label[at] = 1
    probs = np.stack([1.0 - label, label]).astype(np.float32)
    return Example("a", np.zeros(shape, np.float32), label, probs, spacing, **kwargs)


def test_slice_panels_go_through_the_structure():
    panels = slice_panels(example(axis_names=("sagittal", "coronal", "axial")), SCHEMA)
    assert [p.title for p in panels] == ["sagittal slice 8 of 10", "coronal slice 3 of 12", "axial slice 6 of 8"]
    for panel in panels:
        truth = panel.images[PANELS.index("Truth")]
        assert (truth == (200, 0, 0)).all(-1).any()  # outline in the palette
        assert (panel.images[0] == 0).all()


def test_slice_panels_orientation_second_axis_points_up():
    panel = slice_panels(example(shape=(8, 8, 8), at=(0, 6, 7)), SCHEMA)[0]  # across axis 1: columns axis 2, rows axis 3 from the bottom
    rows, columns = np.nonzero(panel.images[1].any(-1))
    height, width = panel.images[1].shape[:2]
    assert rows.max() < height / 8 + 1
    assert 6 / 8 * width - 1 <= columns.min() <= columns.max() <= 7 / 8 * width + 1


def test_slice_panels_respect_spacing():
    panels = slice_panels(example(spacing=(1.0, 0.5, 2.0)), SCHEMA)
    for panel, (width, height) in zip(panels, [(12 * 0.5, 8 * 2), (10 * 1, 8 * 2), (10 * 1, 12 * 0.5)], strict=True):
        h, w = panel.images[0].shape[:2]
        assert w / h == pytest.approx(width / height, rel=0.02)


def test_slice_panels_of_a_thin_slab_shows_its_wide_plane():
    panels = slice_panels(example(shape=(40, 3, 40), at=(20, 1, 20)), SCHEMA)
    assert [p.title for p in panels] == ["slice 2 of 3 across axis 2"]


def test_slice_panels_of_an_image():
    panels = slice_panels(example(shape=(6, 9), at=(0, 8)), SCHEMA)
    assert len(panels) == 1
    truth = panels[0].images[1]
    assert truth.shape[1] == 320
    assert truth[0, -1].any()  # rows from top to bottom
    assert not truth[-1, 0].any()


def test_slice_panels_without_structure_show_the_middle():
    empty = example()
    assert slice_panels(Example("a", empty.image, np.zeros_like(empty.label), np.stack([np.ones((10, 12, 8)), np.zeros((10, 12, 8))])), SCHEMA)[
        0
    ].title == ("slice 6 of 10 across axis 1")


def test_slice_panels_ignored_is_grey_in_hard_and_soft_references():
    shape = (6, 9)
    hard = np.full(shape, SCHEMA.ignore_index)
    soft = np.zeros((2, *shape), np.float32)
    for label in (hard, soft):
        panel = slice_panels(Example("a", np.zeros(shape), label, np.full((2, *shape), 0.5)), SCHEMA)[0]
        assert (panel.images[1] == 128).all()


def test_slice_panels_errors_stand_out_by_confidence():
    label = np.array([[0, 0, 0, SCHEMA.ignore_index]])
    lesion = np.array([[0.1, 0.6, 0.95, 0.95]])  # right, wrong in doubt, wrong and sure, ignored
    panel = slice_panels(Example("a", np.ones((1, 4)), label, np.stack([1 - lesion, lesion])), SCHEMA)[0]
    picture = panel.images[PANELS.index("Error")].astype(int)
    right, doubtful, sure, ignored = (picture[0, picture.shape[1] * (2 * i + 1) // 8] for i in range(4))
    assert len({*right}) == 1  # grey
    assert tuple(sure) == tuple(ERROR_COLORS["wrong with a confidence above 0.9"])
    assert abs(doubtful - ERROR_COLORS["wrong"]).max() < 40
    assert tuple(ignored) == (128, 128, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((1, 4, 4, 4))}, "2 or 3 spatial dimensions"),
        ({"probs": np.zeros((3, 4, 4))}, "Expected `probs` of 'a' of shape \\(2, 4, 4\\)"),
        ({"label": np.zeros((4, 5))}, "Expected `label` of 'a'"),
        ({"spacing": (1.0,)}, "Expected `spacing` of 'a' with 2 values"),
    ],
    ids=["image", "probs", "label", "spacing"],
)
def test_slice_panels_errors(change, message):
    fields = {"image": np.zeros((4, 4)), "label": np.zeros((4, 4)), "probs": np.zeros((2, 4, 4)), "spacing": (1.0, 1.0)} | change
    with pytest.raises(ValueError, match=message):
        slice_panels(Example("a", **fields), SCHEMA)
