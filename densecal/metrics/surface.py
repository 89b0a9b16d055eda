"""How far the surface of a predicted structure is from that of the reference, per case and class. MONAI measures; it is needed here alone among the metrics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from densecal.checks import check_non_negative
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.metrics.inputs import Pixels, read_pixels
from densecal.metrics.overlap import Average, MeanOverCases, check_classes, overlap_counts
from densecal.ops.activation import Activation
from densecal.ops.distance import read_spacing
from densecal.registry import METRICS

__all__ = ["HausdorffDistance95", "NormalizedSurfaceDistance", "hausdorff_distance_95", "normalized_surface_distance"]


def hausdorff_distance_95(
    probs: Tensor,
    label: Tensor,
    *,
    spacing: Tensor | Sequence[float] | None = None,
    mask: Tensor | None = None,
    background: int | None = 0,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    activation: Activation = "softmax",
    validate_args: bool = True,
) -> Tensor:
    """95th percentile of the distances between the surfaces of a predicted and a reference structure, the larger of both directions.

    The surface of a structure are its pixels that share a face with one outside it; the border of the image is outside. A pixel that is ignored, or that
    ``mask`` leaves out, belongs to no structure, neither the predicted nor the reference one: where a structure runs into such pixels, both have a surface
    there.

    Args:
        probs: Probabilities ``(N, C, *spatial)``, floating, 2 or 3 spatial dims; a pixel is of the class with the largest, or in a region where its
            probability is above 1/2.
        label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)``, or a soft reference ``(N, C, *spatial)``, floating, of which the class with the largest
            share is taken. For regions 0 and 1, or shares, ``(N, C, *spatial)``; above 1/2 is inside.
        spacing: Distance between pixels per axis, for example in millimetres, ``(spatial_dims,)`` or per image ``(N, spatial_dims)``; None is 1.
        mask: True where a pixel counts, ``(N, *spatial)``, bool.
        background: Class whose surface is not looked at, or None. Regions have no background: all count.
        ignore_index: Label of pixels to leave out.
        activation: ``"softmax"`` for exclusive classes, ``"sigmoid"`` for regions that may overlap.
        validate_args: Look at the values too.

    Returns:
        ``(N, C)``, in pixels or the unit of ``spacing``, float64 (of MONAI's single precision). NaN where a class is missing from the prediction, the reference
        or both, for then there is no distance: report beside it in how many cases that was so. NaN for the background.

    Raises:
        ImportError: If MONAI is not installed.
        TypeError: If ``probs`` is not floating or ``mask`` not bool.
        ValueError: If shapes do not fit, ``background`` is not a class or, with ``validate_args``, values are out of range.

    Reference:
        Maier-Hein et al., "Metrics reloaded", Nature Methods 2024, arXiv:2206.01653.

    Example:
        >>> label = torch.zeros(1, 8, 8, dtype=torch.long)
        >>> label[0, 2:4, 2:4] = 1
        >>> probs = torch.nn.functional.one_hot(label.roll(3, dims=1), 2).movedim(-1, 1).float()
        >>> hausdorff_distance_95(probs, label, spacing=(0.5, 1.0))
        tensor([[   nan, 1.5000]], dtype=torch.float64)
    """
    pixels = read_pixels(probs, label, mask, ignore_index=ignore_index, activation=activation, validate_args=validate_args)
    classes = check_classes(pixels.num_classes, background, activation)
    return _per_case_and_class(_hausdorff_distance_95, pixels, probs.shape[2:], spacing, classes, if_missing=math.nan)


def normalized_surface_distance(
    probs: Tensor,
    label: Tensor,
    *,
    tolerance: float | Sequence[float],
    spacing: Tensor | Sequence[float] | None = None,
    mask: Tensor | None = None,
    background: int | None = 0,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    activation: Activation = "softmax",
    validate_args: bool = True,
) -> Tensor:
    """Share of both surfaces that lies within ``tolerance`` of the other one (surface Dice), counted in surface pixels.

    Arguments, surfaces, ignored pixels and errors as :func:`hausdorff_distance_95`.

    Args:
        probs: Probabilities ``(N, C, *spatial)``.
        label: Label map, soft reference or regions.
        tolerance: Largest distance that is as good as none, at least 0: in pixels or, with ``spacing``, in its unit; one number, or one per class.
        spacing: Distance between pixels per axis, ``(spatial_dims,)`` or per image ``(N, spatial_dims)``; None is 1.
        mask: True where a pixel counts, ``(N, *spatial)``, bool.
        background: Class whose surface is not looked at, or None.
        ignore_index: Label of pixels to leave out.
        activation: ``"softmax"`` or ``"sigmoid"``.
        validate_args: Look at the values too.

    Returns:
        ``(N, C)`` in [0, 1], float64. 0 where a class is missing from the prediction or the reference alone, NaN where from both, and for the background.

    Raises:
        ValueError: Also if a ``tolerance`` is negative or there is not one per class.

    Reference:
        Nikolov et al., "Clinically Applicable Segmentation of Head and Neck Anatomy for Radiotherapy", JMIR 2021, arXiv:1809.04430; boundaries in pixels as in
        Seidlitz et al., "Robust deep learning-based semantic organ segmentation in hyperspectral images", Medical Image Analysis 2022, arXiv:2111.05408.

    Example:
        >>> label = torch.zeros(1, 8, 8, dtype=torch.long)
        >>> label[0, 2:4, 2:4] = 1
        >>> probs = torch.nn.functional.one_hot(label.roll(1, dims=1), 2).movedim(-1, 1).float()
        >>> normalized_surface_distance(probs, label, tolerance=0.5)
        tensor([[   nan, 0.5000]], dtype=torch.float64)
    """
    pixels = read_pixels(probs, label, mask, ignore_index=ignore_index, activation=activation, validate_args=validate_args)
    classes = check_classes(pixels.num_classes, background, activation)
    score = partial(_normalized_surface_distance, tolerance=_tolerances(tolerance, pixels.num_classes))
    return _per_case_and_class(score, pixels, probs.shape[2:], spacing, classes, if_missing=0.0)


@METRICS.register("hd95")
class HausdorffDistance95(MeanOverCases):
    """95 % Hausdorff distance per case, averaged over cases. Each row of a batch is one whole case. See :func:`hausdorff_distance_95`.

    A case that misses a structure, or makes one up, has no distance and does not worsen the mean: :attr:`missed` counts them, per class.

    Args:
        num_classes: Number of classes C, background included, or of regions.
        background: Class whose surface is not looked at, or None. Regions have no background: all count.
        average: ``"macro"``: mean over the foreground classes that have a distance, then over cases. ``"none"``: per class, the mean over cases.
        ignore_index: Label of pixels to leave out.
        activation: ``"softmax"`` for exclusive classes, ``"sigmoid"`` for regions that may overlap.
        validate_args: Look at the values too.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``average`` or ``activation`` is unknown, there are fewer than two classes (one region), or ``background`` is none of them.

    Example:
        >>> metric = HausdorffDistance95(2)
        >>> label = torch.zeros(1, 8, 8, dtype=torch.long)
        >>> label[0, 2:4, 2:4] = 1
        >>> probs = torch.nn.functional.one_hot(label.roll(3, dims=1), 2).movedim(-1, 1).float()
        >>> metric.update(probs, label, spacing=(0.5, 1.0))
        >>> metric.update(probs, torch.zeros_like(label))
        >>> metric.compute(), metric.count, metric.missed[1]
        (tensor(1.5000, dtype=torch.float64), tensor(1), tensor(1))
    """

    higher_is_better = False
    plot_upper_bound = None

    missed: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        background: int | None = 0,
        average: Average = "macro",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        activation: Activation = "softmax",
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_classes,
            background=background,
            average=average,
            ignore_index=ignore_index,
            activation=activation,
            validate_args=validate_args,
            **kwargs,
        )
        self.add_state("missed", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probs: Tensor, label: Tensor, mask: Tensor | None = None, spacing: Tensor | Sequence[float] | None = None) -> None:
        """Add a batch of whole cases; arguments as :func:`hausdorff_distance_95`."""
        pixels = self.read(probs, label, mask)
        self.add_scores(_per_case_and_class(_hausdorff_distance_95, pixels, probs.shape[2:], spacing, self.foreground, if_missing=math.nan))
        _, predicted, reference = overlap_counts(pixels)
        self.missed = self.missed + ((predicted > 0) != (reference > 0)).sum(0)


@METRICS.register("nsd")
class NormalizedSurfaceDistance(MeanOverCases):
    """Normalised surface distance (surface Dice) per case, averaged over cases. See :func:`normalized_surface_distance`.

    Args:
        num_classes: Number of classes C, background included, or of regions.
        tolerance: Largest distance that is as good as none, at least 0: in pixels or, with ``spacing``, in its unit; one number, or one per class.
        background: Class whose surface is not looked at, or None. Regions have no background: all count.
        average: ``"macro"``: mean over the foreground classes that a case has or a prediction claims, then over cases. ``"none"``: per class, the mean over
            the cases where that class is predicted or there.
        ignore_index: Label of pixels to leave out.
        activation: ``"softmax"`` for exclusive classes, ``"sigmoid"`` for regions that may overlap.
        validate_args: Look at the values too.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: As :class:`HausdorffDistance95`, and if a ``tolerance`` is negative or there is not one per class.

    Example:
        >>> metric = NormalizedSurfaceDistance(2, tolerance=0.5)
        >>> label = torch.zeros(1, 8, 8, dtype=torch.long)
        >>> label[0, 2:4, 2:4] = 1
        >>> probs = torch.nn.functional.one_hot(label.roll(1, dims=1), 2).movedim(-1, 1).float()
        >>> metric.update(probs, label)
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        tolerance: float | Sequence[float],
        background: int | None = 0,
        average: Average = "macro",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        activation: Activation = "softmax",
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_classes,
            background=background,
            average=average,
            ignore_index=ignore_index,
            activation=activation,
            validate_args=validate_args,
            **kwargs,
        )
        self.tolerance = _tolerances(tolerance, num_classes)

    def update(self, probs: Tensor, label: Tensor, mask: Tensor | None = None, spacing: Tensor | Sequence[float] | None = None) -> None:
        """Add a batch of whole cases; arguments as :func:`normalized_surface_distance`."""
        pixels = self.read(probs, label, mask)
        score = partial(_normalized_surface_distance, tolerance=self.tolerance)
        self.add_scores(_per_case_and_class(score, pixels, probs.shape[2:], spacing, self.foreground, if_missing=0.0))


def _tolerances(tolerance: float | Sequence[float], num_classes: int) -> tuple[float, ...]:
    tolerances = (float(tolerance),) * num_classes if isinstance(tolerance, (int, float)) else tuple(float(value) for value in tolerance)
    if len(tolerances) != num_classes:
        raise ValueError(f"Expected `tolerance` to be a number or {num_classes} numbers, one per class, background included, but got {tolerance}.")
    for value in tolerances:
        check_non_negative("tolerance", value)
    return tolerances


def _hausdorff_distance_95(predicted: Tensor, reference: Tensor, spacing: list[float] | None, c: int) -> Tensor:
    metrics = _monai_metrics()
    return metrics.compute_hausdorff_distance(predicted, reference, include_background=True, percentile=95, spacing=spacing)


def _normalized_surface_distance(
    predicted: Tensor, reference: Tensor, spacing: list[float] | None, c: int, *, tolerance: tuple[float, ...]
) -> Tensor:
    metrics = _monai_metrics()
    return metrics.compute_surface_dice(predicted, reference, class_thresholds=[tolerance[c]], include_background=True, spacing=spacing)


def _monai_metrics() -> Any:
    try:
        import monai.metrics
    except ImportError as error:
        raise ImportError(
            "Surface distances are measured by MONAI, which is not installed. Run `pip install monai`, or `densecal[train]`."
        ) from error
    return monai.metrics


def _per_case_and_class(
    score: Callable[[Tensor, Tensor, list[float] | None, int], Tensor],
    pixels: Pixels,
    spatial: Sequence[int],
    spacing: Tensor | Sequence[float] | None,
    classes: Sequence[int],
    *,
    if_missing: float,
) -> Tensor:
    """``score(predicted, reference, spacing, class)`` of the masks of each case and class, ``(N, K)``, on the CPU."""
    if len(spatial) not in (2, 3):
        raise ValueError(f"Expected 2 or 3 spatial dimensions for surface distances, but got {len(spatial)}.")
    n, k = len(pixels.probs), pixels.num_classes
    steps = [None] * n if spacing is None else read_spacing(spacing, len(spatial)).double().expand(n, -1).tolist()
    # Regions are kept as one mask each, classes as a map with -1 where a pixel is of none.
    prediction, label = pixels.probs.max(1).indices.masked_fill(~pixels.valid, -1), pixels.label_map.masked_fill(~pixels.valid, -1)
    prediction, label = (classes_of.cpu().view(n, pixels.num_regions or 1, *spatial) for classes_of in (prediction, label))
    scores = torch.full((n, k), math.nan, dtype=torch.float64)
    for i, c in product(range(n), classes):
        channel, value = (0, c) if pixels.num_regions is None else (c, 1)
        predicted, reference = prediction[i, channel] == value, label[i, channel] == value
        found, there = bool(predicted.any()), bool(reference.any())
        if found and there:
            box = _bounding_box(predicted | reference)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of an argument that MONAI passes to itself
                scores[i, c] = score(predicted[box][None, None], reference[box][None, None], steps[i], c).item()
        elif found or there:
            scores[i, c] = if_missing
    return scores.to(pixels.probs.device)


def _bounding_box(mask: Tensor) -> tuple[slice, ...]:
    """Where a mask is, and one pixel more on each side, so that its surface stays one: MONAI turns what it is given into floats, so it gets no more."""
    box = []
    for axis, length in enumerate(mask.shape):
        inside = mask.movedim(axis, 0).flatten(1).any(1).nonzero()
        box.append(slice(max(int(inside[0]) - 1, 0), min(int(inside[-1]) + 2, length)))
    return tuple(box)
