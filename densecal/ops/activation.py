"""From logits to probabilities: exclusive classes or independent regions."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from densecal.checks import check_choice

__all__ = ["Activation", "logits_from_probabilities", "most_probable", "outcome_logits", "probabilities"]

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
        >>> probabilities(torch.zeros(1, 4, 2))[0, :, 0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    check_choice("activation", activation, ("softmax", "sigmoid"))
    return logits.softmax(dim=1) if activation == "softmax" else logits.sigmoid()


def logits_from_probabilities(probs: Tensor, activation: Activation = "softmax", *, floor: float = 2.0**-17) -> Tensor:
    """Logits that give these probabilities: log p or, of regions, log p - log(1 - p). Divided by T, they are softened as the network's own would be.

    Args:
        probs: Shape ``(N, C, *spatial)``, floating, in [0, 1]. Under softmax they need not sum to 1; the ratios count.
        activation: ``"softmax"`` or ``"sigmoid"``.
        floor: Smaller probabilities count as this one; under sigmoid, larger ones than 1 less it as that. The default is half a step of probabilities that are stored
            in 16 bits.

    Returns:
        Finite logits of the shape of ``probs``.

    Raises:
        ValueError: If ``activation`` is neither.

    Example:
        >>> z = logits_from_probabilities(torch.tensor([[[0.9], [0.1]]]))
        >>> (z / 2).softmax(dim=1)[0, :, 0]  # sqrt(0.9) : sqrt(0.1) = 3 : 1
        tensor([0.7500, 0.2500])
    """
    check_choice("activation", activation, ("softmax", "sigmoid"))
    if activation == "softmax":
        return probs.clamp_min(floor).log()
    inside = probs.clamp(floor, 1.0 - floor)
    return inside.log() - torch.log1p(-inside)


def outcome_logits(logits: Tensor, activation: Activation = "softmax") -> Tensor:
    """Logits of outcomes that exclude each other, along axis 1: the classes or, under sigmoid, a region being there or not.

    A sigmoid of z is the softmax of (z/2, -z/2). The pair is symmetric, so what acts on the size of logits treats both outcomes alike.

    Args:
        logits: Shape ``(N, C, *spatial)``, floating.
        activation: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        ``(N, C, *spatial)`` under softmax, ``(N, 2, C, *spatial)`` under sigmoid; its softmax over axis 1 are the probabilities.

    Raises:
        ValueError: If ``activation`` is neither.

    Example:
        >>> outcome_logits(torch.tensor([[[3.0]]]), "sigmoid")[0, :, 0, 0]
        tensor([ 1.5000, -1.5000])
    """
    check_choice("activation", activation, ("softmax", "sigmoid"))
    return logits if activation == "softmax" else torch.stack((logits / 2, -logits / 2), dim=1)


def most_probable(probs: Tensor, activation: Activation = "softmax", *, dim: int = 1) -> tuple[Tensor, Tensor]:
    """What a prediction says, and how surely.

    Args:
        probs: Probabilities ``(N, C, *spatial)``.
        activation: ``"softmax"`` or ``"sigmoid"``.
        dim: The class axis; 0 for a case without a batch axis.

    Returns:
        Under softmax the most probable class and its probability, ``(N, *spatial)``; under sigmoid for each region 1 where it is more probable than not, else 0, and
        the probability of that, in [1/2, 1], ``(N, C, *spatial)``. The first is int64. The first of tied classes wins, and a tie is outside.

    Raises:
        ValueError: If ``activation`` is neither.

    Example:
        >>> most_probable(torch.tensor([[[0.25, 0.75]]]), "sigmoid")
        (tensor([[[0, 1]]]), tensor([[[0.7500, 0.7500]]]))
    """
    check_choice("activation", activation, ("softmax", "sigmoid"))
    if activation == "softmax":
        return probs.argmax(dim=dim), probs.amax(dim=dim)
    return (probs > 0.5).long(), torch.maximum(probs, 1 - probs)
