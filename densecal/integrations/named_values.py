"""What is common to those who feed metrics: what a metric takes, and what it computes, as numbers with names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from densecal.metrics.evaluation import Evaluation

__all__ = ["check_takes_probs", "named_numbers", "named_values"]


def check_takes_probs(name: str, metric: Metric) -> None:
    """Refuse a metric that takes logits where logits become probabilities before they reach it.

    Args:
        name: What the metric is called in the error text.
        metric: The metric.

    Raises:
        ValueError: If it takes logits.
    """
    if getattr(metric, "from_logits", False):
        raise ValueError(
            f"Expected {name} to take probabilities, which from_logits=True here makes of logits, but it has from_logits=True itself: "
            "softmax would be applied twice. Leave from_logits=True to one of them."
        )


def named_values(name: str, value: Any) -> dict[str, Tensor]:
    """One entry under the name of the metric or, where it has several named values, one each under ``<name>_<its name>``.

    Args:
        name: Name of the metric.
        value: What its ``compute`` returned: a tensor, a mapping of them, or an :class:`densecal.metrics.Evaluation`, of which the scalars are taken.

    Example:
        >>> named_values("overlap", {"iou": torch.tensor(0.5)})
        {'overlap_iou': tensor(0.5000)}
    """
    if isinstance(value, Evaluation):
        value = value.scalars()
    if isinstance(value, Mapping):
        return {f"{name}_{key}": torch.as_tensor(one) for key, one in value.items()}
    return {name: value}


def named_numbers(name: str, value: Any) -> dict[str, Tensor]:
    """As :func:`named_values`, with one entry ``<name>_<class>`` for each class of a value that has one per class.

    Example:
        >>> named_numbers("dice", torch.tensor([0.5, 0.75]))
        {'dice_0': tensor(0.5000), 'dice_1': tensor(0.7500)}
    """
    found: dict[str, Tensor] = {}
    for key, one in named_values(name, value).items():
        found |= {key: one} if one.ndim == 0 else {f"{key}_{c}": number for c, number in enumerate(one)}
    return found
