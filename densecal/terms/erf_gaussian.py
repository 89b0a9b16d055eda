"""The neighbour penalty with MONAI's Gaussian; for those who need MONAI's numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from densecal.checks import check_choice, check_positive
from densecal.ops.neighbourhood import Kernel
from densecal.ops.reduction import REDUCTIONS, Reduction, reduce
from densecal.targets.base import Neighbourhood, SoftTarget
from densecal.terms.base import Term

__all__ = ["ErfGaussianPenalty"]

TRUNCATED = 4.0  # standard deviations at which MONAI cuts its Gaussian


class ErfGaussianPenalty(Term):
    r"""Distance between logits and class shares under weights :math:`\Phi(r + \tfrac12) - \Phi(r - \tfrac12)` per axis, cut at 4 sigma.

    The one-hot labels are padded with zeros and the weights are not normalised (their sum is 0.99993 per axis), as in ``monai.losses.NACLLoss``. Shares
    sum to less than 1 at the border, which :class:`densecal.terms.NeighbourPenalty` with ``kernel="gaussian"`` avoids.

    Args:
        sigma: Standard deviation in pixels, > 0.
        distance: ``"l1"`` or ``"l2"`` (squared).
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for the mean over classes at each pixel.

    Raises:
        ValueError: If ``sigma`` is not positive or an option is unknown.

    Example:
        >>> from densecal.targets import one_hot_target
        >>> ErfGaussianPenalty(sigma=0.1)(torch.zeros(1, 2, 3), one_hot_target(torch.tensor([[0, 0, 1]]), 2))
        tensor(0.5000)
    """

    can_sync_stats = True

    def __init__(self, *, sigma: float = 1.0, distance: Literal["l1", "l2"] = "l1", reduction: Reduction = "mean") -> None:
        super().__init__()
        check_positive("sigma", sigma)
        check_choice("distance", distance, ("l1", "l2"))
        check_choice("reduction", reduction, REDUCTIONS)
        self.sigma = sigma
        self.distance: Literal["l1", "l2"] = distance
        self.reduction: Reduction = reduction
        reach, unit = int(max(sigma * TRUNCATED, 0.5) + 0.5), math.sqrt(2) * sigma
        taps = [0.5 * (math.erf((r + 0.5) / unit) - math.erf((r - 0.5) / unit)) for r in range(-reach, reach + 1)]
        self.mass = sum(taps)
        self.taps = tuple(tap / taps[reach] for tap in taps)

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        spatial_dims = logits.ndim - 2
        window = Neighbourhood(Kernel((self.taps,) * spatial_dims), "zeros")
        shares = self.mass**spatial_dims * window(target.one_hot, target.valid, target.activation).to(logits.dtype)
        gap = (shares - logits).abs() if self.distance == "l1" else (shares - logits).square()
        per_pixel = torch.where(target.valid, gap.mean(dim=1), 0.0)
        return reduce(per_pixel, target.valid.sum().to(per_pixel.dtype), self.reduction, sync=self.sync_stats)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}, distance={self.distance!r}, reduction={self.reduction!r}"
