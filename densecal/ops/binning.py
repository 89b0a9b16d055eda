r"""Counts and sums per confidence bin: what every calibration measure and every reliability diagram reads.

Bin b of B holds the confidences in :math:`(b/B, (b+1)/B]`; a confidence of 0 falls into the first bin and 1 into the last. An edge is k/B rounded to the
confidence's own precision, so that the nearest number to 0.2 counts as 0.2.

Sums over parts of the data add up to the sums over all of it, so the result does not depend on how the data were cut into batches or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from densecal.checks import check_positive

__all__ = ["Bins", "accumulate_bins", "accumulate_soft_bins", "bin_edges", "bin_index"]


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

    def calibration_error(self) -> Tensor:
        r"""Expected calibration error per row, ``(*rows,)``: :math:`\sum_b \tfrac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|`. NaN for a row with nothing in it."""
        return (self.correct - self.confidence).abs().sum(-1) / self.count.sum(-1)

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
        confidence: In [0, 1], any shape, floating. Values outside go to the first or last bin, NaN to an arbitrary one.
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
    dtype = confidence.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    confidence = confidence.detach().float() if half else confidence.detach()

    def edge(k: Tensor) -> Tensor:
        # One division rounds to the precision of k; half precision then rounds once more, to what a direct rounding would give.
        return (k / num_bins).to(dtype).float() if half else k / num_bins

    # Multiplying is some ten times faster than a search among the edges (torch.bucketize), but rounds: one step back or forth makes it exact.
    index = (confidence * num_bins).ceil_().sub_(1).nan_to_num_(0.0).clamp_(0, num_bins - 1)
    index = index.sub_((confidence <= edge(index)).to(index.dtype)).clamp_(min=0)
    index = index.add_((confidence > edge(index + 1)).to(index.dtype)).clamp_(max=num_bins - 1)
    return index.long()


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
    if confidence.shape != correct.shape:
        raise ValueError(f"Expected `correct` of the shape of `confidence`, {tuple(confidence.shape)}, but got {tuple(correct.shape)}.")
    if confidence.device.type != "cpu" or confidence.numel() <= _BLOCK:
        return _accumulate(confidence, correct, row, valid, num_bins=num_bins, num_rows=num_rows)
    bins = Bins.empty(num_rows, num_bins)
    width = max(1, _BLOCK * confidence.shape[-1] // confidence.numel())
    for start in range(0, confidence.shape[-1], width):
        end = start + width
        bins = bins + _accumulate(
            confidence[..., start:end],
            correct[..., start:end],
            _stretch(row, start, end),
            _stretch(valid, start, end),
            num_bins=num_bins,
            num_rows=num_rows,
        )
    return bins


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


_BLOCK = 1 << 16
"""Entries that a CPU takes at a time, so that what is computed on the way stays in its cache."""


def _stretch(tensor: Tensor | None, start: int, end: int) -> Tensor | None:
    """Part of the last axis, or the tensor itself where it is broadcast along that axis."""
    return tensor if tensor is None or tensor.ndim == 0 or tensor.shape[-1] == 1 else tensor[..., start:end]


def _accumulate(confidence: Tensor, correct: Tensor, row: Tensor | None, valid: Tensor | None, *, num_bins: int, num_rows: int) -> Bins:
    slot = bin_index(confidence, num_bins)
    if row is not None:
        slot = slot + row * num_bins
    # One slot more than there are bins takes what does not count: picking entries by a mask would need their number on the host.
    slots = num_rows * num_bins
    if valid is not None:
        slot = torch.where(valid, slot, slots)
        confidence = torch.where(valid, confidence, 0.0)
        correct = torch.where(valid, correct, torch.zeros((), dtype=correct.dtype, device=correct.device))
    slot = slot.reshape(-1)
    sums = torch.zeros(slots + 1, dtype=torch.float64, device=confidence.device)
    count = torch.zeros(slots + 1, dtype=torch.int64, device=confidence.device).scatter_add_(0, slot, slot.new_ones(()).expand_as(slot))
    sum_confidence = sums.scatter_add(0, slot, confidence.reshape(-1).double())
    sum_correct = sums.scatter_add(0, slot, correct.reshape(-1).double())
    return Bins(*(total[:slots].view(num_rows, num_bins) for total in (count, sum_confidence, sum_correct)))
