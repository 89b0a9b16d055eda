"""Smooth calibration error: what is wrong with the confidences after a blur just as wide as the error itself, without bins."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densecal.checks import check_positive
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.metrics.calibration_error import CalibrationKind
from densecal.metrics.inputs import read_pixels
from densecal.metrics.ordered import MAX_EXACT, OrderMetric, confidence_of, fine_row, num_rows_of, one_row, rows_of
from densecal.ops.activation import Activation
from densecal.ops.binning import Bins
from densecal.registry import METRICS

__all__ = ["SmoothCalibrationError", "smooth_bound_from_bins", "smooth_calibration_error", "smooth_from_bins"]

_CELLS = 1 << 13
"""Cells of the grid. A residual shared by two cell centres moves the value by at most 0.97 / (8 sigma^2 cells^2) of its size: 7e-5 of it at sigma = 0.005."""

_STEPS = 30
"""Halvings of [0, 1] for the bandwidth, to 1e-9."""


def smooth_calibration_error(
    probs: Tensor,
    label: Tensor,
    *,
    kind: CalibrationKind = "top_label",
    bandwidth: float | None = None,
    activation: Activation = "softmax",
    mask: Tensor | None = None,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    validate_args: bool = True,
) -> Tensor:
    r"""Smooth calibration error (smECE): the residuals of all pixels, blurred along the confidence by a Gaussian that is reflected at 0 and 1.

    .. math:: \mathrm{smECE}_\sigma = \int_0^1 \Big| \tfrac{1}{n} \sum_i K_\sigma(t, p_i) (y_i - p_i) \Big| \, dt, \qquad
              \mathrm{smECE} = \mathrm{smECE}_{\sigma^*} = \sigma^*

    smECE_sigma falls as sigma grows, so there is one bandwidth that equals the error it gives. The blur is a product in the cosine basis, in which the
    reflected Gaussian has the values exp(-(pi k sigma)^2 / 2); residuals are placed on a grid of 8192 cells before, each shared by the two nearest cells.
    Values below some 2e-4 are the grid's.

    Args:
        probs: Probabilities ``(N, C, *spatial)``, floating, 1 to 3 spatial dims.
        label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)``, or a soft reference ``(N, C, *spatial)``, floating.
        kind: ``"top_label"``: confidence of the predicted class against whether it is right. ``"classwise"``: the mean over classes of the probability of
            each against whether a pixel is of that class.
        bandwidth: sigma, in probability, > 0; by default sigma*.
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
        Błasiok and Nakkiran, "Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing", ICLR 2024, arXiv:2309.12236.
        Differs from the code (relplot): sigma* is searched to 1e-9 rather than 1e-3, and the kernel is not cut at a distance of 0.5.

    Example:
        A single pixel of confidence 0.8 that is right leaves a residual of 0.2, however it is blurred.

        >>> smooth_calibration_error(torch.tensor([[[0.8], [0.2]]]), torch.tensor([[0]]))
        tensor(0.2000, dtype=torch.float64)
    """
    pixels = read_pixels(probs, label, mask, ignore_index=ignore_index, activation=activation, validate_args=validate_args)
    return _mean(rows_of(*confidence_of(pixels, kind)), bandwidth)


def smooth_from_bins(bins: Bins, *, bandwidth: float | None = None) -> Tensor:
    """Smooth calibration error of one row of bins; what shares a bin is placed at its mean confidence.

    Args:
        bins: ``(1, B)`` or ``(B,)``: fine bins, or one bin per distinct confidence.
        bandwidth: sigma, > 0; by default the one that equals the error.

    Returns:
        Scalar, float64; NaN where the bins are empty.

    Raises:
        ValueError: If there are several rows, or ``bandwidth`` is not positive.

    Example:
        >>> from densecal.ops.fine_bins import accumulate_fine_bins
        >>> smooth_from_bins(accumulate_fine_bins(torch.tensor([0.8, 0.8]), torch.tensor([True, False])))
        tensor(0.3000, dtype=torch.float64)
    """
    if bandwidth is not None:
        check_positive("bandwidth", bandwidth)
    bins = one_row(bins)
    device = bins.count.device
    if not bins.count.any():
        return torch.full((), math.nan, dtype=torch.float64, device=device)
    coefficients = _coefficients(bins)
    if bandwidth is None:
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if _blurred(coefficients, middle) > middle else (low, middle)
        bandwidth = (low + high) / 2
    return torch.tensor(_blurred(coefficients, bandwidth), dtype=torch.float64, device=device)


def smooth_bound_from_bins(bins: Bins, *, bandwidth: float | None = None) -> Tensor:
    r"""How far the place of the entries within fine bins could move :func:`smooth_from_bins`.

    A residual that moves by d changes the integral by at most its size times :math:`\int |\partial_p K_\sigma| d = \sqrt{2/\pi}\, d / \sigma`. In a bin (l, u] of mean
    m with g entries, of which R are right, d is at most max(m - l, u - m) and the residuals' sizes sum to at most R (1 - l) + (g - R) u. The sum over bins,
    divided by n, bounds smECE_sigma (so does 1); since that falls in sigma, its crossing with sigma moves by no more than what it moves at the crossing.

    Args:
        bins: ``(1, B)`` or ``(B,)`` fine bins.
        bandwidth: As in :func:`smooth_from_bins`.

    Raises:
        ValueError: If these are not the fine bins or several rows of them, or ``bandwidth`` is not positive.
    """
    sigma = smooth_from_bins(bins) if bandwidth is None else bandwidth
    bins, lower, upper = fine_row(bins)
    mean = torch.where(bins.count > 1, bins.mean_confidence, lower)
    distance = torch.where((lower < upper) & (bins.count > 1), torch.maximum(mean - lower, upper - mean), 0.0)
    size = bins.correct * (1 - lower) + (bins.count - bins.correct) * upper
    return ((math.sqrt(2 / math.pi) / sigma) * (distance * size).sum() / bins.count.sum()).clamp(max=1)


@METRICS.register("smooth_calibration_error")
class SmoothCalibrationError(OrderMetric):
    """Smooth calibration error over batches. See :func:`smooth_calibration_error`.

    Exact, but for the grid, up to ``max_exact`` pixels. Beyond, pixels that share one of the bins of :mod:`densecal.ops.fine_bins` are placed at their mean
    confidence, and :attr:`error_bound` says how far this could move the value; see :func:`smooth_bound_from_bins`.

    Args:
        kind: ``"top_label"`` or ``"classwise"``.
        num_classes: Number of classes (or regions); needed for ``"classwise"``.
        bandwidth: sigma, > 0; by default the one that equals the error.
        activation: ``"softmax"``, or ``"sigmoid"`` for regions that may overlap.
        max_exact: Pixels, ignored ones included, up to which all are kept, on each rank.
        ignore_index: Label of pixels to leave out.
        validate_args: Look at the values too; that waits for a GPU.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an option is unknown or out of range, or ``"classwise"`` comes without ``num_classes``.

    Example:
        >>> metric = SmoothCalibrationError()
        >>> metric.update(torch.tensor([[[0.8, 0.8], [0.2, 0.2]]]), torch.tensor([[0, 1]]))
        >>> metric.compute(), metric.error_bound
        (tensor(0.3000, dtype=torch.float64), tensor(0., dtype=torch.float64))
    """

    def __init__(
        self,
        *,
        kind: CalibrationKind = "top_label",
        num_classes: int | None = None,
        bandwidth: float | None = None,
        activation: Activation = "softmax",
        max_exact: int = MAX_EXACT,
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_rows_of(kind, num_classes), max_exact=max_exact, **kwargs)
        if bandwidth is not None:
            check_positive("bandwidth", bandwidth)
        self.kind: CalibrationKind = kind
        self.bandwidth = bandwidth
        self.activation: Activation = activation
        self.ignore_index = ignore_index
        self.validate_args = validate_args

    def update(self, probs: Tensor, label: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; arguments as :func:`smooth_calibration_error`."""
        pixels = read_pixels(probs, label, mask, ignore_index=self.ignore_index, activation=self.activation, validate_args=self.validate_args)
        self.add(*confidence_of(pixels, self.kind))

    def compute(self) -> Tensor:
        """The error, a float64 scalar; NaN where nothing counted."""
        return _mean(self.rows(), self.bandwidth)

    def _bound(self, bins: Bins) -> Tensor:
        return smooth_bound_from_bins(bins, bandwidth=self.bandwidth)


def _mean(rows: list[Bins], bandwidth: float | None) -> Tensor:
    return torch.stack([smooth_from_bins(bins, bandwidth=bandwidth) for bins in rows]).nanmean()


def _coefficients(bins: Bins) -> np.ndarray:
    """Cosine coefficients of the mean residual on the grid's cell centres."""
    count, confidence, correct = (tensor.cpu().numpy() for tensor in (bins.count, bins.confidence, bins.correct))
    n = count.sum()
    # Beyond the outermost centres a residual lies between one of them and its reflection.
    place = (confidence / count.clip(1) * _CELLS - 0.5).clip(0, _CELLS - 1)
    cell = place.astype(np.int64).clip(0, _CELLS - 2)
    residual = (correct - confidence) / n
    above = (place - cell) * residual
    grid = np.bincount(cell, residual - above, _CELLS) + np.bincount(cell + 1, above, _CELLS)
    # The even extension has period 2, as the reflected Gaussian.
    return np.fft.rfft(np.concatenate([grid, grid[::-1]]))


def _blurred(coefficients: np.ndarray, sigma: float) -> float:
    """Sum over the grid of the size of the residual blurred by sigma: the integral of its density."""
    # NumPy's transform: at this size it is done before torch has woken its threads, and thirty follow each other.
    k = np.arange(len(coefficients))
    return float(np.abs(np.fft.irfft(coefficients * np.exp(-((math.pi * sigma * k) ** 2) / 2))[:_CELLS]).sum())
