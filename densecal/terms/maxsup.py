"""Max suppression: the largest logit against the mean logit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from densecal.ops.label_losses import MarginPart
from densecal.registry import TERMS
from densecal.targets.base import SoftTarget
from densecal.terms.base import Fused, PixelPenalty

__all__ = ["MaxSuppression"]


@TERMS.register("maxsup")
class MaxSuppression(PixelPenalty):
    r"""How far the largest logit lies above the mean logit.

    .. math:: \frac{1}{|V|} \sum_{x \in V} \Big( \max_c z_c(x) - \frac{1}{C} \sum_c z_c(x) \Big)

    Label smoothing amounts to the same penalty on the logit of the *label*, which also pulls up the largest where it is wrong. Under sigmoid a
    channel gives :math:`|z|/2`.

    Args:
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.

    Raises:
        ValueError: If ``reduction`` is unknown.

    Reference:
        Zhou et al., "MaxSup: Overcoming Representation Collapse in Label Smoothing", NeurIPS 2025, arXiv:2502.15798.
        Differs from some versions of the code, which reduce over the last axis: right for ``(N, C)`` logits only.

    Example:
        >>> import torch
        >>> from densecal.targets import one_hot_target
        >>> MaxSuppression()(torch.tensor([[[4.0], [0.0]]]), one_hot_target(torch.tensor([[1]]), 2))
        tensor(2.)
    """

    def per_pixel(self, logits: Tensor) -> Tensor:
        return logits.amax(dim=1) - logits.mean(dim=1)

    def fused(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Fused:
        # The margin penalty with a margin of 0.
        return self.fused_as(MarginPart(0.0, False, 1 / logits.shape[1]))
