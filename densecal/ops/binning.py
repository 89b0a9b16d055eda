r"""Counts and sums per confidence bin: what every calibration measure and every reliability diagram reads.

Bin b of B holds the confidences in :math:`(b/B, (b+1)/B]`; a confidence of 0 falls into the first bin and 1 into the last. An edge is k/B rounded to the
confidence's own precision, so that the nearest number to 0.2 counts as 0.2.

Sums over parts of the data add up to the sums over all of it, so the result does not depend on how the data were cut into batches or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from densecal.checks import check_choice, check_positive, may_look

__all__ = ["MEASURES", "BinSums", "Bins", "accumulate", "accumulate_bins", "accumulate_soft_bins", "bin_edges", "bin_index", "upper_edge"]


MEASURES: dict[str, str] = {
    "expected": "Mean over entries of their bin's |accuracy - confidence|, in [0, 1].",
    "maximum": "Largest |accuracy - confidence| of a bin with anything in it, in [0, 1].",
    "average": "Mean of |accuracy - confidence| over bins with anything in them, each bin counting the same, in [0, 1].",
    "root_mean_square": "Root of the mean over entries of their bin's (accuracy - confidence)^2, in [0, 1].",
    "signed": "Mean over entries of confidence - accuracy, positive for overconfidence, in [-1, 1]; no bins are needed for it.",
    "overconfidence": 'The part of "expected" from bins with confidence above accuracy, in [0, 1].',
    "underconfidence": 'The part of "expected" from bins with confidence below accuracy, in [0, 1].',
    "overconfidence_error": '"overconfidence" with each bin weighted by its confidence as well, in [0, 1].',
    "debiased_mean_square": "Mean over entries of their bin's (accuracy - confidence)^2 less what chance adds to it; can fall below 0.",
    "debiased_root_mean_square": 'Root of "debiased_mean_square", 0 where that is negative.',
}
"""What :meth:`Bins.calibration_error` can make of bins. One sentence each."""


@dataclass(frozen=True)
class Bins:
    """Sums of one or several rows of bins, for example one row per class.

    Args:
        count: Entries per bin, ``(*rows, B)``, int64; float64 where entries are shared between bins.
        confidence: Sum of their confidences, same shape, float64.
        correct: Sum of what was right: 0 or 1 per entry, or the reference's share, same shape, float64.

    Example:
        >>> bins = accumulate_bins(torch.tensor([0.9, 0.8, 0.3]), torch.tensor([True, False, True]), num_bins=2)
        >>> bins.count, bins.calibration_error()
        (tensor([[1, 2]]), tensor([0.4667], dtype=torch.float64))
    """

    count: Tensor
    confidence: Tensor
    correct: Tensor

    @classmethod
    def empty(cls, *shape: int, device: torch.device | str | None = None) -> Bins:
        """Bins of the given shape with nothing in them."""
        sums = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(torch.zeros(shape, dtype=torch.int64, device=device), sums, sums.clone())

    @property
    def num_bins(self) -> int:
        return self.count.shape[-1]

    @property
    def mean_confidence(self) -> Tensor:
        """Mean confidence per bin; NaN where a bin is empty."""
        return self.confidence / self.count

    @property
    def accuracy(self) -> Tensor:
        """Share that was right per bin; NaN where a bin is empty."""
        return self.correct / self.count

    def calibration_error(self, measure: str = "expected") -> Tensor:
        r"""One number per row, ``(*rows,)``, from the gaps :math:`|\mathrm{acc}_b - \mathrm{conf}_b|`; for "expected", :math:`\sum_b \tfrac{n_b}{n}` of them.

        "overconfidence" and "underconfidence" add up to "expected", and "signed" is their difference.

        Debiased measures subtract :math:`\mathrm{acc}_b (1 - \mathrm{acc}_b) / (n_b - 1)` from the squared gap of a bin: the variance of the accuracy that was
        seen around the true one. A bin of one entry says nothing about that variance and is left out, of the weights too. The shares of a soft reference vary
        less than hits and misses do, so that too much is subtracted from them.

        Args:
            measure: A name in :data:`MEASURES`.

        Returns:
            ``(*rows,)``, float64. NaN for a row with nothing in it, or for the debiased measures with no bin of two entries.

        Raises:
            ValueError: If ``measure`` is unknown.

        Reference:
            Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599: expected and maximum. Barfoot et al., "Average
            Calibration Error", MICCAI 2024, arXiv:2403.06759: average. Thulasidasan et al., "On Mixup Training", NeurIPS 2019, arXiv:1905.11001:
            overconfidence error. Kumar et al., "Verified Uncertainty Calibration", NeurIPS 2019, arXiv:1909.10155: debiased.
            Differs from the code of adaptive label perturbation (ASLP), whose "debiased" subtracts conf (1 - conf) / (n - 1): the variance of a calibrated
            model's hits, not of the ones that were seen.

        Example:
            >>> bins = accumulate_bins(torch.tensor([0.9, 0.8, 0.3]), torch.tensor([True, False, True]), num_bins=2)
            >>> bins.calibration_error("maximum"), bins.calibration_error("overconfidence")
            (tensor([0.7000], dtype=torch.float64), tensor([0.2333], dtype=torch.float64))
        """
        check_choice("measure", measure, MEASURES)
        total, filled = self.count.sum(-1), self.count > 0
        excess = self.confidence - self.correct  # n_b (conf_b - acc_b), 0 in empty bins
        if measure == "expected":
            return excess.abs().sum(-1) / total
        if measure == "signed":
            return excess.sum(-1) / total
        if measure == "overconfidence":
            return excess.clamp(min=0).sum(-1) / total
        if measure == "underconfidence":
            return (-excess).clamp(min=0).sum(-1) / total
        count = torch.where(filled, self.count, 1)  # keeps empty bins, and gradients through them, finite
        gap = excess.abs() / count
        if measure == "maximum":
            return torch.where(total > 0, gap.amax(-1), math.nan)
        if measure == "average":
            return gap.sum(-1) / filled.sum(-1)
        if measure == "overconfidence_error":
            return (self.confidence / count * excess.clamp(min=0)).sum(-1) / total
        if measure == "root_mean_square":
            return ((count * gap.square()).sum(-1) / total).sqrt()
        counted = self.count > 1
        accuracy = self.correct / count
        square = gap.square() - accuracy * (1 - accuracy) / torch.where(counted, self.count - 1, 1)
        weight = torch.where(counted, self.count, 0)
        mean_square = (weight * square).sum(-1) / weight.sum(-1)
        return mean_square if measure == "debiased_mean_square" else mean_square.clamp(min=0).sqrt()

    def view(self, *shape: int) -> Bins:
        return Bins(self.count.view(shape), self.confidence.view(shape), self.correct.view(shape))

    def sum(self, dim: int) -> Bins:
        """Merge rows along an axis (not the bins, the last one)."""
        return Bins(self.count.sum(dim), self.confidence.sum(dim), self.correct.sum(dim))

    def __add__(self, other: Bins) -> Bins:
        return Bins(self.count + other.count, self.confidence + other.confidence, self.correct + other.correct)

    def __getitem__(self, index: int | tuple[int | slice, ...]) -> Bins:
        return Bins(self.count[index], self.confidence[index], self.correct[index])


def bin_edges(num_bins: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
    """Edges 0, 1/B, ..., 1 rounded to ``dtype``, ``(B + 1,)``.

    Raises:
        ValueError: If ``num_bins`` is not positive.

    Example:
        >>> bin_edges(4)
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    check_positive("num_bins", num_bins)
    return (torch.arange(num_bins + 1, dtype=torch.float64, device=device) / num_bins).to(dtype)


def bin_index(confidence: Tensor, num_bins: int) -> Tensor:
    """Bin of each confidence.

    Args:
        confidence: In [0, 1], any shape, floating. Rounding beyond 0 or 1 does no harm; what is far outside or NaN goes to an arbitrary bin.
        num_bins: Number of bins B, at least 1; for half precision not so many that bins are narrower than its steps (256 for bfloat16).

    Returns:
        Indices in [0, B), same shape, int64.

    Raises:
        ValueError: If ``num_bins`` is not positive.

    Example:
        >>> bin_index(torch.tensor([0.0, 0.25, 0.26, 0.5, 1.0]), num_bins=4)
        tensor([0, 0, 1, 1, 3])
    """
    check_positive("num_bins", num_bins)
    return upper_edge(confidence, num_bins).long() - 1


def accumulate_bins(
    confidence: Tensor,
    correct: Tensor,
    *,
    num_bins: int,
    row: Tensor | None = None,
    num_rows: int = 1,
    valid: Tensor | None = None,
) -> Bins:
    """Count entries and sum their confidence and correctness per row and bin, without waiting for the device.

    Args:
        confidence: In [0, 1], any shape, floating. What it holds where ``valid`` is False does not matter.
        correct: Same shape: bool, or the share of the reference in [0, 1].
        num_bins: Number of bins B, at least 1.
        row: Row of each entry in [0, num_rows), int64, broadcastable to ``confidence``. By default everything goes to row 0.
        num_rows: Number of rows R.
        valid: False for entries to leave out, bool, broadcastable to ``confidence``.

    Returns:
        Bins of shape ``(R, B)``, float64 sums.

    Raises:
        ValueError: If ``num_bins`` is not positive, or ``correct`` has another shape than ``confidence``.

    Example:
        >>> bins = accumulate_bins(torch.tensor([0.9, 0.7, 0.2]), torch.tensor([1.0, 0.5, 0.0]), num_bins=2, row=torch.tensor([0, 0, 1]), num_rows=2)
        >>> bins.correct
        tensor([[0.0000, 1.5000],
                [0.0000, 0.0000]], dtype=torch.float64)
    """
    check_positive("num_bins", num_bins)
    return accumulate(lambda values: upper_edge(values, num_bins), confidence, correct, num_bins=num_bins, row=row, num_rows=num_rows, valid=valid)


def accumulate(
    number: Callable[[Tensor], Tensor],
    confidence: Tensor,
    correct: Tensor,
    *,
    num_bins: int,
    row: Tensor | None = None,
    num_rows: int = 1,
    valid: Tensor | None = None,
) -> Bins:
    """:func:`accumulate_bins` for bins of any kind: ``number`` gives the bin of confidences, counted from 1, as a new int32 tensor of their shape."""
    if confidence.shape != correct.shape:
        raise ValueError(f"Expected `correct` of the shape of `confidence`, {tuple(confidence.shape)}, but got {tuple(correct.shape)}.")
    confidence, correct = torch.atleast_1d(confidence), torch.atleast_1d(correct)
    on_cpu = confidence.device.type == "cpu"
    if valid is not None and may_look(valid) and bool(valid.all()):
        valid = None
    length, threads = confidence.shape[-1], torch.get_num_threads() if may_look(confidence) else 1
    width = max(1, threads * _BLOCK * length // max(confidence.numel(), 1) // threads * threads) if on_cpu else max(length, 1)
    sums = BinSums(num_bins, num_rows, hard=correct.dtype == torch.bool, device=confidence.device)
    for start in range(0, length, width):
        end = start + width
        values, right = confidence[..., start:end], correct[..., start:end]
        sums.add(number(values), values, right, row=_stretch(row, start, end), valid=_stretch(valid, start, end))
    return sums.bins()


class BinSums:
    """Sums of bins that entries are added to block by block.

    Entries of one bin in a row would wait for each other's sum, so neighbours go to different lanes, and threads have their own sums. Whether an entry was
    right is part of its slot, unless it was right in part. Slot 0 takes what does not count: picking entries by a mask would need their number on the host.

    Args:
        num_bins: Number of bins B.
        num_rows: Number of rows R.
        hard: Whether entries are right or wrong (bool), rather than right in part.
        device: Of the entries.

    Example:
        >>> sums = BinSums(2, 1, hard=True)
        >>> for confidence, right in ((0.9, True), (0.8, False)):
        ...     values = torch.tensor([confidence])
        ...     sums.add((bin_index(values, 2) + 1).int(), values, torch.tensor([right]))
        >>> sums.bins().count, sums.bins().correct
        (tensor([[0, 2]]), tensor([[0., 1.]], dtype=torch.float64))
    """

    def __init__(self, num_bins: int, num_rows: int, *, hard: bool, device: torch.device | str | None = None) -> None:
        self.num_bins, self.num_rows, self.kinds = num_bins, num_rows, 2 if hard else 1
        self.threads = torch.get_num_threads() if torch.device(device or "cpu").type == "cpu" and not torch.compiler.is_compiling() else 1
        slots = (num_rows * num_bins + 1) * self.kinds * _LANES
        self.tables = [torch.zeros(self.threads, slots, dtype=torch.float64, device=device) for _ in range(2 if hard else 3)]
        self._ones = self.tables[0].new_ones(())
        self._lane = torch.empty(0, dtype=torch.int32, device=device)

    def add(self, number: Tensor, confidence: Tensor, correct: Tensor, *, row: Tensor | None = None, valid: Tensor | None = None) -> None:
        """Add entries.

        Args:
            number: Bin of each entry counted from 1, int32, any shape with an axis; may be overwritten.
            confidence: Same shape.
            correct: Same shape, bool if ``hard``.
            row: As :func:`accumulate_bins` takes it.
            valid: Likewise.
        """
        width = number.shape[-1]
        if len(self._lane) < width:
            self._lane = torch.arange(width, dtype=torch.int32, device=number.device).bitwise_and_(_LANES - 1)
        slot = torch.add(self._lane[:width], number, alpha=self.kinds * _LANES)
        if row is not None:
            slot = slot.add_(row.int() * (self.num_bins * self.kinds * _LANES))
        if self.kinds == 2:
            slot = slot.add_(correct, alpha=_LANES)
        if valid is not None:
            slot = slot.mul_(valid)
        index = slot.reshape(self.threads if slot.numel() % self.threads == 0 else 1, -1).long()
        if index.device.type == "cpu" and self._ones.shape != index.shape:
            self._ones = torch.ones_like(index, dtype=torch.float64)  # a single one, expanded, would take a CPU twice the time
        for table, summand in zip(self.tables, (self._ones, confidence, correct), strict=False):
            summand = summand.double().reshape(index.shape) if summand.ndim else summand.expand_as(index)
            table[: len(index)].scatter_add_(1, index, summand)

    def bins(self) -> Bins:
        """What was added so far, ``(R, B)``."""
        sums = [
            table.view(self.threads, -1, self.kinds, _LANES).sum((0, 3))[1:].view(self.num_rows, self.num_bins, self.kinds) for table in self.tables
        ]
        return Bins(sums[0].sum(-1).long(), sums[1].sum(-1), sums[0][..., 1] if self.kinds == 2 else sums[2].squeeze(-1))


def accumulate_soft_bins(
    confidence: Tensor,
    correct: Tensor,
    *,
    num_bins: int,
    row: Tensor | None = None,
    num_rows: int = 1,
    valid: Tensor | None = None,
) -> Bins:
    """:func:`accumulate_bins` where each entry is shared between the two bins whose centres it lies between, the nearer one getting more.

    The share falls linearly from 1 at a bin's centre to 0 at the centres beside it: a triangular kernel. Below the first centre and above the last there
    is one bin, which gets all. Shares are constants for the gradient.

    Args:
        confidence: In [0, 1], any shape, floating.
        correct: Same shape, in [0, 1].
        num_bins: Number of bins B, at least 1.
        row: Row of each entry in [0, num_rows), int64, broadcastable to ``confidence``.
        num_rows: Number of rows R.
        valid: False for entries to leave out, bool, broadcastable to ``confidence``.

    Returns:
        Bins of shape ``(R, B)``, float64 sums and counts.

    Raises:
        ValueError: If ``num_bins`` is not positive, or ``correct`` has another shape than ``confidence``.

    Example:
        >>> accumulate_soft_bins(torch.tensor([0.1, 0.5, 0.6]), torch.zeros(3), num_bins=2).count  # centres 0.25 and 0.75
        tensor([[1.8000, 1.2000]], dtype=torch.float64)
    """
    check_positive("num_bins", num_bins)
    if confidence.shape != correct.shape:
        raise ValueError(f"Expected `correct` of the shape of `confidence`, {tuple(confidence.shape)}, but got {tuple(correct.shape)}.")
    p, q = confidence.double(), correct.double()
    place = (p.detach() * num_bins - 0.5).clamp(0, num_bins - 1)  # in units of the bins' width, 0 at the first centre
    lower = place.floor()
    above = place - lower
    slot = lower.long()
    sums = torch.zeros(3, num_rows * num_bins, dtype=torch.float64, device=p.device)
    for share, step in ((1.0 - above, 0), (above, 1)):
        share = share if valid is None else torch.where(valid, share, 0.0)
        index = (slot + step).clamp(max=num_bins - 1)  # beyond the last bin the share is 0
        index = (index if row is None else index + row * num_bins).reshape(-1)
        parts = torch.stack([part.reshape(-1) for part in (share, share * p, share * q)])
        sums = sums.scatter_add(1, index.expand(3, -1), parts)
    return Bins(*(total.view(num_rows, num_bins) for total in sums))


_BLOCK = 1 << 17
"""Entries that a thread of a CPU takes at a time, so that what is computed on the way stays in its cache."""

_LANES = 4
"""Copies of each sum, a power of 2, which make a CPU up to three times faster where most entries fall into one bin, as with many classes."""


def upper_edge(confidence: Tensor, num_bins: int) -> Tensor:
    """Number of the edge at or above each confidence, which closes its bin, in 1 to B, as a new int32 tensor.

    Example:
        >>> upper_edge(torch.tensor([0.0, 0.25, 0.26, 1.0]), 4)
        tensor([1, 1, 2, 4], dtype=torch.int32)
    """
    dtype = confidence.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    confidence = confidence.detach().float() if half else confidence.detach()
    # Above an edge k/B as it is rounded, confidence * B does not round to less than k; on it or below it may round to k. So the edge that was passed is k or
    # k - 1, and the sign of what is left tells. Everything is arithmetic on floats, which a CPU does ten times faster than a search or comparisons.
    passed = (confidence * num_bins).trunc_()
    edge = passed / num_bins
    if half:
        edge = edge.to(dtype).float()  # one division rounds to single precision, and this to what a direct rounding would give
    return passed.add_((confidence - edge).ceil_()).int().clamp_(1, num_bins)


def _stretch(tensor: Tensor | None, start: int, end: int) -> Tensor | None:
    """Part of the last axis, or the tensor itself where it is broadcast along that axis."""
    return tensor if tensor is None or tensor.ndim == 0 or tensor.shape[-1] == 1 else tensor[..., start:end]
