"""Calibration error of a segmentation: how far confidence is from accuracy, in every measure that bins of confidence give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from densecal.checks import check_choice, check_positive
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.metrics.inputs import Pixels, read_label_bins, read_pixels
from densecal.ops.activation import Activation, probabilities
from densecal.ops.backend import BACKENDS, Backend
from densecal.ops.binning import MEASURES, Bins, accumulate_bins
from densecal.ops.calibration_bins import CALIBRATION_KINDS, CalibrationKind
from densecal.registry import METRICS

__all__ = [
    "CalibrationError",
    "CalibrationKind",
    "CalibrationPooling",
    "ClasswiseCalibrationError",
    "ExpectedCalibrationError",
    "MaximumCalibrationError",
    "calibration_error",
    "classwise_calibration_error",
    "expected_calibration_error",
    "maximum_calibration_error",
]

CalibrationPooling: TypeAlias = Literal["dataset", "image"]
POOLINGS = ("dataset", "image")


def calibration_error(
    probs: Tensor,
    label: Tensor,
    *,
    measure: str = "expected",
    kind: CalibrationKind = "top_label",
    num_bins: int = 15,
    pooling: CalibrationPooling = "dataset",
    threshold: float = 0.0,
    background: int | None = None,
    average: Literal["macro", "none"] = "macro",
    activation: Activation = "softmax",
    from_logits: bool = False,
    mask: Tensor | None = None,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    backend: Backend = "auto",
    validate_args: bool = True,
) -> Tensor:
    r"""How far confidence is from accuracy in bins of confidence.

    Args:
        probs: Probabilities ``(N, C, *spatial)``, floating, 1 to 3 spatial dims; C at least 2 unless sigmoid.
        label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)``, or a soft reference ``(N, C, *spatial)``, floating; the share that it gives to a class
            then takes the place of right or wrong.
        measure: What becomes of the bins' gaps, a name in :data:`densecal.ops.binning.MEASURES`: ``"expected"``, ``"maximum"``, ``"average"``,
            ``"root_mean_square"``, ``"signed"``, ``"overconfidence"``, ``"underconfidence"``, ``"overconfidence_error"``, ``"debiased_mean_square"`` or
            ``"debiased_root_mean_square"``. See :meth:`densecal.ops.binning.Bins.calibration_error`.
        kind: ``"top_label"``: confidence of the predicted class against whether it is right. ``"classwise"``: probability of each class against whether a
            pixel is of that class, and the mean over classes, absent ones included (static calibration error).
        num_bins: Number of equal bins (lower, upper]; 0 falls into the first and 1 into the last.
        pooling: ``"dataset"``: one set of bins for all pixels. ``"image"``: one per image, and the mean over the images that have a value.
        threshold: Only confidences above it count (thresholded calibration error); 0 counts all, zeros included.
        background: Class to leave out of the classwise mean, by default none.
        average: ``"macro"``: the mean over classes. ``"none"``: one value per class; classwise only.
        activation: What made the probabilities: ``"softmax"``, exclusive classes, or ``"sigmoid"``, one or several regions that may overlap. The top label of
            a region is whether it is there, with confidence max(p, 1 - p); classwise, the probability that it is there counts.
        from_logits: ``probs`` are logits, which become probabilities as ``activation`` says, in at least single precision.
        mask: True where a pixel counts, ``(N, *spatial)``, bool.
        ignore_index: Label of pixels to leave out.
        backend: ``"auto"``: one fused Triton kernel on a GPU, for exclusive classes and label maps, else PyTorch. ``"triton"``: that, or an error. ``"torch"``.
        validate_args: Look at the values too; that waits for a GPU.

    Returns:
        Scalar, or ``(C,)`` for ``average="none"``, float64. NaN where nothing counts; a class for which nothing counts is left out of the mean.

    Raises:
        TypeError: If ``probs`` is not floating or ``mask`` not bool.
        ValueError: If an option is unknown or has no effect, shapes do not fit or, with ``validate_args``, values are out of range.

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599; classwise and thresholded: Nixon et al., "Measuring Calibration in
        Deep Learning", arXiv:1904.01685; classwise per image, and the unweighted average over bins: Barfoot et al., MICCAI 2024, arXiv:2403.06759.

    Example:
        Three pixels of confidence 0.8, two of them right, and one of 0.6, right: gaps of 0.1333 and 0.4.

        >>> probs = torch.tensor([[[0.8, 0.8, 0.2, 0.6], [0.2, 0.2, 0.8, 0.4]]])
        >>> label = torch.tensor([[0, 1, 1, 0]])
        >>> calibration_error(probs, label, measure="maximum")
        tensor(0.4000, dtype=torch.float64)
        >>> calibration_error(probs, label, measure="average")
        tensor(0.2667, dtype=torch.float64)
    """
    definition = _Definition(measure, kind, num_bins, pooling, threshold, background, average)
    reading = _Reading(activation, from_logits, ignore_index, backend, validate_args)
    bins, _ = definition.read(probs, label, mask, reading)
    return definition.reduce(bins.calibration_error(measure))


def expected_calibration_error(probs: Tensor, label: Tensor, **options: Any) -> Tensor:
    r"""Mean gap between accuracy and confidence over bins: :math:`\mathrm{ECE} = \sum_b \tfrac{n_b}{n} \left| \mathrm{acc}_b - \mathrm{conf}_b \right|`.

    Options, shapes and errors as :func:`calibration_error` with ``measure="expected"``.

    Example:
        Three pixels of confidence 0.8, two of them right: | 2/3 - 0.8 | = 0.1333.

        >>> probs = torch.tensor([[[0.8, 0.8, 0.2], [0.2, 0.2, 0.8]]])
        >>> expected_calibration_error(probs, torch.tensor([[0, 1, 1]]))
        tensor(0.1333, dtype=torch.float64)
    """
    return calibration_error(probs, label, measure="expected", **options)


def maximum_calibration_error(probs: Tensor, label: Tensor, **options: Any) -> Tensor:
    r"""Largest gap between accuracy and confidence of a bin: :math:`\mathrm{MCE} = \max_b \left| \mathrm{acc}_b - \mathrm{conf}_b \right|`.

    Options, shapes and errors as :func:`calibration_error` with ``measure="maximum"``.

    Example:
        >>> probs = torch.tensor([[[0.8, 0.8, 0.2, 0.6], [0.2, 0.2, 0.8, 0.4]]])
        >>> maximum_calibration_error(probs, torch.tensor([[0, 1, 1, 0]]))
        tensor(0.4000, dtype=torch.float64)
    """
    return calibration_error(probs, label, measure="maximum", **options)


def classwise_calibration_error(probs: Tensor, label: Tensor, **options: Any) -> Tensor:
    r"""Mean over classes of the expected calibration error of each class's probability (static calibration error).

    Options, shapes and errors as :func:`calibration_error` with ``kind="classwise"``.

    Example:
        The first class has a probability of 0.8 twice, and is there once; the second has 0.2 twice, and is there once.

        >>> classwise_calibration_error(torch.tensor([[[0.8, 0.8], [0.2, 0.2]]]), torch.tensor([[0, 1]]), average="none")
        tensor([0.3000, 0.3000], dtype=torch.float64)
    """
    return calibration_error(probs, label, kind="classwise", **options)


@METRICS.register("calibration_error")
class CalibrationError(Metric):
    """Calibration error with a state of a few bins, and one row of numbers per image where images count. See :func:`calibration_error`.

    Args:
        measure: A name in :data:`densecal.ops.binning.MEASURES`.
        kind: ``"top_label"`` or ``"classwise"``.
        num_classes: Number of classes C, or of regions; needed for ``"classwise"``.
        num_bins: Number of equal bins (lower, upper].
        pooling: ``"dataset"`` or ``"image"``.
        threshold: Only confidences above it count; 0 counts all.
        background: Class to leave out of the classwise mean, by default none.
        average: ``"macro"`` or, classwise, ``"none"``.
        activation: ``"softmax"`` or ``"sigmoid"``.
        from_logits: Predictions are logits; for exclusive classes and label maps no softmax of them is made. A callback that makes probabilities of logits
            is not to do so then.
        ignore_index: Label of pixels to leave out.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``: who fills the bins.
        validate_args: Look at the values too; that waits for a GPU.
        kwargs: Options of ``torchmetrics.Metric``.

    Attributes:
        count: Number of pixels that counted, before a threshold; R times as many for R regions.

    Raises:
        ValueError: If an option is unknown or has no effect, or ``"classwise"`` comes without ``num_classes``.

    Example:
        >>> metric = CalibrationError(measure="overconfidence", pooling="image")
        >>> metric.update(torch.tensor([[[0.8, 0.8], [0.2, 0.2]]]), torch.tensor([[0, 1]]))
        >>> metric.update(torch.tensor([[[0.2], [0.8]]]), torch.tensor([[1]]))
        >>> metric.per_image, metric.compute()
        (tensor([0.3000, 0.0000], dtype=torch.float64), tensor(0.1500, dtype=torch.float64))
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    bin_count: Tensor
    bin_confidence: Tensor
    bin_correct: Tensor
    count: Tensor
    image_values: list[Tensor]

    def __init__(
        self,
        *,
        measure: str = "expected",
        kind: CalibrationKind = "top_label",
        num_classes: int | None = None,
        num_bins: int = 15,
        pooling: CalibrationPooling = "dataset",
        threshold: float = 0.0,
        background: int | None = None,
        average: Literal["macro", "none"] = "macro",
        activation: Activation = "softmax",
        from_logits: bool = False,
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.definition = _Definition(measure, kind, num_bins, pooling, threshold, background, average)
        self.reading = _Reading(activation, from_logits, ignore_index, backend, validate_args)
        if kind == "classwise" and num_classes is None:
            raise ValueError(
                "Expected `num_classes` for kind='classwise', which keeps a row of bins per class. Give the number of channels of `probs`."
            )
        self.num_classes = num_classes
        self.activation: Activation = activation
        self.from_logits = from_logits
        self.num_rows = num_classes if kind == "classwise" and num_classes else 1
        empty = Bins.empty(self.num_rows, num_bins)
        self.add_state("bin_count", empty.count, dist_reduce_fx="sum")
        self.add_state("bin_confidence", empty.confidence, dist_reduce_fx="sum")
        self.add_state("bin_correct", empty.correct, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        if pooling == "image":
            self.add_state("image_values", [], dist_reduce_fx="cat")

    def update(self, probs: Tensor, label: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; arguments as :func:`calibration_error`. With ``pooling="image"`` each row of it is one whole image."""
        if self.num_classes is not None and probs.ndim > 1 and probs.shape[1] != self.num_classes:
            raise ValueError(f"Expected `probs` with {self.num_classes} classes, but got {probs.shape[1]}.")
        bins, count = self.definition.read(probs, label, mask, self.reading)
        if self.definition.pooling == "image":
            self.image_values.append(bins.calibration_error(self.definition.measure))
            bins = bins.sum(0)
        bins = self.bins + bins
        self.bin_count, self.bin_confidence, self.bin_correct = bins.count, bins.confidence, bins.correct
        self.count = self.count + count

    def compute(self) -> Tensor:
        """The error, a float64 scalar or, for ``average="none"``, ``(C,)``; NaN where nothing counted."""
        by_image = self.definition.pooling == "image"
        return self.definition.reduce(self._image_values() if by_image else self.bins.calibration_error(self.definition.measure))

    @property
    def bins(self) -> Bins:
        """What was accumulated over all images, ``(1, num_bins)`` for the top label or ``(C, num_bins)``: a reliability diagram."""
        return Bins(self.bin_count, self.bin_confidence, self.bin_correct)

    @property
    def per_image(self) -> Tensor:
        """The value of each image, in the order in which they came, ``(images,)``, or ``(images, C)`` for ``average="none"``; for ``pooling="image"`` only."""
        if self.definition.pooling != "image":
            raise ValueError("Expected pooling='image' for values per image, but got pooling='dataset'.")
        return self.definition.average_classes(self._image_values())

    def _image_values(self) -> Tensor:
        return dim_zero_cat(self.image_values) if len(self.image_values) else self.bin_confidence.new_zeros(0, self.num_rows)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # A rank without an image takes part in the gathering with no rows of the right width; torchmetrics would send a single-precision vector.
        if self.definition.pooling == "image" and not len(self.image_values):
            self.image_values = [self._image_values()]
        super()._sync_dist(*args, **kwargs)


@METRICS.register("ece")
class ExpectedCalibrationError(CalibrationError):
    """Expected calibration error. Options as :class:`CalibrationError` with ``measure="expected"``; see :func:`expected_calibration_error`.

    Example:
        >>> metric = ExpectedCalibrationError()
        >>> metric.update(torch.tensor([[[0.8, 0.8], [0.2, 0.2]]]), torch.tensor([[0, 1]]))
        >>> metric.update(torch.tensor([[[0.2], [0.8]]]), torch.tensor([[1]]))
        >>> metric.compute(), metric.count
        (tensor(0.1333, dtype=torch.float64), tensor(3))
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, **options: Any) -> None:
        super().__init__(measure="expected", **options)


@METRICS.register("mce")
class MaximumCalibrationError(CalibrationError):
    """Largest gap of a bin. Options as :class:`CalibrationError` with ``measure="maximum"``; see :func:`maximum_calibration_error`.

    Example:
        >>> metric = MaximumCalibrationError()
        >>> metric.update(torch.tensor([[[0.8, 0.8, 0.2, 0.6], [0.2, 0.2, 0.8, 0.4]]]), torch.tensor([[0, 1, 1, 0]]))
        >>> metric.compute()
        tensor(0.4000, dtype=torch.float64)
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, **options: Any) -> None:
        super().__init__(measure="maximum", **options)


@METRICS.register("classwise_ece")
class ClasswiseCalibrationError(CalibrationError):
    """Classwise (static) calibration error. Options as :class:`CalibrationError` with ``kind="classwise"``; see :func:`classwise_calibration_error`.

    Example:
        >>> metric = ClasswiseCalibrationError(2, average="none")
        >>> metric.update(torch.tensor([[[0.8, 0.8], [0.2, 0.2]]]), torch.tensor([[0, 1]]))
        >>> metric.compute()
        tensor([0.3000, 0.3000], dtype=torch.float64)
    """

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(kind="classwise", num_classes=num_classes, **options)


@dataclass(frozen=True)
class _Reading:
    """How predictions and labels are to be read."""

    activation: Activation
    from_logits: bool
    ignore_index: int
    backend: Backend
    validate_args: bool

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, ("softmax", "sigmoid"))
        check_choice("backend", self.backend, BACKENDS)


@dataclass(frozen=True)
class _Definition:
    """What makes one calibration error differ from another, and how to get from pixels to it."""

    measure: str
    kind: CalibrationKind
    num_bins: int
    pooling: CalibrationPooling
    threshold: float
    background: int | None
    average: Literal["macro", "none"]

    def __post_init__(self) -> None:
        check_choice("measure", self.measure, MEASURES)
        check_choice("kind", self.kind, CALIBRATION_KINDS)
        check_positive("num_bins", self.num_bins)
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("average", self.average, ("macro", "none"))
        if not 0 <= self.threshold < 1:
            raise ValueError(f"Expected `threshold` in [0, 1), but got {self.threshold}.")
        if self.kind == "top_label" and (self.background is not None or self.average == "none"):
            raise ValueError(
                f"Expected `background` and `average` only with kind='classwise', but got kind='top_label' with background={self.background} and "
                f"average={self.average!r}. The top label is one number for all classes; a `mask` leaves out pixels."
            )
        if self.background is not None and self.average == "none":
            raise ValueError(f"Expected no `background` with average='none', which has no mean to leave a class out of, but got {self.background}.")

    def read(self, probs: Tensor, label: Tensor, mask: Tensor | None, reading: _Reading) -> tuple[Bins, Tensor]:
        """Bins ``(rows, B)``, or per image ``(N, rows, B)``; one row for the top label, else one per class. And the number of pixels that count."""
        if reading.activation == "softmax":
            read = read_label_bins(
                probs,
                label,
                mask,
                num_bins=self.num_bins,
                kind=self.kind,
                from_logits=reading.from_logits,
                threshold=self.threshold,
                ignore_index=reading.ignore_index,
                backend=reading.backend,
                validate_args=reading.validate_args,
            )
            if read is not None:
                bins, count = read
                self._check_background(bins.count.shape[1])
                return bins.sum(0) if self.pooling == "dataset" else bins, count
        if reading.backend == "triton":
            what = "regions, activation='sigmoid'" if reading.activation == "sigmoid" else "soft labels"
            raise ValueError(
                f"Expected bins that a Triton kernel computes, for backend='triton', but there is none for {what}. Use backend='auto' or 'torch'."
            )
        if reading.from_logits:
            probs = probabilities(probs.to(torch.promote_types(probs.dtype, torch.float32)), reading.activation)
        pixels = read_pixels(
            probs, label, mask, ignore_index=reading.ignore_index, activation=reading.activation, validate_args=reading.validate_args
        )
        return self._bins(pixels), torch.count_nonzero(pixels.valid)

    def _check_background(self, rows: int) -> None:
        if self.background is not None and not (0 <= self.background < rows and rows > 1):
            raise ValueError(f"Expected `background` to be one of several classes 0 to {rows - 1}, but got {self.background}.")

    def _bins(self, pixels: Pixels) -> Bins:
        if self.kind == "top_label":
            confidence, correct = pixels.confidence()
            confidence, correct, valid = confidence.unsqueeze(1), correct.unsqueeze(1), pixels.valid.unsqueeze(1)
        else:
            confidence, correct, valid = pixels.per_class()
        if self.threshold > 0:
            valid = valid & (confidence > self.threshold)
        n, rows = confidence.shape[:2]
        self._check_background(rows)
        row = torch.arange(rows, device=confidence.device).view(1, rows, 1)
        if self.pooling == "dataset":
            return accumulate_bins(confidence, correct, num_bins=self.num_bins, row=row, num_rows=rows, valid=valid)
        row = row + torch.arange(n, device=confidence.device).view(n, 1, 1) * rows
        return accumulate_bins(confidence, correct, num_bins=self.num_bins, row=row, num_rows=n * rows, valid=valid).view(n, rows, self.num_bins)

    def reduce(self, values: Tensor) -> Tensor:
        """From values ``(rows,)``, or per image ``(N, rows)``, to the result."""
        values = self.average_classes(values)
        return values.nanmean(0) if self.pooling == "image" else values

    def average_classes(self, values: Tensor) -> Tensor:
        if self.average == "none":
            return values
        kept = [k for k in range(values.shape[-1]) if k != self.background]
        return values[..., kept].nanmean(-1)
