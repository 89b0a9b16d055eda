"""Uncertainty-error overlap: does what the network calls uncertain cover what it gets wrong, case by case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric

from densecal.checks import check_choice
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.metrics.inputs import Pixels, read_pixels
from densecal.metrics.overlap import dice_from_counts
from densecal.ops.activation import Activation
from densecal.registry import METRICS

__all__ = ["MeanUncertaintyErrorOverlap", "Uncertainty", "UncertaintyErrorOverlap", "uncertainty_error_overlap"]

Uncertainty: TypeAlias = Literal["entropy", "confidence"]

_THRESHOLDS = tuple(k / 20 for k in range(1, 20))


class MeanUncertaintyErrorOverlap(NamedTuple):
    """Overlap per threshold, averaged over cases.

    Attributes:
        threshold: ``(T,)``, float64.
        overlap: Mean over the cases that have a value, ``(T,)``, float64; NaN where none has.
        num_cases: Cases behind each mean, ``(T,)``, int64.
        best_threshold: The threshold of the largest mean, the lowest of equals; NaN where there is none.
        best_overlap: The largest mean.
    """

    threshold: Tensor
    overlap: Tensor
    num_cases: Tensor
    best_threshold: Tensor
    best_overlap: Tensor


def uncertainty_error_overlap(
    probs: Tensor,
    label: Tensor,
    *,
    uncertainty: Uncertainty = "entropy",
    thresholds: Sequence[float] = _THRESHOLDS,
    activation: Activation = "softmax",
    mask: Tensor | None = None,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    validate_args: bool = True,
) -> Tensor:
    r"""Dice between the pixels that are uncertain, u > tau, and those that are wrong, per case and threshold.

    .. math:: \mathrm{UE}(\tau) = \frac{2\, |U_\tau \cap E|}{|U_\tau| + |E|}, \quad U_\tau = \{u > \tau\}, \quad E = \{\hat y \ne y\}

    Args:
        probs: Probabilities ``(N, C, *spatial)``, floating, 1 to 3 spatial dims; each row one whole case.
        label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)``, or a soft reference ``(N, C, *spatial)``, floating, of which the class with the largest
            share is taken.
        uncertainty: ``"entropy"``: :math:`-\sum_c p_c \log p_c / \log C`, in [0, 1]. ``"confidence"``: :math:`1 - \max_c p_c`, in [0, 1 - 1/C].
        thresholds: tau, T of them, rising, in [0, 1).
        activation: ``"softmax"``, or ``"sigmoid"`` for regions that may overlap; every region of a pixel then counts as a pixel of two classes.
        mask: True where a pixel counts, ``(N, *spatial)``, bool.
        ignore_index: Label of pixels to leave out.
        validate_args: Look at the values too; that waits for a GPU.

    Returns:
        ``(N, T)`` in [0, 1], float64. NaN where nothing is uncertain and nothing wrong.

    Raises:
        TypeError: If ``probs`` is not floating or ``mask`` not bool.
        ValueError: If an option is unknown or out of range, shapes do not fit or, with ``validate_args``, values are out of range.

    Reference:
        Jungo, Balsiger and Reyes, "Analyzing the Quality and Challenges of Uncertainty Estimations for Brain Tumor Segmentation", Frontiers in Neuroscience 14,
        2020; Jungo and Reyes, "Assessing Reliability and Challenges of Uncertainty Estimations for Medical Image Segmentation", MICCAI 2019, arXiv:1907.03338.

    Example:
        Uncertain above 0.25 are the second and third pixel, wrong is the third: 2 * 1 / (2 + 1).

        >>> probs = torch.tensor([[[0.9, 0.7, 0.6, 0.8], [0.1, 0.3, 0.4, 0.2]]])
        >>> uncertainty_error_overlap(probs, torch.tensor([[0, 0, 1, 0]]), uncertainty="confidence", thresholds=[0.25])
        tensor([[0.6667]], dtype=torch.float64)
    """
    _check_options(uncertainty, thresholds)
    pixels = read_pixels(probs, label, mask, ignore_index=ignore_index, activation=activation, validate_args=validate_args)
    return _overlap(pixels, uncertainty, torch.tensor(thresholds, dtype=torch.float64, device=pixels.probs.device))


@METRICS.register("uncertainty_error_overlap")
class UncertaintyErrorOverlap(Metric):
    """Uncertainty-error overlap averaged over cases, for all thresholds at once. Each row of a batch is one whole case. See
    :func:`uncertainty_error_overlap`.

    The best threshold is chosen on what was fed; choose it on validation cases and report its overlap on others.

    Args:
        uncertainty: ``"entropy"`` or ``"confidence"``.
        thresholds: tau, T of them, rising, in [0, 1).
        activation: ``"softmax"``, or ``"sigmoid"`` for regions that may overlap.
        ignore_index: Label of pixels to leave out.
        validate_args: Look at the values too; that waits for a GPU.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an option is unknown or out of range.

    Example:
        >>> metric = UncertaintyErrorOverlap(uncertainty="confidence", thresholds=[0.25, 0.35])
        >>> metric.update(torch.tensor([[[0.9, 0.7, 0.6, 0.8], [0.1, 0.3, 0.4, 0.2]]]), torch.tensor([[0, 0, 1, 0]]))
        >>> result = metric.compute()
        >>> result.overlap, result.best_threshold
        (tensor([0.6667, 1.0000], dtype=torch.float64), tensor(0.3500, dtype=torch.float64))
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    thresholds: Tensor
    total: Tensor
    count: Tensor

    def __init__(
        self,
        *,
        uncertainty: Uncertainty = "entropy",
        thresholds: Sequence[float] = _THRESHOLDS,
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_options(uncertainty, thresholds)
        self.uncertainty: Uncertainty = uncertainty
        self.activation: Activation = activation
        self.ignore_index = ignore_index
        self.validate_args = validate_args
        self.register_buffer("thresholds", torch.tensor(thresholds, dtype=torch.float64), persistent=False)
        self.add_state("total", torch.zeros(len(thresholds), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(thresholds), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probs: Tensor, label: Tensor, mask: Tensor | None = None) -> None:
        """Add whole cases; arguments as :func:`uncertainty_error_overlap`."""
        pixels = read_pixels(probs, label, mask, ignore_index=self.ignore_index, activation=self.activation, validate_args=self.validate_args)
        overlap = _overlap(pixels, self.uncertainty, self.thresholds)
        self.total = self.total + overlap.nansum(0)
        self.count = self.count + (~overlap.isnan()).sum(0)

    def compute(self) -> MeanUncertaintyErrorOverlap:
        """The mean over cases per threshold, and the threshold where it is largest."""
        overlap = self.total / self.count
        best = overlap.nan_to_num(-math.inf).argmax()
        return MeanUncertaintyErrorOverlap(
            self.thresholds.clone(), overlap, self.count, torch.where(overlap[best].isnan(), math.nan, self.thresholds[best]), overlap[best]
        )


def _check_options(uncertainty: str, thresholds: Sequence[float]) -> None:
    check_choice("uncertainty", uncertainty, ("entropy", "confidence"))
    rising = all(low < high for low, high in pairwise(thresholds))
    if not (len(thresholds) and rising and thresholds[0] >= 0 and thresholds[-1] < 1):
        raise ValueError(f"Expected rising `thresholds` in [0, 1), at least one, but got {tuple(thresholds)}.")


def _overlap(pixels: Pixels, uncertainty: Uncertainty, thresholds: Tensor) -> Tensor:
    """``(N, T)``: from a histogram over the thresholds per case, whose sums from above are the counts of what exceeds each."""
    confidence, prediction, _ = pixels.top_label()
    entropy = uncertainty == "entropy"
    u = torch.special.entr(pixels.probs.double()).sum(1) / math.log(pixels.probs.shape[1]) if entropy else 1 - confidence.double()
    n, slots = len(u), len(thresholds) + 1
    wrong = prediction != pixels.label_map
    # Bin t holds what lies in (threshold t - 1, threshold t]; one bin more takes what does not count.
    place = torch.where(pixels.valid, torch.bucketize(u, thresholds), slots)

    def per_bin(counted: Tensor) -> Tensor:
        slot = torch.where(counted, place, slots)
        return torch.zeros(n, slots + 1, dtype=torch.int64, device=u.device).scatter_add_(1, slot, torch.ones_like(slot))[:, :slots]

    def above(histogram: Tensor) -> Tensor:
        return histogram.flip(1).cumsum(1).flip(1)[:, 1:]

    all_pixels, errors = per_bin(pixels.valid), per_bin(wrong)
    return dice_from_counts(above(errors), above(all_pixels), errors.sum(1, keepdim=True))
