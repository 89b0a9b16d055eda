r"""Several losses of one prediction against one label map, whose distributions are functions of the few labels around a pixel.

Here is what they are; :mod:`densecal.ops.triton.label_losses` computes the same without building a distribution, in one pass over the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from densecal.ops.backend import NotCovered
from densecal.ops.boundary import boundary_region, window_maximum
from densecal.ops.neighbourhood import Border, Kernel, normalized_convolution
from densecal.ops.overlap import overlap_sums
from densecal.ops.soft_cross_entropy import soft_cross_entropy

__all__ = [
    "CrossEntropyPart",
    "LabelShares",
    "MarginPart",
    "NeighbourPart",
    "OverlapCounts",
    "OverlapPart",
    "Part",
    "PixelLoss",
    "label_losses",
]


@dataclass(frozen=True, eq=False)
class LabelShares:
    r"""A distribution that follows from a label map.

    .. math:: q(x) = (1 - \epsilon(x))\, \tau(x) + \epsilon(x) / C

    Args:
        kernel: Window of the class shares :math:`\tau`; None is the label itself.
        border: What lies outside of the image for ``kernel``.
        smoothing: The share :math:`\epsilon`, a number or a tensor: 0-d, or ``(N, 1, ..., 1)`` for one per image.
        boundary: Sides of a window, one per axis: smooth only where it holds another label and no ignored pixel. None smooths everywhere.
    """

    kernel: Kernel | None = None
    border: Border = "replicate"
    smoothing: float | Tensor = 0.0
    boundary: tuple[int, ...] | None = None

    @property
    def is_one_hot(self) -> bool:
        """Whether it is all of a pixel's share on its label; a tensor is not looked at."""
        return self.kernel is None and not isinstance(self.smoothing, Tensor) and self.smoothing == 0

    def __call__(self, classes: Tensor, valid: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
        """``(N, C, *spatial)`` from classes ``(N, *spatial)``, int64, 0 where not valid."""
        mask = valid.unsqueeze(1)
        shares = F.one_hot(classes, num_classes).movedim(-1, 1).to(dtype) * mask
        if self.kernel is not None:
            shares = normalized_convolution(shares, valid, self.kernel, border=self.border)
        even: float | Tensor = self.smoothing
        if self.boundary is not None:
            near_ignored = window_maximum((~mask).to(dtype), self.boundary) > 0
            even = even * (boundary_region(classes.unsqueeze(1).to(dtype), valid, kernel_size=self.boundary) & ~near_ignored).to(dtype)
        return torch.where(mask, (1.0 - even) * shares + even / num_classes, 0.0)


@dataclass(frozen=True, eq=False)
class CrossEntropyPart:
    r""":math:`-\sum_c w_c\, q_c \log p_c` per pixel; what it counts is :math:`w_{y(x)}`, or 1 without weights."""

    shares: LabelShares
    class_weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class NeighbourPart:
    r""":math:`\frac1C \sum_c |\tau_c - z_c|^d` per pixel, d = 1 for ``"l1"`` and 2 for ``"l2"``."""

    shares: LabelShares
    distance: Literal["l1", "l2"] = "l1"


@dataclass(frozen=True, eq=False)
class MarginPart:
    r""":math:`a \sum_c \max(0, z_{max} - z_c - m)^d + b \max(0, z_{max} - m)^2` per pixel, d = 2 if ``squared``, else 1.

    With ``detached``, no gradient goes through the :math:`z_{max}` of the sum. Where several logits are the largest, they share its gradient evenly.
    """

    margin: float
    squared: bool
    scale_others: float
    scale_largest: float = 0.0
    detached: bool = False


@dataclass(frozen=True, eq=False)
class OverlapPart:
    """The sums of :func:`densecal.ops.overlap_sums`, and the largest share of each class."""

    shares: LabelShares
    norm: Literal["l1", "l2"] = "l1"


Part: TypeAlias = CrossEntropyPart | NeighbourPart | MarginPart | OverlapPart


@dataclass(frozen=True, eq=False)
class PixelLoss:
    """``values``: the sum over valid pixels, or ``(N, *spatial)`` with 0 where not valid. ``count``: what a mean divides the sum by."""

    values: Tensor
    count: Tensor


@dataclass(frozen=True, eq=False)
class OverlapCounts:
    """Per image and class, ``(N, C)``: true positives, false positives, false negatives, largest share of the target."""

    tp: Tensor
    fp: Tensor
    fn: Tensor
    largest: Tensor


def label_losses(
    logits: Tensor, labels: Tensor, parts: Sequence[Part], *, ignore_index: int, per_pixel: bool = False
) -> list[PixelLoss | OverlapCounts]:
    """Losses of logits against a label map.

    Args:
        logits: ``(N, C, *spatial)``, floating, 1 to 3 spatial dims.
        labels: ``(N, *spatial)``: classes in [0, C) or ``ignore_index``, any integer type, or whole numbers of a floating one.
        parts: What to compute.
        ignore_index: Label of pixels that do not count.
        per_pixel: One value per pixel, rather than their sum; not for :class:`OverlapPart`.

    Returns:
        For each part a :class:`PixelLoss` or, for an :class:`OverlapPart`, :class:`OverlapCounts`, in at least single precision.

    Raises:
        NotCovered: If overlaps are wanted per pixel.

    Example:
        >>> ce, margin = label_losses(
        ...     torch.tensor([[[3.0, 0.0], [0.0, 0.0]]]),  # (1, 2, 2)
        ...     torch.tensor([[0, 255]]),
        ...     [CrossEntropyPart(LabelShares(smoothing=0.5)), MarginPart(margin=1.0, squared=False, scale_others=0.5)],
        ...     ignore_index=255,
        ... )
        >>> ce.values, ce.count, margin.values
        (tensor(0.7986), tensor(1.), tensor(1.))
    """
    check_parts(parts, per_pixel)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    classes = labels.to(torch.int64)
    valid = classes != ignore_index
    classes = torch.where(valid, classes, 0)
    z = torch.where(valid.unsqueeze(1), logits, 0.0).to(dtype)
    num_classes = z.shape[1]
    built: dict[int, Tensor] = {}

    def distribution(shares: LabelShares) -> Tensor:
        if id(shares) not in built:
            built[id(shares)] = shares(classes, valid, num_classes, dtype)
        return built[id(shares)]

    results: list[PixelLoss | OverlapCounts] = []
    for part in parts:
        count = valid.sum().to(dtype)
        if isinstance(part, OverlapPart):
            q = distribution(part.shares)
            results.append(OverlapCounts(*overlap_sums(z.softmax(1), q, valid, norm=part.norm), q.amax(tuple(range(2, q.ndim)))))
            continue
        if isinstance(part, CrossEntropyPart):
            values = soft_cross_entropy(z, distribution(part.shares), valid, class_weights=part.class_weights)
            if part.class_weights is not None:
                count = torch.where(valid, part.class_weights.to(dtype)[classes], 0.0).sum()
        elif isinstance(part, NeighbourPart):
            gap = distribution(part.shares) - z
            values = (gap.abs() if part.distance == "l1" else gap.square()).mean(1)
        else:
            largest = z.amax(1, keepdim=True)
            excess = F.relu((largest.detach() if part.detached else largest) - z - part.margin)
            values = part.scale_others * (excess.square() if part.squared else excess).sum(1)
            values = values + part.scale_largest * F.relu(largest.squeeze(1) - part.margin).square()
        values = torch.where(valid, values, 0.0)
        results.append(PixelLoss(values if per_pixel else values.sum(), count))
    return results


def check_parts(parts: Sequence[Part], per_pixel: bool) -> None:
    """Refuse what cannot be asked for together."""
    if per_pixel and any(isinstance(part, OverlapPart) for part in parts):
        raise NotCovered("sums of overlaps have no value per pixel")
