"""Pretrained weights, and when not to load them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["without_pretrained"]

_WEIGHTS: dict[str, bool | None] = {
    "weights": None,
    "encoder_weights": None,
    "weights_backbone": None,
    "pretrained": False,
    "pretrained_backbone": False,
}
"""Arguments for pretrained weights in densecal, segmentation-models-pytorch, torchvision and timm, and what leaves them out."""


def without_pretrained(constructor: Callable[..., Any]) -> dict[str, bool | None]:
    """The arguments with which a network's constructor loads no pretrained weights: a checkpoint brings its own, and there may be no internet.

    Example:
        >>> def network(in_channels, weights="imagenet"): ...
        >>> without_pretrained(network)
        {'weights': None}
    """
    names = inspect.signature(constructor).parameters
    return {name: value for name, value in _WEIGHTS.items() if name in names}
