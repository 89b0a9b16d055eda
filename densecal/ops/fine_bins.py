r"""Bins so narrow, and so much narrower towards 0 and 1, that they keep the order of confidences: for what sorts them (equal-mass bins, risk-coverage curves).

Softmax confidences crowd within 1e-3 of 1, where equal bins would hold them all in one. Here p up to 1/2 is put into bins by its exponent and the first m = 7
bits of its mantissa, and p above 1/2 by those of 1 - p, which float32 holds exactly:

.. math:: (2^e (1 + i/2^m),\; 2^e (1 + (i+1)/2^m)], \quad e = -24, \dots, -2, \quad i = 0, \dots, 2^m - 1

and mirrored, with one bin each for exactly 0, for what is between 0 and 2^-24, for what is between 1 - 2^-24 and 1, and for exactly 1. So

.. math:: \text{width at } p \;\le\; \max(2^{-m} \min(p, 1 - p),\; 2^{-24}), \quad \text{at most } 2^{-(m+2)} = 0.002.

Between 1 - 2^-17 and 1 a bin holds a single float32 number. A bin is (lower, upper].
"""

from __future__ import annotations

import torch
from torch import Tensor

from densecal.ops.binning import Bins, accumulate

__all__ = ["NUM_FINE_BINS", "accumulate_fine_bins", "distinct_bins", "fine_bin_edges", "fine_bin_index"]

_MANTISSA_BITS = 7
_LOWEST = 24  # the smallest 1 - p of a float32 p is 2^-24
_SHIFT = 23 - _MANTISSA_BITS
_REGULAR = (_LOWEST - 1) << _MANTISSA_BITS  # bins from 2^-24 to 1/2
_FIRST = (127 - _LOWEST) << _MANTISSA_BITS  # the exponent and first bits of float32 2^-24

NUM_FINE_BINS = 2 * (_REGULAR + 2)
"""Number of bins: 5892."""


def fine_bin_edges(*, device: torch.device | str | None = None) -> Tensor:
    """Edges of the bins, float64 ``(NUM_FINE_BINS + 1,)``: bin b is ``(edges[b], edges[b + 1]]``; exactly 0 and exactly 1 are bins of no width.

    Example:
        >>> edges = fine_bin_edges()
        >>> edges[[0, 1]], edges[NUM_FINE_BINS // 2], edges[[-2, -1]]
        (tensor([0., 0.], dtype=torch.float64), tensor(0.5000, dtype=torch.float64), tensor([1., 1.], dtype=torch.float64))
    """
    steps = 1 + torch.arange(1 << _MANTISSA_BITS, dtype=torch.float64, device=device) / (1 << _MANTISSA_BITS)
    octaves = torch.exp2(torch.arange(-_LOWEST, -1, dtype=torch.float64, device=device))
    regular = (octaves.unsqueeze(1) * steps).flatten()
    lower = torch.cat([regular.new_zeros(2), regular])
    return torch.cat([lower, regular.new_tensor([0.5]), 1 - lower.flip(0)])


def fine_bin_index(confidence: Tensor) -> Tensor:
    """Bin of each confidence; it never falls where the confidence rises.

    Args:
        confidence: In [0, 1], any shape, floating. Values outside go to the first or last bin, NaN to an arbitrary one. Of float64 the distance to the nearer
            of 0 and 1 is rounded to float32 first.

    Returns:
        Indices in [0, NUM_FINE_BINS), same shape, int64.

    Example:
        >>> fine_bin_index(torch.tensor([0.0, 0.5, 0.5001, 0.999, 0.9991, 1.0]))
        tensor([   0, 2945, 2946, 4094, 4118, 5891])
    """
    p = confidence.detach()
    p = p if p.dtype == torch.float64 else p.float()
    above = p > 0.5
    q = torch.where(above, 1 - p, p).clamp_(min=0).abs_().float()  # abs: a negative zero is a zero
    bits = q.view(torch.int32)
    # A number on an edge belongs below it: down to the smaller q for p itself, up to the larger q for 1 - p.
    place = ((bits - (~above).int()) >> _SHIFT).sub_(_FIRST).clamp_(-1, _REGULAR - 1).add_(2)
    place = place.mul_((bits != 0).int())
    return torch.where(above, NUM_FINE_BINS - 1 - place, place).long()


def accumulate_fine_bins(confidence: Tensor, correct: Tensor, *, row: Tensor | None = None, num_rows: int = 1, valid: Tensor | None = None) -> Bins:
    """Count entries and sum their confidence and correctness per row and fine bin, without waiting for the device.

    Args:
        confidence: In [0, 1], any shape, floating. What it holds where ``valid`` is False does not matter.
        correct: Same shape: bool, or the share of the reference in [0, 1].
        row: Row of each entry in [0, num_rows), int64, broadcastable to ``confidence``. By default everything goes to row 0.
        num_rows: Number of rows R.
        valid: False for entries to leave out, bool, broadcastable to ``confidence``.

    Returns:
        Bins of shape ``(R, NUM_FINE_BINS)``, float64 sums.

    Raises:
        ValueError: If ``correct`` has another shape than ``confidence``.

    Example:
        >>> bins = accumulate_fine_bins(torch.tensor([0.999, 0.9991, 0.2]), torch.tensor([True, False, False]))
        >>> bins.count.nonzero()[:, 1], bins.calibration_error()
        (tensor([2766, 4094, 4118]), tensor([0.4000], dtype=torch.float64))
    """
    return accumulate(
        lambda values: fine_bin_index(values).int() + 1, confidence, correct, num_bins=NUM_FINE_BINS, row=row, num_rows=num_rows, valid=valid
    )


def distinct_bins(confidence: Tensor, correct: Tensor, valid: Tensor | None = None) -> Bins:
    """One bin per distinct confidence, in rising order: nothing is lost but the order of entries that are tied. Waits for the device.

    Args:
        confidence: Any shape, floating.
        correct: Same shape: bool, or the share of the reference in [0, 1].
        valid: False for entries to leave out, bool, broadcastable to ``confidence``.

    Returns:
        Bins of shape ``(1, number of distinct values)``, float64 sums.

    Example:
        >>> distinct_bins(torch.tensor([0.9, 0.5, 0.9]), torch.tensor([True, True, False])).count
        tensor([[1, 2]])
    """
    confidence, correct = confidence.detach(), correct.detach()
    if valid is not None:
        valid = valid.expand_as(confidence)
        confidence, correct = confidence[valid], correct[valid]
    values, place, count = confidence.flatten().unique(return_inverse=True, return_counts=True)
    right = torch.zeros(len(values), dtype=torch.float64, device=values.device).scatter_add_(0, place, correct.flatten().double())
    return Bins(count.unsqueeze(0), (count * values.double()).unsqueeze(0), right.unsqueeze(0))
