"""Cross-entropy with labels that are perturbed at random, in expectation over the draw (self-calibrating binary cross-entropy)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from densecal.checks import check_non_negative, check_positive, may_look
from densecal.ops.reduction import Reduction
from densecal.ops.soft_cross_entropy import soft_cross_entropy
from densecal.perturbation import perturb_labels
from densecal.registry import TERMS
from densecal.targets.base import SoftTarget
from densecal.terms.base import PixelTerm

__all__ = ["SCBCE"]


@TERMS.register("sc_bce")
class SCBCE(PixelTerm):
    r"""Self-calibrating cross-entropy, the family of stochastic label perturbation in expectation.

    With probability :math:`\alpha` an image's target is :math:`(1 - 2\beta)\, y + \beta`, else y. Cross-entropy is linear in its target, so its mean
    over the draw is the cross-entropy with the mean target,

    .. math:: \mathrm{BCE}\left(p,\ (1 - 2 \alpha \beta)\, y + \alpha \beta\right)

    under sigmoid, and for C classes with :math:`(1 - \alpha \beta)\, q_c + \tfrac{\alpha \beta}{C - 1} (1 - q_c)`, the same at C = 2. A single draw may
    leave [0, 1] (at :math:`\beta` = 2 it is -1 or 2); the mean may not, hence :math:`\alpha \beta < 1/2`. :math:`\alpha = 1` is label smoothing, a
    level of 0 plain cross-entropy. :mod:`densecal.perturbation` holds the same as targets, for any term, with levels that follow the training.

    Args:
        alpha: Level of perturbation for all images, >= 0. None: one level per image, the side input ``perturbation`` of shape ``(N,)``.
        beta: Size of the perturbation, > 0.
        class_weights: One weight per class, or None; :class:`densecal.terms.CrossEntropy` says what the mean divides by.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``(N, *spatial)`` (summed over channels under sigmoid).

    Raises:
        ValueError: If ``alpha`` is negative, ``beta`` not positive, their product 1/2 or more (levels per image are checked on a CPU), or the side
            input is missing or has another shape.

    Reference:
        Liu et al., "Model Calibration in Dense Classification with Adaptive Label Perturbation", ICCV 2023, arXiv:2307.13539.

    Example:
        >>> from densecal.targets import one_hot_target
        >>> target = one_hot_target(torch.tensor([[1], [1]]), 1, activation="sigmoid")
        >>> SCBCE(reduction="none")(torch.full((2, 1, 1), 3.0), target, context={"perturbation": [0.0, 0.2]}).flatten()
        tensor([0.0486, 1.2486])
    """

    def __init__(
        self,
        *,
        alpha: float | None = None,
        beta: float = 2.0,
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weights=class_weights, reduction=reduction)
        check_positive("beta", beta)
        if alpha is not None:
            check_non_negative("alpha", alpha)
            if alpha * beta >= 0.5:
                raise ValueError(f"Expected `alpha` under 1 / (2 beta) = {0.5 / beta:g}, so that the label stays the likelier, but got {alpha}.")
        self.alpha, self.beta = alpha, beta
        self.needs = ("perturbation",) if alpha is None else ()

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        share = self.alpha * self.beta if self.alpha is not None else self._shares(logits, context)
        expected = perturb_labels(target.probs.to(logits.dtype), share, activation=target.activation)
        values = soft_cross_entropy(logits, expected, target.valid, class_weights=self.weights_for(logits), activation=target.activation)
        return self.reduced(values, target)

    def _shares(self, logits: Tensor, context: Mapping[str, Any] | None) -> Tensor:
        if context is None or "perturbation" not in context:
            raise ValueError(
                "Expected the side input 'perturbation', one level per image, but got none. Pass context={'perturbation': ...} or set `alpha`."
            )
        alpha = torch.as_tensor(context["perturbation"], dtype=logits.dtype, device=logits.device)
        if alpha.shape != logits.shape[:1]:
            raise ValueError(f"Expected `perturbation` of shape ({logits.shape[0]},), one level per image, but got {tuple(alpha.shape)}.")
        if may_look(alpha) and not bool(((alpha >= 0) & (alpha * self.beta < 0.5)).all()):
            raise ValueError(f"Expected `perturbation` in [0, 1 / (2 beta)) = [0, {0.5 / self.beta:g}), but got {alpha.tolist()}.")
        return self.beta * alpha.reshape(-1, *[1] * (logits.ndim - 1))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, {super().extra_repr()}"
