"""One label per window: the largest, smallest, median or most frequent class number around a pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from densecal.ops.activation import Activation
from densecal.ops.neighbourhood import Border, Kernel, normalized_convolution
from densecal.targets.base import Recipe

__all__ = ["STATISTICS", "LabelStatistic", "Statistic"]

Statistic: TypeAlias = Literal["max", "min", "median", "mode"]
STATISTICS = ("max", "min", "median", "mode")

# Shares are counts over the number of pixels of a window, so that two that differ do so by much more, and equal ones by rounding only.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class LabelStatistic(Recipe):
    """All of a pixel's share on one class of its window: a statistic of class numbers, weighted by the shares of the classes.

    ``max``, ``min`` and ``median`` (the lower one of two) depend on the order of the classes, so they make sense for ordered labels only (grades,
    depths); ``mode`` does not, but gives ties to the smallest number. Under sigmoid each region is a label of its own, 0 or 1: ``max`` dilates it,
    ``min`` erodes it, the others take the majority.
    """

    kernel: Kernel
    statistic: Statistic
    border: Border = "replicate"

    def __call__(self, one_hot: Tensor, valid: Tensor, activation: Activation) -> Tensor:
        shares = normalized_convolution(one_hot, valid, self.kernel, border=self.border)
        # A region is a label of its own, 0 or 1.
        chosen = self._choose(shares) if activation == "softmax" else self._choose(torch.stack([1.0 - shares, shares], dim=1))[:, 1]
        return torch.where(valid.unsqueeze(1), chosen.to(one_hot.dtype), 0.0)

    def _choose(self, shares: Tensor) -> Tensor:
        """True at the chosen one of the outcomes along axis 1."""
        outcomes = shares.shape[1]
        index = torch.arange(outcomes, device=shares.device).reshape(1, -1, *[1] * (shares.ndim - 2))
        if self.statistic == "max":
            return index == torch.where(shares > _TOLERANCE, index, -1).amax(dim=1, keepdim=True)
        if self.statistic == "median":
            # The first class at which the shares so far reach one half. With border "zeros" they sum to less than 1 near it.
            half = shares.sum(dim=1, keepdim=True) / 2 - _TOLERANCE
            before, so_far = torch.zeros_like(half, dtype=torch.int64), torch.zeros_like(half)
            for c in range(outcomes):
                so_far = so_far + shares.narrow(1, c, 1)
                before = before + (so_far < half)
            return index == before
        eligible = shares > _TOLERANCE if self.statistic == "min" else shares > shares.amax(dim=1, keepdim=True) - _TOLERANCE
        return index == torch.where(eligible, index, outcomes).amin(dim=1, keepdim=True)
