"""Checks of shapes, types and ranges. An error says what was expected, what came, and how to repair it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_choice", "check_logits", "check_non_negative", "check_odd", "check_positive", "may_look", "per_axis", "plain"]


def plain(tensor: Tensor) -> Tensor:
    """The tensor without a subclass such as MONAI's MetaTensor, sharing memory and graph.

    Raises:
        TypeError: If it is something else, such as a network's list or dict of outputs.
    """
    if type(tensor) is Tensor:
        return tensor
    if not isinstance(tensor, Tensor):
        raise TypeError(f"Expected a tensor, but got {type(tensor).__name__}. {_tensor_hint(tensor)}")
    return tensor.as_subclass(Tensor)


def _tensor_hint(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"Take the tensor out of it, by one of its keys {list(value)}."
    if isinstance(value, (list, tuple)):
        return "Hand a network's several outputs to `DeepSupervisionLoss`, and stack images of one size with `torch.stack`."
    return "Make it one with `torch.as_tensor`."


def may_look(tensor: Tensor) -> bool:
    """Looking at values is cheap on a CPU, stalls a GPU and breaks a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {tuple(choices)}, but got {value!r}.")


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"Expected `{name}` to be greater than 0, but got {value}.")


def check_non_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"Expected `{name}` to be 0 or greater, but got {value}.")


def check_odd(name: str, value: int) -> None:
    if value < 1 or value % 2 == 0:
        raise ValueError(f"Expected `{name}` to be odd, so that a window has a centre, but got {value}. Try {value + 1}.")


def check_logits(logits: Tensor) -> int:
    """Check ``(N, C, *spatial)`` floating logits and return the number of spatial dimensions."""
    spatial_dims = logits.ndim - 2
    if not 1 <= spatial_dims <= 3:
        raise ValueError(f"Expected `logits` of shape (N, C, *spatial) with 1 to 3 spatial dimensions, but got {tuple(logits.shape)}.")
    if not logits.is_floating_point():
        raise TypeError(f"Expected floating `logits`, but got {logits.dtype}.")
    return spatial_dims


def per_axis(name: str, value: float | Sequence[float], spatial_dims: int) -> tuple[Any, ...]:
    """One value per spatial axis from a number (used for every axis) or a sequence of that length."""
    if isinstance(value, (int, float)):
        return (value,) * spatial_dims
    values = tuple(value)
    if len(values) != spatial_dims:
        raise ValueError(f"Expected `{name}` to be a number or {spatial_dims} numbers, one per spatial axis, but got {values}.")
    return values
