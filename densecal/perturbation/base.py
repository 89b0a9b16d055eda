"""Labels of which a share is handed to the other classes, more or less of it for each image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densecal.checks import check_choice, check_positive
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.targets.base import Recipe, SoftTarget, Target
from densecal.targets.wrapper import WrapperTarget

__all__ = ["Perturbation", "PerturbedLabels", "drawn_share", "perturb_labels"]


def perturb_labels(probs: Tensor, share: float | Tensor, *, activation: Activation = "softmax") -> Tensor:
    r"""Hand a share of each class to the others.

    .. math:: (1 - s)\, q_c + \tfrac{s}{K - 1} (1 - q_c)

    with K outcomes: the classes under softmax, 2 per channel under sigmoid, where it is :math:`(1 - 2s)\, q + s`. Both agree at K = 2.

    Args:
        probs: Target ``(N, C, *spatial)``.
        share: s, a number or one per image, broadcastable to ``probs``. Up to 1 the result is a distribution, beyond it leaves [0, 1].
        activation: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        Target of the same shape.

    Example:
        >>> perturb_labels(torch.tensor([[[1.0], [0.0], [0.0]]]), 0.2).flatten()
        tensor([0.8000, 0.1000, 0.1000])
        >>> perturb_labels(torch.tensor([[[1.0, 0.0]]]), 2.0, activation="sigmoid").flatten()
        tensor([-1.,  2.])
    """
    check_choice("activation", activation, ("softmax", "sigmoid"))
    others = probs.shape[1] - 1 if activation == "softmax" else 1
    return (1.0 - share) * probs + (share / others) * (1.0 - probs)


def drawn_share(alpha: float | Tensor, beta: float, draw: Tensor) -> Tensor:
    """The share of one draw: ``beta`` for the images whose number in [0, 1) is below ``alpha``, else 0. Its mean is ``alpha * beta``.

    Example:
        >>> drawn_share(0.5, 2.0, torch.tensor([0.2, 0.7]))
        tensor([2., 0.])
    """
    return beta * (draw < alpha).to(draw.dtype)


@dataclass(frozen=True, eq=False)
class PerturbedLabels(Recipe):
    """What ``recipe`` makes of the labels, with ``share`` of each class handed to the others; 0 where not valid."""

    share: float | Tensor
    recipe: Recipe

    def __call__(self, one_hot: Tensor, valid: Tensor, activation: Activation) -> Tensor:
        return torch.where(valid.unsqueeze(1), perturb_labels(self.recipe(one_hot, valid, activation), self.share, activation=activation), 0.0)


class Perturbation(WrapperTarget):
    r"""Base of label perturbations: a level :math:`\alpha` per image says how likely its labels are perturbed, :math:`\beta` how much.

    In expectation over the draw the share :math:`s = \alpha\beta` of each class goes to the others, :func:`perturb_labels`. The likeliest class keeps the
    confidence :math:`1 - \alpha\beta`, hence :math:`\alpha\beta < 1/2`. Cross-entropy is linear in its target, so its value for the expected target is its
    mean over draws (self-calibrating cross-entropy); with other terms the expected target is soft labels like any.

    Like dropout it acts in training mode only: in evaluation mode the labels are those of ``label_target``.

    Args:
        label_target: What the labels become before; None is one-hot.
        beta: Strength, > 0.
        expected: Take the mean over the draw. False draws for each image anew whether its target is perturbed, by torch's generator; the target of such an image
            leaves [0, 1] where beta exceeds 1, which cross-entropy (:class:`densecal.terms.CrossEntropy`) takes as published, but no logarithm of the target
            (:class:`densecal.terms.KLDivergence`) and no overlap does.
        needs: Side inputs.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.

    Raises:
        TypeError: If ``label_target`` is not a target.
        ValueError: If ``beta`` is not positive, or ``label_target`` perturbs labels already, has another activation or ignores another label.
    """

    def __init__(
        self,
        label_target: Target | None,
        *,
        beta: float,
        expected: bool,
        needs: tuple[str, ...] = (),
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
    ) -> None:
        super().__init__(label_target, needs=needs, activation=activation, ignore_index=ignore_index)
        check_positive("beta", beta)
        if any(isinstance(module, Perturbation) for module in self.label_target.modules()):
            raise ValueError(
                f"Expected labels that are perturbed once, but {type(self.label_target).__name__} within {type(self).__name__} does so already. Leave out one."
            )
        self.beta = beta
        self.expected = expected

    def levels(self, size: int, device: torch.device, context: Mapping[str, Any] | None) -> float | Tensor:
        """Level alpha of the images of a batch of ``size``: one for all, or ``(size,)``."""
        raise NotImplementedError

    def forward(
        self,
        label: Tensor,
        num_classes: int,
        *,
        spatial_dims: int | None = None,
        dtype: torch.dtype = torch.float32,
        context: Mapping[str, Any] | None = None,
    ) -> SoftTarget:
        labels = self.from_labels(label, num_classes, spatial_dims=spatial_dims, dtype=dtype, context=context)
        if not self.training:
            return labels
        size, device = labels.valid.shape[0], labels.valid.device
        alpha = self.levels(size, device, context)
        share = self.beta * alpha if self.expected else drawn_share(alpha, self.beta, torch.rand(size, device=device))
        if isinstance(share, Tensor):
            share = share.to(dtype).reshape(-1, *[1] * labels.valid.ndim)
        return labels.with_recipe(PerturbedLabels(share, labels.recipe), hard=labels.hard)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, expected={self.expected}, {super().extra_repr()}"
