"""Label-distributionally robust loss: a soft maximum over the margins to the label, between cross-entropy and the multi-class hinge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from densecal.checks import check_choice, check_non_negative, check_positive
from densecal.ops.activation import Activation
from densecal.ops.reduction import Reduction
from densecal.registry import TERMS
from densecal.targets.base import SoftTarget
from densecal.terms.base import PixelTerm

__all__ = ["LDRKL", "ldr_kl"]


def ldr_kl(
    logits: Tensor,
    probs: Tensor,
    valid: Tensor,
    *,
    temperature: float = 1.0,
    margin: float = 1.0,
    adapt: float | None = None,
    class_weights: Tensor | None = None,
    activation: Activation = "softmax",
) -> Tensor:
    r"""Per-pixel LDR-KL loss, in expectation over the label.

    .. math:: \ell(x) = \sum_y w_y\, q_y\, \lambda \log \tfrac1C \sum_k \exp\left(\frac{z_k - z_y + c\,[k \ne y]}{\lambda}\right)

    Args:
        logits: ``(N, C, *spatial)``, floating.
        probs: Target, same shape.
        valid: ``(N, *spatial)``, bool. Other pixels give 0 and exactly zero gradient.
        temperature: :math:`\lambda > 0`.
        margin: c >= 0, by which the label's logit should exceed the others.
        adapt: a of :class:`LDRKL`, or None for a fixed :math:`\lambda`.
        class_weights: ``(C,)``, multiplies the part of each label.
        activation: ``"softmax"``, or ``"sigmoid"`` for the sum over channels, each with two classes of logits z and 0.

    Returns:
        ``(N, *spatial)``, unreduced.

    Example:
        >>> ldr_kl(torch.zeros(1, 2, 1), torch.tensor([[[1.0], [0.0]]]), torch.tensor([[True]]), margin=0.0)
        tensor([[0.]])
    """
    check_choice("activation", activation, ("softmax", "sigmoid"))
    if activation == "sigmoid":
        # One channel is two classes, of which the axis 1 tells.
        pairs = torch.stack([logits, torch.zeros_like(logits)], dim=1)  # (N, 2, C, *spatial)
        shares = torch.stack([probs, 1.0 - probs], dim=1)
    else:
        pairs, shares = logits, probs
    per_label = _fixed(pairs, temperature, margin) if adapt is None else _adaptive(pairs, temperature, margin, adapt)
    values = shares * per_label
    if activation == "sigmoid":
        values = values.sum(dim=1)
    if class_weights is not None:
        values = values * class_weights.to(values.dtype).reshape(-1, *[1] * (logits.ndim - 2))
    return torch.where(valid, values.sum(dim=1), 0.0)


@TERMS.register("ldr_kl")
class LDRKL(PixelTerm):
    r"""Label-distributionally robust loss with the KL divergence as its regulariser.

    .. math:: \ell = \lambda \log \tfrac1C \sum_k \exp\left(\frac{z_k - z_y + c_k}{\lambda}\right), \quad c_y = 0,\ c_k = c

    :math:`\lambda = 1, c = 0` is cross-entropy less log C; :math:`\lambda \to 0` is the hinge :math:`\max_k (z_k - z_y + c_k)`. Soft labels are taken
    in expectation over y.

    The adaptive form (ours, after the paper's ALDR-KL, which keeps a state per sample) chooses :math:`\lambda` at every pixel from the prediction alone:

    .. math:: \lambda_x = \max\left(0,\ \lambda \left(1 - \frac{\mathrm{KL}(p_x \| 1/C)}{a \log C}\right)\right), \quad
              p_x = \operatorname{softmax}\left((z - z_y + c) / \lambda\right)

    A pixel whose worst case is one class gets a small :math:`\lambda_x`, one whose margins are alike nearly :math:`\lambda`. No gradient flows through
    :math:`\lambda_x`. It is kept above :math:`10^{-3} \lambda`, where the value is the hinge's to within :math:`10^{-3} \lambda \log C`.

    Args:
        temperature: :math:`\lambda > 0`.
        margin: c >= 0.
        adapt: a > 0: how strongly a peaked worst case lowers :math:`\lambda_x`, less for larger a. None: the same :math:`\lambda` everywhere. The
            adaptive form takes C times the memory of the fixed one, for it has a :math:`\lambda` for every label.
        class_weights: One weight per class, or None; :class:`densecal.terms.CrossEntropy` says what the mean divides by.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``(N, *spatial)`` (summed over channels under sigmoid).

    Raises:
        ValueError: If ``temperature`` or ``adapt`` is not positive, ``margin`` negative, ``reduction`` unknown, or there is not one weight per class.

    Reference:
        Zhu, Ying and Yang, "Label Distributionally Robust Losses for Multi-class Classification", ICML 2023, arXiv:2112.14869, equation 4.

    Example:
        >>> from densecal.targets import one_hot_target
        >>> logits = torch.tensor([[[3.0], [0.0]]])
        >>> LDRKL(temperature=0.01)(logits, one_hot_target(torch.tensor([[1]]), 2))  # nearly the hinge, 3 - 0 + 1
        tensor(3.9931)
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        margin: float = 1.0,
        adapt: float | None = None,
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weights=class_weights, reduction=reduction)
        check_positive("temperature", temperature)
        check_non_negative("margin", margin)
        if adapt is not None:
            check_positive("adapt", adapt)
        self.temperature, self.margin, self.adapt = temperature, margin, adapt

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        values = ldr_kl(
            logits,
            target.probs.to(logits.dtype),
            target.valid,
            temperature=self.temperature,
            margin=self.margin,
            adapt=self.adapt,
            class_weights=self.weights_for(logits),
            activation=target.activation,
        )
        return self.reduced(values, target)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, margin={self.margin}, adapt={self.adapt}, {super().extra_repr()}"


def _fixed(logits: Tensor, temperature: float, margin: float) -> Tensor:
    """The loss of each class as the label, on axis 1: its own score against the log-sum of the others', which are above it by the margin."""
    scores = logits / temperature
    return temperature * (torch.logaddexp(scores, _log_sum_of_others(scores) + margin / temperature) - scores - math.log(logits.shape[1]))


def _log_sum_of_others(scores: Tensor) -> Tensor:
    """log sum_{k != c} exp(s_k) for each c on axis 1."""
    largest = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argmax(dim=1, keepdim=True), True)
    # Taking the largest from the whole would leave nothing but rounding; any other is at most one half of it.
    without_largest = scores.masked_fill(largest, -torch.inf).logsumexp(dim=1, keepdim=True)
    total = scores.logsumexp(dim=1, keepdim=True)
    rest = total + torch.log1p(-(scores - total).exp().clamp_max(0.5))
    return torch.where(largest, without_largest, rest)


def _adaptive(logits: Tensor, temperature: float, margin: float, adapt: float) -> Tensor:
    """The loss of each class as the label, each with the temperature that its worst case asks for."""
    num_classes = logits.shape[1]
    per_label = []
    for label in range(num_classes):
        gaps = logits - logits.narrow(1, label, 1)
        gaps = torch.cat([gaps[:, :label] + margin, gaps[:, label : label + 1], gaps[:, label + 1 :] + margin], dim=1)
        with torch.no_grad():
            log_p = F.log_softmax(gaps / temperature, dim=1)
            divergence = (log_p.exp() * log_p).sum(dim=1, keepdim=True) + math.log(num_classes)
            own = (temperature * (1.0 - divergence / (adapt * math.log(num_classes)))).clamp_min(1e-3 * temperature)
        per_label.append(own * ((gaps / own).logsumexp(dim=1, keepdim=True) - math.log(num_classes)))
    return torch.cat(per_label, dim=1)
