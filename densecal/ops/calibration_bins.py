r"""Bins of confidence and correctness of a prediction against a label map, in one read of the prediction: what an update of a calibration metric is.

With probabilities p of a pixel, or logits z of which they are the softmax:

=============  ==========================================================  ====================  ===================
kind           confidence                                                  right                 rows
=============  ==========================================================  ====================  ===================
top label      :math:`\max_c p_c = 1 / \sum_c e^{z_c - \max_j z_j}`        the first largest     1
classwise      :math:`p_c` of every class                                  :math:`y = c`         C, one per class
=============  ==========================================================  ====================  ===================

The top label needs no softmax: a largest value, a sum of exponentials and one comparison. On a CPU blocks of pixels stay in the cache while they are looked at, so
that nothing of the size of the prediction is made. :mod:`densecal.ops.triton.calibration_bins` is the same in one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from densecal.checks import check_choice, check_positive, may_look
from densecal.ops.binning import Bins, BinSums, upper_edge

__all__ = ["CALIBRATION_KINDS", "CalibrationKind", "calibration_bins", "is_top_label"]

CalibrationKind: TypeAlias = Literal["top_label", "classwise"]
CALIBRATION_KINDS = ("top_label", "classwise")

_PIXELS = 1 << 16
"""Pixels that a thread of a CPU takes at a time, or half the entries where all classes are binned; PyTorch does not share fewer than half as many among threads."""
_NO_ORDER = (torch.bool, torch.uint16, torch.uint32, torch.uint64)
"""Types that PyTorch finds no smallest number of."""
_VALUES = 1 << 22
"""Entries of a block at most, so that many classes fit into a cache, too."""


def calibration_bins(
    values: Tensor,
    labels: Tensor,
    *,
    num_bins: int,
    kind: CalibrationKind = "top_label",
    from_logits: bool = False,
    ignore_index: int,
    mask: Tensor | None = None,
    threshold: float = 0.0,
    look: Callable[[Tensor, Tensor], None] | None = None,
) -> Bins:
    """Count pixels and sum their confidence and correctness per image, row and bin, without waiting for the device.

    Args:
        values: Probabilities, or logits, ``(N, C, *spatial)``, floating. What they hold where a pixel does not count does not matter.
        labels: ``(N, *spatial)``: classes in [0, C) or ``ignore_index``, any integer type, or whole numbers of a floating one.
        num_bins: Number of bins B, at least 1.
        kind: ``"top_label"``, one row: the most probable class, the first of tied ones. ``"classwise"``: a row per class.
        from_logits: ``values`` are logits, of which the confidence is computed in at least single precision.
        ignore_index: Label of pixels to leave out.
        mask: False for pixels to leave out, ``(N, *spatial)``, bool.
        threshold: Only confidences above it count; 0 counts all.
        look: Handed each block of values ``(N, C, P)`` and the largest of each pixel, ``(N, P)``, while they are in the cache.

    Returns:
        Bins of shape ``(N, 1, B)`` or ``(N, C, B)``, float64 sums.

    Raises:
        ValueError: If ``num_bins`` is not positive, or ``kind`` unknown.

    Example:
        >>> bins = calibration_bins(torch.tensor([[[0.9, 0.2, 0.7], [0.1, 0.8, 0.3]]]), torch.tensor([[0, 0, 255]]), num_bins=2, ignore_index=255)
        >>> bins.count, bins.correct
        (tensor([[[0, 2]]]), tensor([[[0., 1.]]], dtype=torch.float64))
    """
    check_positive("num_bins", num_bins)
    check_choice("kind", kind, CALIBRATION_KINDS)
    n, c = values.shape[:2]
    flat, labels = values.detach().flatten(2), labels.flatten(1)
    labels = labels.long() if labels.dtype in _NO_ORDER else labels
    mask = None if mask is None else mask.flatten(1)
    rows, size = 1 if kind == "top_label" else c, flat.shape[2]
    width = max(size, 1)
    everywhere = False
    if may_look(flat) and labels.numel():
        entries = torch.get_num_threads() * _PIXELS
        width = max(1, (2 * entries // rows if rows > 1 else min(entries, _VALUES // c)) // n)
        low, high = labels.aminmax()
        everywhere = mask is None and not int(low) <= ignore_index <= int(high)
    sums = BinSums(num_bins, n * rows, hard=True, device=flat.device)
    classes = torch.arange(c, device=flat.device).view(1, c, 1)
    row = torch.arange(n * rows, device=flat.device).view(n, rows, 1) if n * rows > 1 else None
    for start in range(0, size, width):
        block = flat[..., start : start + width]
        if block.dtype in (torch.float16, torch.bfloat16):
            block = block.float()
        label = labels[:, start : start + width].long()
        valid: Tensor | None = None
        if not everywhere:
            valid = label != ignore_index
            valid = valid if mask is None else valid & mask[:, start : start + width]
            label, valid = torch.where(valid, label, 0), valid.unsqueeze(1)
        largest = block.amax(1)
        if look is not None:
            look(block, largest)
        if kind == "top_label":
            top = (block - largest.unsqueeze(1)).exp_().sum(1).reciprocal_() if from_logits else largest
            confidence, correct = top.unsqueeze(1), is_top_label(block, label, largest, confidence=top).unsqueeze(1)
        else:
            confidence, correct = block.softmax(1) if from_logits else block, label.unsqueeze(1) == classes
        if threshold > 0:
            valid = confidence > threshold if valid is None else valid & (confidence > threshold)
        sums.add(upper_edge(confidence, num_bins), confidence, correct, row=row, valid=valid)
    return sums.bins().view(n, rows, num_bins)


def is_top_label(values: Tensor, label: Tensor, largest: Tensor, *, confidence: Tensor) -> Tensor:
    """Whether the label is the class with the largest value, the first of tied ones, which is faster to say on a CPU than which class it is.

    Args:
        values: Probabilities or logits, ``(N, C, P)``.
        label: Classes in [0, C), ``(N, P)``, int64.
        largest: Largest value of each pixel, ``(N, P)``.
        confidence: Its probability, ``(N, P)``. Two classes share the largest only where it is at most 1/2, give or take what rounding does to their sum.

    Returns:
        ``(N, P)``, bool.

    Example:
        >>> values = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])
        >>> is_top_label(values, torch.tensor([[0, 1]]), values.amax(1), confidence=values.amax(1))
        tensor([[ True, False]])
    """
    if not may_look(values):
        return values.argmax(1) == label
    correct = values.gather(1, label.unsqueeze(1)).squeeze(1) == largest
    for n, candidates in enumerate((confidence.numpy() <= 0.51) & correct.numpy()):
        places = torch.from_numpy(candidates.nonzero()[0])
        equal = values[n].gather(1, places.expand(values.shape[1], -1)) == largest[n, places]
        if int(equal.count_nonzero()) > len(places):
            correct[n, places] = equal.byte().argmax(0) == label[n, places]
    return correct
