"""Means that count valid pixels only."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from densecal.checks import check_choice
from densecal.ops.ranks import sum_over_ranks

__all__ = ["REDUCTIONS", "Reduction", "reduce"]

Reduction: TypeAlias = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def reduce(values: Tensor, count: Tensor, reduction: Reduction = "mean", *, sync: bool = False) -> Tensor:
    """Sum per-pixel values, divide by what was counted, or return them as they are.

    Args:
        values: Any shape; 0 where a pixel does not count.
        count: Scalar divisor of the mean, at least 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        sync: Sum values and count over all processes, see :func:`densecal.ops.sum_over_ranks`.

    Returns:
        A scalar, or ``values`` for ``"none"``. The mean over nothing (``count`` 0) is 0, still attached to the graph.

    Raises:
        ValueError: If ``reduction`` is none of the three.

    Example:
        >>> reduce(torch.tensor([1.0, 2.0, 0.0]), torch.tensor(2))
        tensor(1.5000)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return values
    total = values.sum()
    if sync:
        total, count = sum_over_ranks(torch.stack([total, count.to(total.dtype)])).unbind()
    return total if reduction == "sum" else total / torch.where(count > 0, count, torch.ones_like(count))
