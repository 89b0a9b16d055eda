"""Label maps as careless annotators would have drawn them: the same errors in 2D and 3D, for any number of classes, by severity.

Severity is a distance where an error moves a boundary, in the unit of ``spacing`` (millimetres of volumes, pixels of images), and a probability where a thing is missed
or takes the wrong name. At 0 nothing changes. Errors that move boundaries treat the chosen structures as one: what changes hands takes the class of the nearest pixel on
the other side, so that a head and a tail which touch do not drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from densecal.checks import check_choice, check_non_negative
from densecal.labels import DEFAULT_IGNORE_INDEX

__all__ = ["KINDS", "Corruption", "Scene", "check_severity", "corrupt_label", "structure_dice"]

_CORRELATION = 4.0
"""Of a shaking hand: neighbours within so many pixels (of the finest axis) go astray together."""


@dataclass(frozen=True)
class Scene:
    """A label map and what an error may do to it.

    Args:
        label_map: Integer classes or ``ignore_index``, ``(*spatial)``.
        num_classes: Number of classes K.
        structures: The classes that are drawn badly.
        spacing: Distance between pixels per axis.
        ignore_index: Label of pixels without a class; they never change and lend nothing to their neighbours.
        transition: Probability ``(K, K)`` that class ``row`` is taken for class ``column``, or ``None``.
        rng: Source of every draw.
    """

    label_map: NDArray[np.int64]
    num_classes: int
    structures: tuple[int, ...]
    spacing: tuple[float, ...]
    ignore_index: int
    transition: NDArray[np.float64] | None
    rng: np.random.Generator

    @cached_property
    def inside(self) -> NDArray[np.bool_]:
        """Where the structures are."""
        return np.isin(self.label_map, self.structures)

    @cached_property
    def outside(self) -> NDArray[np.bool_]:
        """Where another class is."""
        return ~self.inside & (self.label_map != self.ignore_index)

    def nearest(self, mask: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Distance to the nearest pixel of ``mask`` and its class; infinitely far where there is none."""
        if not mask.any():
            return np.full(mask.shape, np.inf), self.label_map
        distance, place = ndimage.distance_transform_edt(~mask, sampling=self.spacing, return_indices=True)
        return distance, self.label_map[tuple(place)]

    def repaint(self, inside: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The label map with its structures where ``inside`` is True: pixels that change hands take the class of the nearest on the other side."""
        result = self.label_map.copy()
        for mine, theirs, wanted in ((self.outside, self.inside, inside), (self.inside, self.outside, ~inside)):
            changes = mine & wanted
            if theirs.any() and changes.any():
                result[changes] = self.nearest(theirs)[1][changes]
        return result

    def move_boundary(self, margin: float | NDArray[np.float64]) -> NDArray[np.int64]:
        """The outer boundary of the structures moved outwards by ``margin``, inwards where that is negative. The edge of the image is no boundary."""
        grown = self.outside & (self.nearest(self.inside)[0] <= margin)
        eaten = self.inside & (self.nearest(self.outside)[0] <= -np.asarray(margin))
        return self.repaint((self.inside | grown) & ~eaten)

    def parts(self) -> list[tuple[int, NDArray[np.bool_]]]:
        """Connected parts of each structure, diagonals included, with their class."""
        neighbours = np.ones((3,) * self.label_map.ndim)
        found = []
        for c in self.structures:
            pieces, count = ndimage.label(self.label_map == c, structure=neighbours)
            found += [(c, pieces == piece) for piece in range(1, count + 1)]
        return found

    def chances(self, c: int, others: Sequence[int]) -> NDArray[np.float64]:
        """What class ``c`` is taken for, ``(K,)``: its row of the matrix; without one any of ``others`` alike."""
        if self.transition is not None:
            return self.transition[c]
        row = np.isin(np.arange(self.num_classes), [other for other in others if other != c]).astype(float)
        return row / row.sum()


def _dilation(scene: Scene, severity: float) -> NDArray[np.int64]:
    """Drawn too large: what lies within ``severity`` of a structure is taken for it (over-segmentation, Zhang et al. 2020)."""
    return scene.move_boundary(severity)


def _erosion(scene: Scene, severity: float) -> NDArray[np.int64]:
    """Drawn too small: the structures lose what lies within ``severity`` of another class, and maybe all (under-segmentation, Zhang et al. 2020)."""
    return scene.move_boundary(-severity)


def _jitter(scene: Scene, severity: float) -> NDArray[np.int64]:
    """A shaking hand: the boundary moves out here and in there, by a smooth random amount whose standard deviation is ``severity`` (Heller et al. 2018; unbiased in the
    sense of Vorontsov and Kadoury 2021)."""
    field = scene.rng.standard_normal(scene.label_map.shape)
    field = ndimage.gaussian_filter(field, [_CORRELATION * min(scene.spacing) / step for step in scene.spacing], mode="wrap")
    return scene.move_boundary(severity * field / (field.std() or 1.0))


def _shift(scene: Scene, severity: float) -> NDArray[np.int64]:
    """Drawn in the wrong place: the structures lie ``severity`` away in a random direction, to the nearest pixel. What leaves the image is lost."""
    direction = scene.rng.standard_normal(scene.label_map.ndim)
    direction /= np.linalg.norm(direction)
    offset = [round(float(severity * part / step)) for part, step in zip(direction, scene.spacing, strict=True)]
    target, source = zip(
        *((slice(max(o, 0), n + min(o, 0)), slice(max(-o, 0), n - max(o, 0))) for o, n in zip(offset, scene.label_map.shape, strict=True)),
        strict=True,
    )
    moved = np.full_like(scene.label_map, scene.ignore_index)
    moved[target] = scene.label_map[source]
    inside = np.isin(moved, scene.structures)
    result = scene.repaint(scene.inside & inside)
    covered = inside & (scene.inside | scene.outside)
    result[covered] = moved[covered]
    return result


def _polygon(scene: Scene, severity: float) -> NDArray[np.int64]:
    """Drawn with few clicks: contours are polygons that keep within ``severity`` of them (Douglas and Peucker 1973, by OpenCV), in volumes slice by slice across the axis of
    the widest spacing, the last of several."""
    import cv2

    axis = scene.label_map.ndim - 1 - int(np.argmax(scene.spacing[::-1])) if scene.label_map.ndim == 3 else None
    planes = np.moveaxis(scene.inside, axis, 0) if axis is not None else scene.inside[None]
    rows, columns = [step for a, step in enumerate(scene.spacing) if a != axis]
    step = np.array([columns, rows])  # OpenCV's points are (x, y)
    drawn = np.zeros(planes.shape, np.uint8)
    for plane, canvas in zip(planes, drawn, strict=True):
        contours, _ = cv2.findContours(np.ascontiguousarray(plane, np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        polygons = [cv2.approxPolyDP((contour * step).astype(np.float32), severity, closed=True) for contour in contours]
        if polygons:
            cv2.fillPoly(
                canvas, [np.rint(polygon / step).astype(np.int32) for polygon in polygons], 1
            )  # an even number of contours around it is a hole
    return scene.repaint((np.moveaxis(drawn, 0, axis) if axis is not None else drawn[0]).astype(bool))


def _missing(scene: Scene, severity: float) -> NDArray[np.int64]:
    """Overlooked: each connected part of a structure is left out with the probability ``severity`` (Rottmann and Reese 2022)."""
    inside = scene.inside.copy()
    for _, part in scene.parts():
        if scene.rng.random() < severity:
            inside &= ~part
    return scene.repaint(inside)


def _flip(scene: Scene, severity: float) -> NDArray[np.int64]:
    """Given the wrong name: each connected part of a structure becomes, with the probability ``severity``, the class that the transition matrix draws; without one any other
    structure, or any other class where there is but one structure."""
    result = scene.label_map.copy()
    others = scene.structures if len(scene.structures) > 1 else range(scene.num_classes)
    for c, part in scene.parts():
        chance, drawn = scene.rng.random(2)
        if chance < severity:
            result[part] = _drawn_class(scene.chances(c, others), drawn)
    return result


def _voxel_flip(scene: Scene, severity: float) -> NDArray[np.int64]:
    """Salt and pepper: each pixel of any class becomes, with the probability ``severity``, the class that the transition matrix draws; without one any other. No annotator
    errs so; it is what most theory assumes (Northcutt et al. 2021)."""
    result = scene.label_map.copy()
    chance, drawn = scene.rng.random((2, *scene.label_map.shape))
    for c in range(scene.num_classes):
        flipped = (scene.label_map == c) & (chance < severity)
        result[flipped] = _drawn_class(scene.chances(c, range(scene.num_classes)), drawn[flipped])
    return result


def _drawn_class(chances: NDArray[np.float64], drawn: Any) -> Any:
    """Class of each number drawn from [0, 1)."""
    limits = chances.cumsum() / chances.sum()
    return np.searchsorted(limits, drawn, side="right")


@dataclass(frozen=True)
class Corruption:
    """A kind of error.

    Args:
        function: From a scene and a severity to the label map with errors.
        probability: Whether severity is a probability, else a distance.
    """

    function: Callable[[Scene, float], NDArray[np.int64]]
    probability: bool = False


KINDS = {
    "dilation": Corruption(_dilation),
    "erosion": Corruption(_erosion),
    "jitter": Corruption(_jitter),
    "shift": Corruption(_shift),
    "polygon": Corruption(_polygon),
    "missing": Corruption(_missing, probability=True),
    "flip": Corruption(_flip, probability=True),
    "voxel_flip": Corruption(_voxel_flip, probability=True),
}
"""Kinds of errors by name."""


def check_severity(kind: str, severity: float) -> None:
    """Refuse a severity that the kind cannot have.

    Raises:
        ValueError: If there is no such kind, or the severity is negative, infinite or no probability.
    """
    check_choice("kind", kind, KINDS)
    check_non_negative("severity", severity)
    if not math.isfinite(severity) or (KINDS[kind].probability and severity > 1):
        wanted = "a probability, at most 1" if KINDS[kind].probability else "a distance"
        raise ValueError(f"Expected `severity` of {kind} to be {wanted}, but got {severity}.")


def corrupt_label(
    label_map: Any,
    kind: str,
    severity: float,
    *,
    num_classes: int,
    seed: int,
    structures: Sequence[int] | None = None,
    background: int | None = 0,
    spacing: Sequence[float] | None = None,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    transition: Sequence[Sequence[float]] | None = None,
) -> NDArray[np.int64]:
    """A label map with an error of one kind in it.

    Args:
        label_map: Integer classes in ``[0, num_classes)`` or ``ignore_index``, ``(*spatial)``, 2 or 3 spatial dims.
        kind: A name in ``KINDS``: ``"dilation"``, ``"erosion"``, ``"jitter"``, ``"shift"`` and ``"polygon"`` with a distance as severity, ``"missing"``, ``"flip"`` and
            ``"voxel_flip"`` with a probability.
        severity: How bad it is, 0 or more, in the unit of ``spacing`` or as a probability; see the kinds. Distances below that of two neighbours change nothing.
        num_classes: Number of classes K, at least 2.
        seed: Of every draw; the same seed gives the same error on every machine, and a greater severity mostly more of it.
        structures: Classes that are drawn badly. By default all but the background; where there is none, one of those in the label map, drawn.
        background: Class that is no structure, or ``None``.
        spacing: Distance between pixels per axis. By default 1.
        ignore_index: Label of pixels without a class; they stay as they are.
        transition: Probability ``(K, K)`` that class ``row`` is taken for class ``column``, for ``"flip"`` and ``"voxel_flip"``; rows sum to 1.

    Returns:
        Classes of the same shape, a new array. Without a structure in the image, or without anything else, boundaries have nowhere to go and nothing changes.

    Raises:
        ValueError: If an option is out of its range.

    Reference:
        Zhang et al., "Disentangling Human Error from the Ground Truth in Segmentation of Medical Images", NeurIPS 2020, arXiv:2007.15963; Heller et al., "Imperfect
        Segmentation Labels: How Much Do They Matter?", LABELS 2018, arXiv:1806.04618; Vorontsov and Kadoury, "Label Noise in Segmentation Networks: Mitigation Must Deal with
        Bias", 2021, arXiv:2107.02189; Rottmann and Reese, "Automated Detection of Label Errors in Semantic Segmentation Datasets", 2022, arXiv:2207.06104; Northcutt et
        al., "Confident Learning", JAIR 2021, arXiv:1911.00068. The kinds are those of the papers, the amounts are not.

    Example:
        >>> label_map = np.zeros((5, 5), np.int64)
        >>> label_map[2, 2] = 1
        >>> corrupt_label(label_map, "dilation", 1.0, num_classes=2, seed=0)
        array([[0, 0, 0, 0, 0],
               [0, 0, 1, 0, 0],
               [0, 1, 1, 1, 0],
               [0, 0, 1, 0, 0],
               [0, 0, 0, 0, 0]])
    """
    check_severity(kind, severity)
    label_map = np.asarray(label_map).astype(np.int64)
    if label_map.ndim not in (2, 3):
        raise ValueError(f"Expected `label_map` of 2 or 3 spatial dimensions, but got shape {label_map.shape}. Corrupt one image at a time.")
    steps = tuple(float(step) for step in spacing or (1.0,) * label_map.ndim)
    if len(steps) != label_map.ndim or min(steps) <= 0:
        raise ValueError(f"Expected `spacing` of {label_map.ndim} positive numbers, one per axis, but got {spacing}.")
    matrix = _checked_transition(transition, kind, num_classes)
    rng = np.random.Generator(np.random.PCG64(seed))
    if structures is None:
        structures = [c for c in range(num_classes) if c != background]
        if background is None:
            present = [c for c in structures if (label_map == c).any()]
            structures = [present[int(rng.random() * len(present))]] if present else []
    for c in structures:
        check_choice("structures", c, range(num_classes))
    scene = Scene(label_map, num_classes, tuple(structures), steps, ignore_index, matrix, rng)
    return KINDS[kind].function(scene, float(severity)) if severity else label_map


def _checked_transition(transition: Sequence[Sequence[float]] | None, kind: str, num_classes: int) -> NDArray[np.float64] | None:
    if transition is None:
        return None
    if kind not in ("flip", "voxel_flip"):
        raise ValueError(f"`transition` is for flip and voxel_flip, but `kind` is {kind!r}. Leave it out.")
    matrix = np.asarray(transition, dtype=np.float64)
    if matrix.shape != (num_classes, num_classes) or matrix.min() < 0 or np.abs(matrix.sum(1) - 1).max() > 1e-6:
        raise ValueError(f"Expected `transition` to have {num_classes} rows of {num_classes} probabilities that sum to 1, but got {matrix.tolist()}.")
    return matrix


def structure_dice(label_map: Any, other: Any, structures: Sequence[int]) -> float:
    """Mean Dice of two label maps over the structures that either of them has; NaN where neither has any.

    Example:
        >>> structure_dice(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 2]), [1, 2, 3])  # (2 / 3 + 1) / 2
        0.833...
    """
    scores = []
    for c in structures:
        first, second = np.asarray(label_map) == c, np.asarray(other) == c
        if total := int(first.sum()) + int(second.sum()):
            scores.append(2 * int((first & second).sum()) / total)
    return float(np.mean(scores)) if scores else math.nan
