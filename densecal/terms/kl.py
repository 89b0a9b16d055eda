"""Kullback-Leibler divergence from the target: distillation, and soft labels whose own entropy should not count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from densecal.checks import check_choice, check_positive
from densecal.ops.activation import Activation
from densecal.ops.reduction import Reduction
from densecal.registry import TERMS
from densecal.targets.base import SoftTarget
from densecal.terms.base import PixelTerm

__all__ = ["KLDivergence", "kl_divergence"]


def kl_divergence(
    logits: Tensor,
    probs: Tensor,
    valid: Tensor,
    *,
    temperature: float = 1.0,
    class_weights: Tensor | None = None,
    activation: Activation = "softmax",
) -> Tensor:
    r"""Per-pixel divergence of the softened prediction from the target.

    .. math:: \ell(x) = T^2 \sum_c w_c\, q_c \log \frac{q_c}{p_c}, \quad p = \operatorname{softmax}(z / T), \quad 0 \log 0 = 0

    Args:
        logits: ``(N, C, *spatial)``, floating.
        probs: Target, same shape; sums to 1 over C under softmax, each entry in [0, 1] under sigmoid.
        valid: ``(N, *spatial)``, bool. Other pixels give 0 and exactly zero gradient.
        temperature: T > 0. It softens the prediction only.
        class_weights: ``(C,)``, multiplies each class's part, which may be negative.
        activation: ``"softmax"``, or ``"sigmoid"`` for the sum over channels, each with its two outcomes.

    Returns:
        ``(N, *spatial)``, unreduced; at least 0 with even weights.

    Example:
        >>> kl_divergence(torch.zeros(1, 2, 2), torch.tensor([[[1.0, 0.5], [0.0, 0.5]]]), torch.tensor([[True, True]]))
        tensor([[0.6931, 0.0000]])
    """
    check_choice("activation", activation, ("softmax", "sigmoid"))
    scaled = logits / temperature
    if activation == "softmax":
        values = torch.xlogy(probs, probs) - probs * F.log_softmax(scaled, dim=1)
    else:
        no = 1.0 - probs
        values = torch.xlogy(probs, probs) + torch.xlogy(no, no) + F.binary_cross_entropy_with_logits(scaled, probs, reduction="none")
    if class_weights is not None:
        values = values * class_weights.to(values.dtype).reshape(-1, *[1] * (logits.ndim - 2))
    return torch.where(valid, temperature**2 * values.sum(dim=1), 0.0)


@TERMS.register("kl")
class KLDivergence(PixelTerm):
    r"""Divergence :math:`T^2\, \mathrm{KL}(q\, \|\, \operatorname{softmax}(z / T))` of the prediction from the target.

    It is 0 where they agree. At T = 1 it is the cross-entropy less the target's own entropy, and its gradient is the cross-entropy's. In distillation
    the target is the teacher's distribution, already softened with the same temperature; the factor :math:`T^2` keeps the gradient's size. Labels as
    they are (one-hot) take the softened prediction for them, which is seldom what is wanted at T > 1.

    Args:
        temperature: T > 0; softens the prediction, not the target.
        class_weights: One weight per class, or None; :class:`densecal.terms.CrossEntropy` says what the mean divides by.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``(N, *spatial)`` (summed over channels under sigmoid).

    Raises:
        ValueError: If ``temperature`` is not positive, ``reduction`` is unknown, or there is not one weight per class.

    Reference:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.

    Example:
        >>> from densecal.targets import one_hot_target
        >>> teacher = torch.tensor([[2.0], [0.0]]).reshape(1, 2, 1)
        >>> KLDivergence(temperature=2.0)(teacher, one_hot_target((teacher / 2).softmax(1), 2)).abs() < 1e-6
        tensor(True)
    """

    def __init__(self, *, temperature: float = 1.0, class_weights: Sequence[float] | Tensor | None = None, reduction: Reduction = "mean") -> None:
        super().__init__(class_weights=class_weights, reduction=reduction)
        check_positive("temperature", temperature)
        self.temperature = temperature

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        values = kl_divergence(
            logits,
            target.probs.to(logits.dtype),
            target.valid,
            temperature=self.temperature,
            class_weights=self.weights_for(logits),
            activation=target.activation,
        )
        return self.reduced(values, target)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, {super().extra_repr()}"
