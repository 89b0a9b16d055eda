"""Logit penalty: half the squared norm of the logits."""

from __future__ import annotations

from torch import Tensor

from densecal.registry import TERMS
from densecal.terms.base import PixelPenalty

__all__ = ["LogitPenalty"]


@TERMS.register("logit_penalty")
class LogitPenalty(PixelPenalty):
    r"""Half the squared norm of a pixel's logits.

    .. math:: \frac{1}{|V|} \sum_{x \in V} \tfrac12 \sum_c z_c(x)^2

    Under sigmoid a channel gives the same for its two outcomes' logits z/2 and -z/2, which is :math:`z^2/4`, and the mean runs over channels.

    Args:
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.

    Raises:
        ValueError: If ``reduction`` is unknown.

    Reference:
        Dauphin and Cubuk, "Deconstructing the Regularization of BatchNorm", ICLR 2021; Kornblith et al., NeurIPS 2021, arXiv:2010.16402.

    Example:
        >>> import torch
        >>> from densecal.targets import one_hot_target
        >>> LogitPenalty()(torch.tensor([[[4.0], [2.0]]]), one_hot_target(torch.tensor([[1]]), 2))
        tensor(10.)
    """

    def per_pixel(self, logits: Tensor) -> Tensor:
        return logits.square().sum(dim=1) / 2
