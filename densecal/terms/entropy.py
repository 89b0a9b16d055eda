"""Confidence penalty: minus the entropy of the prediction."""

from __future__ import annotations

from torch import Tensor

from densecal.registry import TERMS
from densecal.terms.base import PixelPenalty

__all__ = ["NegativeEntropy"]


@TERMS.register("entropy")
class NegativeEntropy(PixelPenalty):
    r"""Minus the entropy of the predicted distribution, so that certain predictions cost most.

    .. math:: \frac{1}{|V|} \sum_{x \in V} \sum_c p_c(x) \log p_c(x)

    It lies between -log C and 0. Under sigmoid it is the mean over channels of each region's own, between -log 2 and 0.

    Args:
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.

    Raises:
        ValueError: If ``reduction`` is unknown.

    Reference:
        Pereyra et al., "Regularizing Neural Networks by Penalizing Confident Output Distributions", 2017, arXiv:1701.06548.
        Differs from the code in segmentation repositories, which averages over classes: there the same weight acts C times less.

    Example:
        >>> import torch
        >>> from densecal.targets import one_hot_target
        >>> NegativeEntropy()(torch.zeros(1, 2, 1), one_hot_target(torch.tensor([[0]]), 2))  # -log 2
        tensor(-0.6931)
    """

    def per_pixel(self, logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(dim=1)
        return (log_probs.exp() * log_probs).sum(dim=1)
