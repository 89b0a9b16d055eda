"""Which slices are shown, and how."""

import numpy as np
import pytest
from matplotlib import colormaps

from densecal.labels import LabelSchema
from densecal.report.slices import AGREEMENT, CONFIDENCE_COLORMAP, ERROR_COLORS, PANELS, Example, example_figure, slice_panels

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


def test_slice_panels_of_a_colour_image_and_volume():
    image = np.zeros((320, 480, 3), np.uint8)
    image[:, :240] = (10, 200, 30)
    (panel,) = slice_panels(Example("a", image, np.zeros((320, 480), np.int64), np.full((2, 320, 480), 0.5)), SCHEMA)
    assert panel.wide
    assert (panel.images[0] == image).all()  # as stored
    assert (panel.images[1] == panel.images[1][..., :1]).all()  # grey under the overlay
    assert panel.data_url(0).startswith("data:image/jpeg;base64,")

    volume = example()
    colored = np.broadcast_to(np.array([255, 0, 0], np.uint8), (10, 12, 8, 3))
    panels = slice_panels(Example("a", colored, volume.label, volume.probs), SCHEMA)
    assert len(panels) == 3
    for panel in panels:
        assert (panel.images[0] == (255, 0, 0)).all()


@pytest.mark.parametrize(("shape", "size"), [((1024, 2048), (256, 512)), ((360, 480), (360, 480)), ((40, 30), (320, 240))])
def test_slice_panels_of_an_image_have_its_aspect_and_a_moderate_size(shape, size):
    (panel,) = slice_panels(Example("a", np.zeros((*shape, 3), np.uint8), np.zeros(shape, np.int64), np.full((2, *shape), 0.5)), SCHEMA)
    assert {image.shape for image in panel.images} == {(*size, 3)}


def test_slice_panels_shrink_an_image_by_its_mean():
    stripes = np.zeros((1024, 1024), np.uint8)
    stripes[::2] = 200
    (panel,) = slice_panels(Example("a", stripes, np.zeros((1024, 1024), np.int64), np.full((2, 1024, 1024), 0.5)), SCHEMA)
    assert (panel.images[0] == 100).all()


def test_example_figure_shows_a_wide_image_in_two_rows():
    image = np.zeros((20, 40, 3), np.uint8)
    wide = Example("a", image, np.zeros((20, 40), np.int64), np.full((2, 20, 40), 0.5))
    shown = {len(axes.images) for axes in example_figure(slice_panels(wide, SCHEMA), SCHEMA, "a").axes}
    figure = example_figure(slice_panels(wide, SCHEMA), SCHEMA, "a")
    assert [axes.get_title() for axes in figure.axes if axes.images] == list(PANELS)
    assert shown == {0, 1}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["lesion", "ignored", *ERROR_COLORS]


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
        assert set(np.unique(panel.images[1])) == {128, 158}  # stripes: a class may be grey


def test_slice_panels_errors_stand_out_by_confidence():
    label = np.array([[0, 0, 0, SCHEMA.ignore_index]])
    lesion = np.array([[0.1, 0.6, 0.95, 0.95]])  # right, wrong in doubt, wrong and sure, ignored
    panel = slice_panels(Example("a", np.ones((1, 4)), label, np.stack([1 - lesion, lesion])), SCHEMA)[0]
    picture = panel.images[PANELS.index("Error")].astype(int)
    right, doubtful, sure, ignored = (picture[0, picture.shape[1] * (2 * i + 1) // 8] for i in range(4))
    assert len({*right}) == 1  # grey
    assert tuple(sure) == tuple(ERROR_COLORS["wrong with a confidence above 0.9"])
    assert abs(doubtful - ERROR_COLORS["wrong"]).max() < 40
    assert tuple(ignored) in ((128, 128, 128), (158, 158, 158))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((3, 4, 4))}, r"image of 'a' of shape \(4, 4\) or, in colour, \(4, 4, 3\), but got \(3, 4, 4\)"),
        ({"probs": np.zeros((3, 4, 4))}, r"Expected `probs` of 'a' of shape \(2, \*spatial\)"),
        ({"label": np.zeros((4, 5))}, "Expected `label` of 'a'"),
        ({"spacing": (1.0,)}, "Expected `spacing` of 'a' with 2 values"),
    ],
    ids=["image", "probs", "label", "spacing"],
)
def test_slice_panels_errors(change, message):
    fields = {"image": np.zeros((4, 4)), "label": np.zeros((4, 4)), "probs": np.zeros((2, 4, 4)), "spacing": (1.0, 1.0)} | change
    with pytest.raises(ValueError, match=message):
        slice_panels(Example("a", **fields), SCHEMA)


@pytest.mark.parametrize("shape", [(6, 9), (6, 9, 7)], ids=["2d", "3d"])
def test_slice_panels_of_a_soft_reference_show_where_raters_agree(shape):
    """Agreement has the colours that the same confidence has; where the reference says nothing it is striped."""
    shares = np.zeros((2, *shape), np.float32)
    shares[0] = 1
    shares[:, 2] = 0.5
    probs = shares.copy()
    shares[:, 4] = 0
    panels = slice_panels(Example("a", np.zeros(shape, np.float32), shares, probs), SCHEMA)
    assert {panel.names for panel in panels} == {("Image", "Truth", "Prediction", AGREEMENT, "Confidence", "Error")}
    for panel in panels[-2:]:  # across the other axes: this one has the stripes in it
        agreement, confidence = panel.images[3], panel.images[4]
        same = (agreement == confidence).all(-1)
        assert 0.5 < same.mean() < 1
        assert len(np.unique(agreement.reshape(-1, 3), axis=0)) > 2
    assert len(example_figure(panels, SCHEMA, "a").axes) >= 6 * len(panels)
    hard = slice_panels(Example("a", np.zeros(shape, np.float32), shares.argmax(0), probs), SCHEMA)
    assert hard[0].names == PANELS


REGIONS = LabelSchema(("core", "whole"), 255, None, ((200, 0, 0), (0, 0, 200)), "sigmoid")


def test_slice_panels_of_regions():
    """Per pixel: both right, one wrong in doubt, one wrong and sure, ignored. Confidence is that of the region in doubt."""
    label = np.array([[[0, 0, 0, 255]], [[1, 1, 1, 255]]])
    probs = np.array([[[0.1, 0.6, 0.1, 0.5]], [[0.8, 0.99, 0.05, 0.5]]])
    for reference in (label, label.astype(np.float32)):
        panel = slice_panels(Example("a", np.ones((1, 4)), reference, probs), REGIONS)[0]
        pictures = {
            name: [image[0, image.shape[1] * (2 * i + 1) // 8].astype(int) for i in range(4)]
            for name, image in zip(panel.names, panel.images, strict=True)
        }
        right, doubtful, sure, ignored = pictures["Error"]
        assert len({*right}) == 1
        assert abs(doubtful - ERROR_COLORS["wrong"]).max() < 40
        assert tuple(sure) == tuple(ERROR_COLORS["wrong with a confidence above 0.9"])
        assert tuple(ignored) in ((128, 128, 128), (158, 158, 158))
        low = np.array(colormaps[CONFIDENCE_COLORMAP](0.2)[:3]) * 255  # 0.6, between 0.5 and 1
        assert abs(pictures["Confidence"][1] - low).max() <= 1
    figure = example_figure([panel], REGIONS, "a")
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["core", "whole"]


def test_agreement_on_regions_is_that_on_the_one_in_doubt():
    """Per pixel: all raters agree on both regions, half see the first, a quarter do not see the second, ignored."""
    label = np.array([[[0, 0.5, 1, 255]], [[1, 1, 0.75, 255]]], np.float32)
    panel = slice_panels(Example("a", np.ones((1, 4)), label, np.full((2, 1, 4), 0.5)), REGIONS)[0]
    assert panel.names == ("Image", "Truth", "Prediction", AGREEMENT, "Confidence", "Error")
    agreement = [panel.images[3][0, panel.images[3].shape[1] * (2 * i + 1) // 8].astype(int) for i in range(4)]
    for found, share in zip(agreement, (1.0, 0.5, 0.75), strict=False):
        expected = np.array(colormaps[CONFIDENCE_COLORMAP](2 * share - 1)[:3]) * 255
        assert abs(found - expected).max() <= 1
    assert tuple(agreement[3]) in ((128, 128, 128), (158, 158, 158))


def test_slice_panels_of_a_region_go_through_it():
    volume, schema = example(), LabelSchema(("lesion",), background=None, activation="sigmoid")
    panels = slice_panels(Example("a", volume.image, volume.label[None], volume.probs[1:]), schema)
    assert [panel.title for panel in panels] == [panel.title for panel in slice_panels(volume, SCHEMA)]
    for region, classes in zip(panels, slice_panels(volume, SCHEMA), strict=True):
        np.testing.assert_array_equal(region.images[PANELS.index("Error")], classes.images[PANELS.index("Error")])
    with pytest.raises(ValueError, match=r"Expected `label` of 'a' of shape \(1, 10, 12, 8\)"):
        slice_panels(Example("a", volume.image, volume.label, volume.probs[1:]), schema)
