"""Adaptive calibration error: bins that hold equally many pixels each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from densecal.checks import check_positive
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.metrics.calibration_error import CalibrationKind
from densecal.metrics.inputs import Pixels, read_pixels
from densecal.metrics.ordered import MAX_EXACT, OrderMetric, confidence_of, fine_row, num_rows_of, one_row, rows_of, share_below
from densecal.ops.activation import Activation
from densecal.ops.binning import Bins
from densecal.registry import METRICS

__all__ = ["AdaptiveCalibrationError", "adaptive_bound_from_bins", "adaptive_calibration_error", "adaptive_from_bins"]


def adaptive_calibration_error(
    probs: Tensor,
    label: Tensor,
    *,
    kind: CalibrationKind = "top_label",
    num_bins: int = 15,
    threshold: float = 0.0,
    activation: Activation = "softmax",
    mask: Tensor | None = None,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    validate_args: bool = True,
) -> Tensor:
    r"""How far confidence is from accuracy, averaged over bins that hold the same number of pixels each, pooled over all pixels.

    .. math:: \tfrac{1}{B} \sum_{b=1}^{B} \left| \mathrm{acc}_b - \mathrm{conf}_b \right|, \quad n_b = n / B

    with pixels in order of confidence. Pixels of the same confidence are alike: where a bin ends among them, both bins get their share of all of them, so that
    the value does not depend on the order of the pixels. Where n is no multiple of B, a bin's last pixel is shared in the same way.

    Args:
        probs: Probabilities ``(N, C, *spatial)``, floating, 1 to 3 spatial dims.
        label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)``, or a soft reference ``(N, C, *spatial)``, floating; the share that it gives to a class
            then takes the place of right or wrong.
        kind: ``"top_label"``: confidence of the predicted class against whether it is right. ``"classwise"``: probability of each class against whether a
            pixel is of that class, and the mean over classes, background included; classes without a probability that reaches the threshold are left out.
        num_bins: Number of bins B of equal mass.
        threshold: Confidences below are left out, in [0, 1]. With ``kind="classwise"`` and a small one, 1e-3 say, this is the thresholded adaptive
            calibration error (TACE).
        activation: ``"softmax"``, or ``"sigmoid"`` for regions that may overlap.
        mask: True where a pixel counts, ``(N, *spatial)``, bool.
        ignore_index: Label of pixels to leave out.
        validate_args: Look at the values too; that waits for a GPU.

    Returns:
        Scalar in [0, 1], float64. NaN where no pixel counts.

    Raises:
        TypeError: If ``probs`` is not floating or ``mask`` not bool.
        ValueError: If an option is unknown or out of range, shapes do not fit or, with ``validate_args``, values are out of range.

    Reference:
        Nixon et al., "Measuring Calibration in Deep Learning", CVPR Workshops 2019, arXiv:1904.01685: ACE and TACE are ``kind="classwise"``.

    Example:
        Two bins of two pixels: | 1/2 - 0.65 | and | 1 - 0.85 |.

        >>> probs = torch.tensor([[[0.6, 0.7, 0.8, 0.9], [0.4, 0.3, 0.2, 0.1]]])
        >>> adaptive_calibration_error(probs, torch.tensor([[0, 1, 0, 0]]), num_bins=2)
        tensor(0.1500, dtype=torch.float64)
    """
    _check_options(num_bins, threshold)
    pixels = read_pixels(probs, label, mask, ignore_index=ignore_index, activation=activation, validate_args=validate_args)
    return _mean(rows_of(*_entries(pixels, kind, threshold)), num_bins)


def adaptive_from_bins(bins: Bins, num_bins: int) -> Tensor:
    """Adaptive calibration error of one row of bins in rising order of confidence; what shares a bin counts as tied.

    Args:
        bins: ``(1, B)`` or ``(B,)``: fine bins, or one bin per distinct confidence.
        num_bins: Number of bins of equal mass.

    Returns:
        Scalar, float64; NaN where the bins are empty.

    Raises:
        ValueError: If there are several rows, or ``num_bins`` is not positive.

    Example:
        >>> from densecal.ops.fine_bins import accumulate_fine_bins
        >>> adaptive_from_bins(accumulate_fine_bins(torch.tensor([0.6, 0.7, 0.8, 0.9]), torch.tensor([True, False, True, True])), 2)
        tensor(0.1500, dtype=torch.float64)
    """
    check_positive("num_bins", num_bins)
    bins = one_row(bins)
    n = bins.count.sum()
    if bins.num_bins == 0:
        return torch.full((), torch.nan, dtype=torch.float64, device=bins.count.device)
    gap = bins.correct - bins.confidence
    place, share = share_below(bins.count, _quantiles(n, num_bins))
    upto = gap.cumsum(0)[place] - (1 - share) * gap[place]
    return upto.diff().abs().sum() / n


def adaptive_bound_from_bins(bins: Bins, num_bins: int) -> Tensor:
    r"""How far the order of the entries within fine bins could move :func:`adaptive_from_bins`.

    Only the fine bins matter in which an equal-mass bin ends, since elsewhere the order inside a bin does not show. Of such a bin with g entries, sums S of
    confidences in [l, u] and R of what was right, a = s g entries lie below the end. Whatever their order, what was right among them is between
    max(0, R - (g - a)) and min(a, R), and their confidence between max(a l, S - (g - a) u) and s S, as they are the smallest. The larger deviations from s R
    and s S together enter into the two bins on either side, so the bound is twice their sum over the ends, divided by n.

    Args:
        bins: ``(1, B)`` or ``(B,)`` fine bins.
        num_bins: Number of bins of equal mass.

    Raises:
        ValueError: If these are not the fine bins or several rows of them, or ``num_bins`` is not positive.
    """
    check_positive("num_bins", num_bins)
    bins, lower, upper = fine_row(bins)
    n = bins.count.sum()
    place, share = share_below(bins.count, _quantiles(n, num_bins)[1:-1])
    lower, upper, count, confidence, correct = (tensor[place] for tensor in (lower, upper, bins.count, bins.confidence, bins.correct))
    below, above = share * count, (1 - share) * count
    right = torch.maximum(share * correct - (correct - above).clamp(min=0), torch.minimum(below, correct) - share * correct)
    sure = share * confidence - torch.maximum(below * lower, confidence - above * upper)
    return 2 * torch.where((lower < upper) & (count > 1), right + sure.clamp(min=0), 0.0).sum() / n


@METRICS.register("adaptive_calibration_error")
class AdaptiveCalibrationError(OrderMetric):
    """Adaptive calibration error over batches. See :func:`adaptive_calibration_error`.

    Exact up to ``max_exact`` pixels. Beyond, pixels that share one of the bins of :mod:`densecal.ops.fine_bins` count as tied, and :attr:`error_bound` says how
    far this could move the value; see :func:`adaptive_bound_from_bins`.

    Args:
        kind: ``"top_label"`` or ``"classwise"``.
        num_classes: Number of classes (or regions); needed for ``"classwise"``.
        num_bins: Number of bins of equal mass.
        threshold: Confidences below are left out, in [0, 1].
        activation: ``"softmax"``, or ``"sigmoid"`` for regions that may overlap.
        max_exact: Pixels, ignored ones included, up to which all are kept, on each rank.
        ignore_index: Label of pixels to leave out.
        validate_args: Look at the values too; that waits for a GPU.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an option is unknown or out of range, or ``"classwise"`` comes without ``num_classes``.

    Example:
        >>> metric = AdaptiveCalibrationError(num_bins=2)
        >>> metric.update(torch.tensor([[[0.6, 0.9], [0.4, 0.1]]]), torch.tensor([[0, 0]]))
        >>> metric.update(torch.tensor([[[0.7, 0.8], [0.3, 0.2]]]), torch.tensor([[1, 0]]))
        >>> metric.compute(), metric.count, metric.error_bound
        (tensor(0.1500, dtype=torch.float64), tensor(4), tensor(0., dtype=torch.float64))
    """

    def __init__(
        self,
        *,
        kind: CalibrationKind = "top_label",
        num_classes: int | None = None,
        num_bins: int = 15,
        threshold: float = 0.0,
        activation: Activation = "softmax",
        max_exact: int = MAX_EXACT,
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        _check_options(num_bins, threshold)
        super().__init__(num_rows_of(kind, num_classes), max_exact=max_exact, **kwargs)
        self.kind: CalibrationKind = kind
        self.num_bins = num_bins
        self.threshold = threshold
        self.activation: Activation = activation
        self.ignore_index = ignore_index
        self.validate_args = validate_args

    def update(self, probs: Tensor, label: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; arguments as :func:`adaptive_calibration_error`."""
        pixels = read_pixels(probs, label, mask, ignore_index=self.ignore_index, activation=self.activation, validate_args=self.validate_args)
        self.add(*_entries(pixels, self.kind, self.threshold))

    def compute(self) -> Tensor:
        """The error, a float64 scalar; NaN where nothing counted."""
        return _mean(self.rows(), self.num_bins)

    def _bound(self, bins: Bins) -> Tensor:
        return adaptive_bound_from_bins(bins, self.num_bins)


def _check_options(num_bins: int, threshold: float) -> None:
    check_positive("num_bins", num_bins)
    if not 0 <= threshold <= 1:
        raise ValueError(f"Expected `threshold` in [0, 1], but got {threshold}.")


def _entries(pixels: Pixels, kind: CalibrationKind, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    confidence, correct, valid = confidence_of(pixels, kind)
    return confidence, correct, valid if threshold == 0 else valid & (confidence >= threshold)


def _mean(rows: list[Bins], num_bins: int) -> Tensor:
    return torch.stack([adaptive_from_bins(bins, num_bins) for bins in rows]).nanmean()


def _quantiles(n: Tensor, num_bins: int) -> Tensor:
    """Numbers of entries at which equal-mass bins begin and end, ``(num_bins + 1,)``."""
    return n * torch.arange(num_bins + 1, dtype=torch.float64, device=n.device) / num_bins
