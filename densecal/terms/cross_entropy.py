"""Cross-entropy with any target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from densecal.ops.label_losses import CrossEntropyPart
from densecal.ops.reduction import reduce
from densecal.ops.soft_cross_entropy import soft_cross_entropy, uniform_cross_entropy
from densecal.registry import TERMS
from densecal.targets.base import SoftTarget, Uniform
from densecal.terms.base import Fused, PixelTerm

__all__ = ["CrossEntropy"]


@TERMS.register("ce")
class CrossEntropy(PixelTerm):
    r"""Cross-entropy between target and prediction.

    .. math:: \frac{\sum_x -\sum_c w_c\, q_c(x) \log p_c(x)}{\sum_x \bar w(x)}

    over valid pixels. What the mean divides by follows PyTorch: where the labels are a label map, :math:`\bar w(x) = w_{y(x)}`, whatever the smoothing
    (``torch.nn.CrossEntropyLoss`` with index targets); where they are soft labels, :math:`\bar w(x) = 1` (probability targets). Under sigmoid the
    term is the binary cross-entropy and the mean runs over pixels and channels, weights multiplied in (``BCEWithLogitsLoss``).

    Args:
        class_weights: One weight per class, or None.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``(N, *spatial)`` (summed over channels under sigmoid).

    Raises:
        ValueError: If ``reduction`` is unknown, or there is not one weight per class.

    Example:
        >>> import torch
        >>> from densecal.targets import one_hot_target
        >>> logits = torch.tensor([[[0.0, 5.0], [0.0, -5.0]]])  # (1, 2, 2)
        >>> CrossEntropy()(logits, one_hot_target(torch.tensor([[0, -100]]), 2))
        tensor(0.6931)
    """

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        weights, valid, label_map, recipe = self.weights_for(logits), target.valid, target.label_map, target.recipe
        if label_map is not None and isinstance(recipe, Uniform):
            values = uniform_cross_entropy(logits, label_map, valid, smoothing=recipe.smoothing, class_weights=weights)
        else:
            values = soft_cross_entropy(logits, target.probs.to(logits.dtype), valid, class_weights=weights, activation=target.activation)
        return self.reduced(values, target)

    def fused(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Fused:
        part = CrossEntropyPart(target.shares, self.weights_for(logits))
        return Fused(part, lambda result: reduce(result.values, result.count, self.reduction, sync=self.sync_stats), self.reduction == "none")
