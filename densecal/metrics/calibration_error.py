"""Expected calibration error of a segmentation, pooled over all pixels that are fed."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric

from densecal.checks import check_choice, check_positive
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.metrics.inputs import Pixels, read_pixels
from densecal.ops.binning import Bins, accumulate_bins
from densecal.registry import METRICS

__all__ = ["CalibrationKind", "ExpectedCalibrationError", "expected_calibration_error"]

CalibrationKind: TypeAlias = Literal["top_label", "classwise"]
KINDS = ("top_label", "classwise")


def expected_calibration_error(
    probs: Tensor,
    label: Tensor,
    *,
    kind: CalibrationKind = "top_label",
    num_bins: int = 15,
    mask: Tensor | None = None,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    validate_args: bool = True,
) -> Tensor:
    r"""How far confidence is from accuracy, averaged over bins of confidence, pooled over all pixels.

    .. math:: \mathrm{ECE} = \sum_b \tfrac{n_b}{n} \left| \mathrm{acc}_b - \mathrm{conf}_b \right|

    Args:
        probs: Probabilities ``(N, C, *spatial)``, floating, C at least 2, 1 to 3 spatial dims.
        label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)``, or a soft reference ``(N, C, *spatial)``, floating; the share that it gives to a class
            then takes the place of right or wrong.
        kind: ``"top_label"``: confidence of the predicted class against whether it is right. ``"classwise"``: probability of each class against whether a
            pixel is of that class, and the mean over all C classes, background and absent ones included (static calibration error).
        num_bins: Number of equal bins (lower, upper]; 0 falls into the first and 1 into the last.
        mask: True where a pixel counts, ``(N, *spatial)``, bool.
        ignore_index: Label of pixels to leave out.
        validate_args: Look at the values too; that waits for a GPU.

    Returns:
        Scalar in [0, 1], float64. NaN where no pixel counts.

    Raises:
        TypeError: If ``probs`` is not floating or ``mask`` not bool.
        ValueError: If an option is unknown, shapes do not fit or, with ``validate_args``, values are out of range.

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599; classwise: Nixon et al., "Measuring Calibration in Deep
        Learning", arXiv:1904.01685.

    Example:
        Three pixels of confidence 0.8, two of them right: | 2/3 - 0.8 | = 0.1333.

        >>> probs = torch.tensor([[[0.8, 0.8, 0.2], [0.2, 0.2, 0.8]]])
        >>> expected_calibration_error(probs, torch.tensor([[0, 1, 1]]))
        tensor(0.1333, dtype=torch.float64)
    """
    _check_options(kind, num_bins)
    pixels = read_pixels(probs, label, mask, ignore_index=ignore_index, validate_args=validate_args)
    return _bins(pixels, kind, num_bins).calibration_error().mean()


@METRICS.register("ece")
class ExpectedCalibrationError(Metric):
    """Expected calibration error with a state of a few bins, whatever the number of pixels. See :func:`expected_calibration_error`.

    Args:
        kind: ``"top_label"`` or ``"classwise"``.
        num_classes: Number of classes C; needed for ``"classwise"``.
        num_bins: Number of equal bins (lower, upper].
        ignore_index: Label of pixels to leave out.
        validate_args: Look at the values too; that waits for a GPU.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an option is unknown, or ``"classwise"`` comes without ``num_classes``.

    Example:
        >>> metric = ExpectedCalibrationError()
        >>> metric.update(torch.tensor([[[0.8, 0.8], [0.2, 0.2]]]), torch.tensor([[0, 1]]))
        >>> metric.update(torch.tensor([[[0.2], [0.8]]]), torch.tensor([[1]]))
        >>> metric.compute(), metric.count
        (tensor(0.1333, dtype=torch.float64), tensor(3))
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    bin_count: Tensor
    bin_confidence: Tensor
    bin_correct: Tensor

    def __init__(
        self,
        *,
        kind: CalibrationKind = "top_label",
        num_classes: int | None = None,
        num_bins: int = 15,
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_options(kind, num_bins)
        if kind == "classwise" and num_classes is None:
            raise ValueError(
                "Expected `num_classes` for kind='classwise', which keeps a row of bins per class. Give the number of channels of `probs`."
            )
        self.kind: CalibrationKind = kind
        self.num_classes = num_classes
        self.num_bins = num_bins
        self.ignore_index = ignore_index
        self.validate_args = validate_args
        empty = Bins.empty(num_classes if kind == "classwise" and num_classes else 1, num_bins)
        self.add_state("bin_count", empty.count, dist_reduce_fx="sum")
        self.add_state("bin_confidence", empty.confidence, dist_reduce_fx="sum")
        self.add_state("bin_correct", empty.correct, dist_reduce_fx="sum")

    def update(self, probs: Tensor, label: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; arguments as :func:`expected_calibration_error`."""
        pixels = read_pixels(probs, label, mask, ignore_index=self.ignore_index, validate_args=self.validate_args)
        if self.num_classes is not None and pixels.num_classes != self.num_classes:
            raise ValueError(f"Expected `probs` with {self.num_classes} classes, but got {pixels.num_classes}.")
        bins = self.bins + _bins(pixels, self.kind, self.num_bins)
        self.bin_count, self.bin_confidence, self.bin_correct = bins.count, bins.confidence, bins.correct

    def compute(self) -> Tensor:
        """The error, a float64 scalar; NaN where nothing counted."""
        return self.bins.calibration_error().mean()

    @property
    def bins(self) -> Bins:
        """What was accumulated, ``(1, num_bins)`` for the top label or ``(C, num_bins)``: a reliability diagram."""
        return Bins(self.bin_count, self.bin_confidence, self.bin_correct)

    @property
    def count(self) -> Tensor:
        """Number of pixels that counted."""
        return self.bin_count[0].sum()


def _check_options(kind: str, num_bins: int) -> None:
    check_choice("kind", kind, KINDS)
    check_positive("num_bins", num_bins)


def _bins(pixels: Pixels, kind: CalibrationKind, num_bins: int) -> Bins:
    if kind == "top_label":
        confidence, _, correct = pixels.top_label()
        return accumulate_bins(confidence, correct, num_bins=num_bins, valid=pixels.valid)
    probs, shares, valid = pixels.per_class()
    row = torch.arange(pixels.num_classes, device=probs.device).view(1, -1, 1)
    return accumulate_bins(probs, shares, num_bins=num_bins, row=row, num_rows=pixels.num_classes, valid=valid)
