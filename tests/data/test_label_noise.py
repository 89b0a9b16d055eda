"""Each kind of error against what it means; all of them against what every one must keep."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from volumes import blob

from densecal.data.label_noise import KINDS, corrupt_label, structure_dice

DISTANCES = [kind for kind, corruption in KINDS.items() if not corruption.probability]
SPACING = {2: (1.0, 1.0), 3: (1.0, 1.0, 2.5)}


def two_structures(dims: int, seed: int = 0) -> np.ndarray:
    """A head and a tail that touch, away from the border, and a corner without a class."""
    shape = (17, 21, 13)[:dims]
    grid = np.indices(shape)
    centre = [n // 2 + (seed % 3 - 1) for n in shape]
    inside = sum(((g - c) / (0.3 * n)) ** 2 for g, c, n in zip(grid, centre, shape, strict=True)) <= 1
    label = np.where(inside, 1 + (grid[1] > centre[1]), 0)
    label[(slice(0, 3),) * dims] = 255
    return label


def corrupt(label: np.ndarray, kind: str, severity: float, seed: int = 0, **options: object) -> np.ndarray:
    return corrupt_label(label, kind, severity, num_classes=3, seed=seed, ignore_index=255, spacing=SPACING[label.ndim], **options)  # type: ignore[arg-type]


def severities(kind: str) -> list[float]:
    return [0.1, 0.4, 1.0] if KINDS[kind].probability else [1.0, 2.5, 4.0]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_shape_classes_ignored_pixels_and_its_input(kind, dims):
    label = two_structures(dims)
    for severity, seed in itertools.product(severities(kind), range(3)):
        given = label.copy()
        result = corrupt(given, kind, severity, seed)
        assert result.shape == label.shape
        assert set(np.unique(result)) <= {0, 1, 2, 255}
        assert np.array_equal(result == 255, label == 255)
        assert np.array_equal(given, label)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_severity_0_changes_nothing_and_more_changes_more(kind, dims):
    """On average over seeds, and strictly at the greatest severity."""
    label = two_structures(dims)
    assert np.array_equal(corrupt(label, kind, 0.0), label)
    changed = [np.mean([(corrupt(label, kind, severity, seed) != label).sum() for seed in range(8)]) for severity in severities(kind)]
    assert changed[-1] > 0
    assert changed == sorted(changed)


@pytest.mark.parametrize("kind", ["jitter", "shift", "missing", "flip", "voxel_flip"])
def test_draws_follow_from_the_seed_alone(kind):
    label, severity = two_structures(3), severities(kind)[1]
    np.random.seed(0)
    first = corrupt(label, kind, severity, seed=3)
    np.random.seed(1)
    assert np.array_equal(first, corrupt(label, kind, severity, seed=3))
    assert any(not np.array_equal(first, corrupt(label, kind, severity, seed=seed)) for seed in range(4, 12))


def test_draws_are_the_same_on_every_machine():
    """The generator is named, and its numbers are fixed."""
    drawn = np.random.Generator(np.random.PCG64(1)).random((2, 2, 3))[0]
    result = corrupt_label(np.zeros((2, 3), int), "voxel_flip", 0.4, num_classes=2, seed=1)
    assert np.array_equal(result, drawn < 0.4)
    assert drawn[0, 0] == 0.5118216247002567


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_without_a_structure_or_of_nothing_else_has_no_boundary(kind):
    for label in (np.zeros((6, 7), int), np.full((6, 7), 255)):
        if kind != "voxel_flip" or label[0, 0] == 255:
            assert np.array_equal(corrupt(label, kind, 1.0), label)
    if kind in ("dilation", "erosion", "jitter", "polygon", "missing"):
        everything = np.ones((6, 7), int)
        assert np.array_equal(corrupt(everything, kind, 1.0), everything)


def nearest_slow(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    places = np.argwhere(mask)
    steps = np.array(spacing)
    return np.array([np.sqrt((((places - place) * steps) ** 2).sum(1)).min() for place in np.ndindex(mask.shape)]).reshape(mask.shape)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("severity", [0.5, 1.0, 2.0, 2.5])
def test_dilation_and_erosion_move_the_outer_boundary_by_a_distance(dims, severity):
    label = two_structures(dims)
    inside, outside = (label == 1) | (label == 2), label == 0
    dilated, eroded = corrupt(label, "dilation", severity), corrupt(label, "erosion", severity)
    assert np.array_equal(dilated != label, outside & (nearest_slow(inside, SPACING[dims]) <= severity))
    assert np.array_equal(eroded != label, inside & (nearest_slow(outside, SPACING[dims]) <= severity))
    assert (eroded[eroded != label] == 0).all()
    assert set(np.unique(dilated[dilated != label])) <= {1, 2}


def test_dilation_gives_a_pixel_the_nearest_structure():
    label = np.array([[0, 0, 1, 0, 0, 0, 0, 2]])
    assert corrupt_label(label, "dilation", 2.0, num_classes=3, seed=0).tolist() == [[1, 1, 1, 1, 1, 2, 2, 2]]


def test_erosion_leaves_the_edge_of_the_image_and_the_seam_between_structures():
    label = np.array([[1, 1, 1, 2, 2, 2, 0, 0]])
    assert corrupt_label(label, "erosion", 1.0, num_classes=3, seed=0).tolist() == [[1, 1, 1, 2, 2, 0, 0, 0]]
    assert corrupt_label(label, "erosion", 9.0, num_classes=3, seed=0).tolist() == [[0] * 8]


def test_one_structure_alone_may_be_drawn_badly():
    label = two_structures(2)
    changed = corrupt(label, "erosion", 1.0, structures=[2])
    assert np.array_equal(changed == 1, (label == 1) | ((label == 2) & (changed == 1)))
    assert (changed[label == 1] == 1).all()
    assert (changed == 2).sum() < (label == 2).sum()


def test_shift_moves_the_structures_whole():
    label = two_structures(3)
    for seed in range(6):
        result = corrupt(label, "shift", 3.0, seed=seed)
        offset = np.round(np.argwhere(result == 1).mean(0) - np.argwhere(label == 1).mean(0)).astype(int)
        assert 1.5 <= np.linalg.norm(offset * SPACING[3]) <= 4.5
        moved = np.argwhere((label == 1) | (label == 2)) + offset
        values = label[(label == 1) | (label == 2)]
        there = label[tuple(moved.T)] != 255
        assert np.array_equal(result[tuple(moved.T)][there], values[there])
        assert ((result == 1) | (result == 2)).sum() == there.sum()


def test_shift_loses_what_leaves_the_image():
    label = np.zeros((9, 9), int)
    label[0, 4] = 1
    sizes = {int((corrupt_label(label, "shift", 2.0, num_classes=2, seed=seed) == 1).sum()) for seed in range(12)}
    assert sizes == {0, 1}


def test_polygon_keeps_within_its_tolerance_and_holes_open():
    rows, columns = np.indices((41, 41))
    radius = np.hypot(rows - 20, columns - 20)
    label = ((radius <= 16) & (radius >= 6)).astype(int)
    for tolerance in (0.5, 2.0):
        result = corrupt_label(label, "polygon", tolerance, num_classes=2, seed=0)
        assert result[20, 20] == 0
        changed = result != label
        assert changed.any()
        assert np.maximum(nearest_slow(label == 1, (1, 1)), nearest_slow(label == 0, (1, 1)))[changed].max() <= tolerance + 1
    assert np.array_equal(corrupt_label(label, "polygon", 1e-6, num_classes=2, seed=0), label)


def test_polygon_draws_each_slice_across_the_widest_axis():
    image = two_structures(2)
    slices = np.stack([image, np.zeros_like(image), image.T[:17, :].repeat(2, 1)[:, :21]])
    spacing = (3.0, 1.0, 1.0)
    result = corrupt_label(slices, "polygon", 1.5, num_classes=3, seed=0, ignore_index=255, spacing=spacing)
    for plane, expected in zip(result, slices, strict=True):
        alone = corrupt_label(expected, "polygon", 1.5, num_classes=3, seed=0, ignore_index=255)
        assert np.array_equal(plane > 0, alone > 0)


def test_missing_takes_parts_whole():
    label = np.zeros((9, 40), int)
    for k in range(20):
        label[2:5, 2 * k] = 1 + k % 2
    result = corrupt_label(label, "missing", 0.5, num_classes=3, seed=0)
    left = [set(np.unique(result[2:5, 2 * k])) for k in range(20)]
    assert all(values in ({0}, {1 + k % 2}) for k, values in enumerate(left))
    assert 5 <= sum(values == {0} for values in left) <= 15
    assert (corrupt_label(label, "missing", 1.0, num_classes=3, seed=0) == 0).all()


def test_flip_follows_the_transition_matrix():
    label = np.tile([0, 1, 0, 2, 0, 0], (3, 20))
    matrix = [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0.25, 0, 0.75], [0, 0, 0, 1]]
    result = corrupt_label(label, "flip", 1.0, num_classes=4, seed=0, transition=matrix)
    assert (result[label == 1] == 3).all()
    assert (result[label == 0] == 0).all()
    assert 0.5 < np.mean(result[label == 2] == 3) < 1
    assert set(np.unique(result[label == 2])) == {1, 3}
    by_chance = corrupt_label(label, "flip", 0.5, num_classes=4, seed=0, transition=matrix)
    assert 0.2 < np.mean(by_chance[label == 1] == 3) < 0.8


def test_flip_swaps_structures_and_a_single_one_with_the_background():
    assert corrupt_label(np.array([[0, 1, 0, 2]]), "flip", 1.0, num_classes=3, seed=0).tolist() == [[0, 2, 0, 1]]
    assert corrupt_label(np.array([[0, 1, 0, 1]]), "flip", 1.0, num_classes=2, seed=0).tolist() == [[0, 0, 0, 0]]


def test_voxel_flip_changes_a_share_of_all_pixels():
    label = two_structures(2).repeat(8, 0).repeat(8, 1)
    result = corrupt(label, "voxel_flip", 0.2)
    for c in range(3):
        assert abs(np.mean(result[label == c] != c) - 0.2) < 0.03


def test_jitter_is_unbiased_and_smooth():
    label = np.zeros((64, 64, 12), int)
    label[16:48, 16:48] = 1
    sizes = [(corrupt_label(label, "jitter", 1.5, num_classes=2, seed=seed) == 1).sum() / (label == 1).sum() for seed in range(6)]
    assert abs(np.mean(sizes) - 1) < 0.05
    changed = corrupt_label(label, "jitter", 1.5, num_classes=2, seed=0) != label
    lonely = changed & ~(np.roll(changed, 1, 1) | np.roll(changed, -1, 1))
    assert lonely.sum() < 0.25 * changed.sum()


def test_without_a_background_one_class_of_the_image_is_drawn_badly():
    label = np.repeat([[0, 1, 2]], 3, axis=0).repeat(5, 0).repeat(7, 1)
    grown = set()
    for seed in range(12):
        result = corrupt_label(label, "dilation", 2.0, num_classes=4, background=None, seed=seed)
        (winner,) = np.unique(result[result != label])
        grown.add(int(winner))
    assert grown == {0, 1, 2}


def test_structure_dice_is_what_it_says():
    label = blob((9, 9, 9), seed=0)[1]
    assert structure_dice(label, label, [1, 2]) == 1
    assert np.isnan(structure_dice(label, label, [5]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dilatation"}, "Expected `kind` to be one of"),
        ({"severity": -1.0}, "Expected `severity` to be 0 or greater"),
        ({"severity": float("inf")}, "Expected `severity` of dilation to be a distance"),
        ({"kind": "missing", "severity": 1.5}, "Expected `severity` of missing to be a probability"),
        ({"label_map": np.zeros(4)}, "Expected `label_map` of 2 or 3 spatial dimensions"),
        ({"spacing": (1.0,)}, "Expected `spacing` of 2 positive numbers"),
        ({"structures": [3]}, "Expected `structures` to be one of"),
        ({"transition": np.eye(3)}, "`transition` is for flip and voxel_flip"),
        ({"kind": "flip", "severity": 1.0, "transition": np.ones((3, 3))}, "Expected `transition` to have 3 rows"),
    ],
)
def test_corrupt_label_errors(options, message):
    arguments = {"label_map": np.zeros((4, 5)), "kind": "dilation", "severity": 1.0, "num_classes": 3, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        corrupt_label(**arguments)
