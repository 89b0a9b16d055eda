"""Cross-entropy that counts what is already right for less: focal and dual focal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from densecal.checks import check_choice, check_non_negative
from densecal.ops.activation import Activation
from densecal.ops.reduction import Reduction
from densecal.registry import TERMS
from densecal.targets.base import SoftTarget
from densecal.terms.base import PixelTerm

__all__ = ["DualFocal", "Focal", "focal_cross_entropy"]


def focal_cross_entropy(
    logits: Tensor,
    probs: Tensor,
    valid: Tensor,
    *,
    gamma: float = 2.0,
    dual: bool = False,
    class_weights: Tensor | None = None,
    activation: Activation = "softmax",
) -> Tensor:
    r"""Per-pixel cross-entropy whose part of each class is weighed by how far its probability is from 1.

    .. math:: \ell(x) = -\sum_c w_c\, q_c\, (1 - p_c + r_c)^\gamma \log p_c

    with :math:`r_c = 0` (focal) or, for the dual form, the largest probability that is smaller than :math:`p_c` (0 where there is none).

    Args:
        logits: ``(N, C, *spatial)``, floating.
        probs: Target, same shape.
        valid: ``(N, *spatial)``, bool. Other pixels give 0 and exactly zero gradient.
        gamma: Power, >= 0; 0 is cross-entropy.
        dual: Add the runner-up :math:`r_c`. It jumps where two probabilities change places.
        class_weights: ``(C,)``, multiplies each class's part.
        activation: ``"softmax"``, or ``"sigmoid"`` for the sum over channels, each with the two outcomes p and 1 - p.

    Returns:
        ``(N, *spatial)``, at least 0, unreduced.

    Example:
        >>> focal_cross_entropy(torch.zeros(1, 2, 1), torch.tensor([[[1.0], [0.0]]]), torch.tensor([[True]]))  # (1/2)^2 log 2
        tensor([[0.1733]])
    """
    check_choice("activation", activation, ("softmax", "sigmoid"))
    if activation == "softmax":
        outcomes, shares, class_axis = F.log_softmax(logits, dim=1), probs, 1
    else:
        outcomes = torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=2)  # (N, C, 2, *spatial)
        shares, class_axis = torch.stack([probs, 1.0 - probs], dim=2), 2
    p = outcomes.exp()
    distance = 1.0 - p + _runner_up(p, class_axis) if dual else 1.0 - p
    # At p = 1 a power below 1 has an infinite slope, which times log p = 0 would be NaN.
    values = -shares * distance.clamp_min(torch.finfo(p.dtype).tiny) ** gamma * outcomes
    if activation == "sigmoid":
        values = values.sum(dim=2)
    if class_weights is not None:
        values = values * class_weights.to(values.dtype).reshape(-1, *[1] * (logits.ndim - 2))
    return torch.where(valid, values.sum(dim=1), 0.0)


@TERMS.register("focal")
class Focal(PixelTerm):
    r"""Focal loss.

    .. math:: -\sum_c w_c\, q_c\, (1 - p_c)^\gamma \log p_c

    Soft labels weigh each class by its own probability. Under sigmoid the two outcomes of each channel take the place of the classes.

    Args:
        gamma: Power, >= 0; 0 is cross-entropy.
        class_weights: One weight per class, or None; :class:`densecal.terms.CrossEntropy` says what the mean divides by.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``(N, *spatial)`` (summed over channels under sigmoid).

    Raises:
        ValueError: If ``gamma`` is negative, ``reduction`` is unknown, or there is not one weight per class.

    Reference:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002.
        Differs from code in use, which sums over pixels by default.

    Example:
        >>> from densecal.targets import one_hot_target
        >>> Focal()(torch.zeros(1, 2, 1), one_hot_target(torch.tensor([[0]]), 2))  # (1/2)^2 log 2
        tensor(0.1733)
    """

    dual = False

    def __init__(self, *, gamma: float = 2.0, class_weights: Sequence[float] | Tensor | None = None, reduction: Reduction = "mean") -> None:
        super().__init__(class_weights=class_weights, reduction=reduction)
        check_non_negative("gamma", gamma)
        self.gamma = gamma

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        values = focal_cross_entropy(
            logits,
            target.probs.to(logits.dtype),
            target.valid,
            gamma=self.gamma,
            dual=self.dual,
            class_weights=self.weights_for(logits),
            activation=target.activation,
        )
        return self.reduced(values, target)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, {super().extra_repr()}"


@TERMS.register("dual_focal")
class DualFocal(Focal):
    r"""Dual focal loss: the gap to the runner-up counts, not the distance from certainty. :class:`Focal` with

    .. math:: (1 - p_c + \max_{p_j < p_c} p_j)^\gamma

    as the weight; nothing is added where no class is less probable. It jumps where two probabilities change places.

    Args:
        gamma: Power, >= 0; 0 is cross-entropy.
        class_weights: One weight per class, or None.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``(N, *spatial)``.

    Reference:
        Tao, Dong and Xu, "Dual Focal Loss for Calibration", ICML 2023, arXiv:2305.13665.

    Example:
        >>> from densecal.targets import one_hot_target
        >>> logits = torch.tensor([[[0.75], [0.25]]]).log()
        >>> DualFocal()(logits, one_hot_target(torch.tensor([[0]]), 2))  # (1/4 + 1/4)^2 log(4/3)
        tensor(0.0719)
    """

    dual = True


def _runner_up(p: Tensor, dim: int) -> Tensor:
    """For each entry the largest one along ``dim`` that is smaller; 0 where there is none."""
    ordered, order = p.sort(dim=dim)
    below = ordered.narrow(dim, 0, p.shape[dim] - 1)
    smaller = torch.where(below < ordered.narrow(dim, 1, p.shape[dim] - 1), below, 0.0)
    # Among equal entries the first knows the next smaller one; it is passed on.
    smaller = torch.cat([torch.zeros_like(p.narrow(dim, 0, 1)), smaller], dim=dim).cummax(dim=dim).values
    return smaller.gather(dim, order.argsort(dim=dim))
