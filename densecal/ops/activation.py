"""From logits to probabilities: exclusive classes or independent regions."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from densecal.checks import check_choice

__all__ = ["Activation", "probabilities"]

Activation: TypeAlias = Literal["softmax", "sigmoid"]


def probabilities(logits: Tensor, activation: Activation = "softmax") -> Tensor:
    """Softmax over the class axis, or a sigmoid per channel.

    Args:
        logits: Shape ``(N, C, *spatial)``, floating.
        activation: ``"softmax"`` for classes of which a pixel has one, ``"sigmoid"`` for regions that may overlap.

    Returns:
        Probabilities in [0, 1] of the logits' shape and dtype.

    Raises:
        ValueError: If ``activation`` is neither.

    Example:
        >>> import torch
        >>> probabilities(torch.zeros(1, 4, 2))[0, :, 0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    check_choice("activation", activation, ("softmax", "sigmoid"))
    return logits.softmax(dim=1) if activation == "softmax" else logits.sigmoid()
