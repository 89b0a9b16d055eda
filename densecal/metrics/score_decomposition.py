"""The Brier score as a sum: what calibration costs, and what is left."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from densecal.checks import check_positive
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.metrics.calibration_error import CalibrationKind
from densecal.metrics.inputs import Pixels, read_pixels
from densecal.metrics.ordered import confidence_of, num_rows_of
from densecal.ops.activation import Activation
from densecal.ops.binning import Bins, accumulate_bins
from densecal.registry import METRICS

__all__ = ["BrierDecomposition", "BrierScoreDecomposition", "brier_decomposition"]


class BrierDecomposition(NamedTuple):
    """A Brier score in two parts, each a float64 scalar at least 0, NaN where nothing counted.

    Attributes:
        brier: The score itself, ``calibration`` + ``refinement``.
        calibration: What bins of confidence are off by, squared (reliability).
        refinement: The rest: how little the confidences tell about the outcome, and their spread within a bin.
    """

    brier: Tensor
    calibration: Tensor
    refinement: Tensor


def brier_decomposition(
    probs: Tensor,
    label: Tensor,
    *,
    kind: CalibrationKind = "top_label",
    num_bins: int = 15,
    activation: Activation = "softmax",
    mask: Tensor | None = None,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    validate_args: bool = True,
) -> BrierDecomposition:
    r"""Brier score = calibration + refinement, pooled over all pixels.

    .. math:: \tfrac{1}{n} \sum_i (p_i - q_i)^2 = \sum_b \tfrac{n_b}{n} (\bar p_b - \bar q_b)^2 + \sum_b \tfrac{n_b}{n} \mathrm{Var}_b(p - q)

    exactly, with the variance over the pixels of a bin. Where all p of a bin are equal and q is 0 or 1 the second part is the mean of
    :math:`\bar q_b (1 - \bar q_b)`, the refinement of Murphy and DeGroot. Bins have a width, so it also contains the spread of p in a bin; calibration grows and
    refinement falls with the number of bins.

    Args:
        probs: Probabilities ``(N, C, *spatial)``, floating, 1 to 3 spatial dims.
        label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)``, or a soft reference ``(N, C, *spatial)``, floating, q its shares.
        kind: ``"top_label"``: the binary score of the confidence in the predicted class, in [0, 1]. ``"classwise"``: the sum over classes, each with its bins,
            in [0, 2], as :func:`densecal.metrics.brier_score`; for regions, absent and present as two classes and the mean over regions.
        num_bins: Number of equal bins (lower, upper]; 0 falls into the first and 1 into the last.
        activation: ``"softmax"``, or ``"sigmoid"`` for regions that may overlap.
        mask: True where a pixel counts, ``(N, *spatial)``, bool.
        ignore_index: Label of pixels to leave out.
        validate_args: Look at the values too; that waits for a GPU.

    Returns:
        ``brier``, ``calibration`` and ``refinement``.

    Raises:
        TypeError: If ``probs`` is not floating or ``mask`` not bool.
        ValueError: If an option is unknown, shapes do not fit or, with ``validate_args``, values are out of range.

    Reference:
        Murphy, "A New Vector Partition of the Probability Score", Journal of Applied Meteorology 12, 1973; Bröcker, "Reliability, Sufficiency, and the
        Decomposition of Proper Scores", Quarterly Journal of the Royal Meteorological Society 135, 2009; the spread within bins: Stephenson, Coelho and
        Jolliffe, "Two Extra Components in the Brier Score Decomposition", Weather and Forecasting 23, 2008.

    Example:
        Four pixels of confidence 0.8, two of them right: (0.8 - 1/2)^2, and 1/2 * 1/2.

        >>> probs = torch.tensor([[[0.8, 0.8, 0.8, 0.8], [0.2, 0.2, 0.2, 0.2]]], dtype=torch.float64)
        >>> parts = brier_decomposition(probs, torch.tensor([[0, 1, 0, 1]]))
        >>> [round(part.item(), 4) for part in parts]
        [0.34, 0.09, 0.25]
    """
    check_positive("num_bins", num_bins)
    pixels = read_pixels(probs, label, mask, ignore_index=ignore_index, activation=activation, validate_args=validate_args)
    return _decompose(*_sums(pixels, kind, num_bins), kind, activation)


@METRICS.register("brier_decomposition")
class BrierScoreDecomposition(Metric):
    """Brier score = calibration + refinement with a state of a few bins. See :func:`brier_decomposition`.

    Args:
        kind: ``"top_label"`` or ``"classwise"``.
        num_classes: Number of classes (or regions); needed for ``"classwise"``.
        num_bins: Number of equal bins (lower, upper].
        activation: ``"softmax"``, or ``"sigmoid"`` for regions that may overlap.
        ignore_index: Label of pixels to leave out.
        validate_args: Look at the values too; that waits for a GPU.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an option is unknown, or ``"classwise"`` comes without ``num_classes``.

    Example:
        >>> metric = BrierScoreDecomposition()
        >>> metric.update(torch.tensor([[[0.75, 0.75], [0.25, 0.25]]]), torch.tensor([[0, 1]]))
        >>> metric.compute().calibration, metric.compute().refinement
        (tensor(0.0625, dtype=torch.float64), tensor(0.2500, dtype=torch.float64))
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    bin_count: Tensor
    bin_confidence: Tensor
    bin_correct: Tensor
    squares: Tensor

    def __init__(
        self,
        *,
        kind: CalibrationKind = "top_label",
        num_classes: int | None = None,
        num_bins: int = 15,
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_positive("num_bins", num_bins)
        self.num_rows = num_rows_of(kind, num_classes)
        self.kind: CalibrationKind = kind
        self.num_bins = num_bins
        self.activation: Activation = activation
        self.ignore_index = ignore_index
        self.validate_args = validate_args
        empty = Bins.empty(self.num_rows, num_bins)
        self.add_state("bin_count", empty.count, dist_reduce_fx="sum")
        self.add_state("bin_confidence", empty.confidence, dist_reduce_fx="sum")
        self.add_state("bin_correct", empty.correct, dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(self.num_rows, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probs: Tensor, label: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; arguments as :func:`brier_decomposition`."""
        pixels = read_pixels(probs, label, mask, ignore_index=self.ignore_index, activation=self.activation, validate_args=self.validate_args)
        bins, squares = _sums(pixels, self.kind, self.num_bins)
        if len(squares) != self.num_rows:
            raise ValueError(f"Expected `probs` with {self.num_rows} classes, but got {len(squares)}.")
        bins = self.bins + bins
        self.bin_count, self.bin_confidence, self.bin_correct = bins.count, bins.confidence, bins.correct
        self.squares = self.squares + squares

    def compute(self) -> BrierDecomposition:
        """The score and its parts; NaN where nothing counted."""
        return _decompose(self.bins, self.squares, self.kind, self.activation)

    @property
    def bins(self) -> Bins:
        """What was accumulated, ``(1, num_bins)`` for the top label or ``(C, num_bins)``."""
        return Bins(self.bin_count, self.bin_confidence, self.bin_correct)

    @property
    def count(self) -> Tensor:
        """Number of pixels that counted."""
        return self.bin_count[0].sum()


def _sums(pixels: Pixels, kind: CalibrationKind, num_bins: int) -> tuple[Bins, Tensor]:
    """Bins ``(K, num_bins)`` and the sum of squares ``(K,)``."""
    confidence, correct, valid = confidence_of(pixels, kind)
    k = confidence.shape[1]
    row = torch.arange(k, device=confidence.device).view(1, -1, 1)
    bins = accumulate_bins(confidence, correct, num_bins=num_bins, row=row, num_rows=k, valid=valid)
    return bins, torch.where(valid, confidence.double() - correct.double(), 0.0).square().sum((0, 2))


def _decompose(bins: Bins, squares: Tensor, kind: CalibrationKind, activation: Activation) -> BrierDecomposition:
    n = bins.count.sum(-1)
    brier = squares / n
    calibration = ((bins.confidence - bins.correct).square() / bins.count.clamp(min=1)).sum(-1) / n
    if kind == "classwise" and activation == "sigmoid":  # absent is as far off as present
        brier, calibration = 2 * brier.mean(), 2 * calibration.mean()
    else:
        brier, calibration = brier.sum(), calibration.sum()
    return BrierDecomposition(brier, calibration, (brier - calibration).clamp(min=0))
