r"""Cross-entropy between a distribution per pixel and the network's, over valid pixels.

.. math:: \ell(x) = -\sum_c w_c\, q_c(x) \log p_c(x)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from densecal.checks import check_choice
from densecal.ops.activation import Activation

__all__ = ["soft_cross_entropy", "uniform_cross_entropy"]


def soft_cross_entropy(
    logits: Tensor, probs: Tensor, valid: Tensor, *, class_weights: Tensor | None = None, activation: Activation = "softmax"
) -> Tensor:
    """Per-pixel cross-entropy against a distribution.

    Args:
        logits: ``(N, C, *spatial)``, floating.
        probs: Target, same shape; sums to 1 over C under softmax, each entry in [0, 1] under sigmoid.
        valid: ``(N, *spatial)``, bool. Other pixels give 0 and, for finite logits, exactly zero gradient.
        class_weights: ``(C,)``, multiplies each class's part.
        activation: ``"softmax"``, or ``"sigmoid"`` for the sum over channels of binary cross-entropies.

    Returns:
        ``(N, *spatial)``, at least 0, unreduced.

    Example:
        >>> logits = torch.zeros(1, 2, 1)
        >>> soft_cross_entropy(logits, torch.tensor([[[0.75], [0.25]]]), torch.tensor([[True]]))
        tensor([[0.6931]])
    """
    check_choice("activation", activation, ("softmax", "sigmoid"))
    bce = F.binary_cross_entropy_with_logits
    values = -probs * F.log_softmax(logits, dim=1) if activation == "softmax" else bce(logits, probs, reduction="none")
    if class_weights is not None:
        values = values * class_weights.to(values.dtype).reshape(-1, *[1] * (logits.ndim - 2))
    return torch.where(valid, values.sum(dim=1), 0.0)


def uniform_cross_entropy(
    logits: Tensor, label_map: Tensor, valid: Tensor, *, smoothing: float | Tensor = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """What :func:`soft_cross_entropy` gives for a label map smoothed evenly over the classes, without building the ``(N, C, *spatial)`` target.

    Args:
        logits: ``(N, C, *spatial)``, floating.
        label_map: ``(N, *spatial)``, int64 in [0, C), any class where not valid.
        valid: ``(N, *spatial)``, bool.
        smoothing: Share spread over all C classes, a number or a 0-d tensor.
        class_weights: ``(C,)``, multiplies each class's part.

    Returns:
        ``(N, *spatial)``, unreduced, 0 where not valid.

    Example:
        >>> logits = torch.tensor([[[2.0], [0.0]]])
        >>> uniform_cross_entropy(logits, torch.tensor([[0]]), torch.tensor([[True]]))
        tensor([[0.1269]])
    """
    weights = None if class_weights is None else class_weights.to(logits.dtype)
    log_probs = F.log_softmax(logits, dim=1)
    values = F.nll_loss(log_probs, label_map, weight=weights, reduction="none")
    if isinstance(smoothing, Tensor) or smoothing:  # a tensor is not looked at: that would wait for the device
        if weights is not None:
            log_probs = log_probs * weights.reshape(-1, *[1] * (logits.ndim - 2))
        values = (1.0 - smoothing) * values - (smoothing / logits.shape[1]) * log_probs.sum(dim=1)
    return torch.where(valid, values, 0.0)
