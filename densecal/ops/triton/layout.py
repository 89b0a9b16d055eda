"""How a kernel finds a pixel: one to three spatial axes as three, with their strides."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from densecal.ops.backend import NotCovered

__all__ = ["check_reach", "is_flat", "is_wide", "strides", "three"]

_FARTHEST = 2**31 - 2**16
"""Offsets within an image up to here are computed in 32 bits."""


def three(sides: Sequence[int], fill: int) -> tuple[int, int, int]:
    """Three spatial axes of one to three.

    Example:
        >>> three((5, 7), 1)
        (1, 5, 7)
    """
    d, h, w = [fill] * (3 - len(sides)) + list(sides)
    return d, h, w


def strides(tensor: Tensor, first: int, spatial: tuple[int, int, int]) -> tuple[int, int, int]:
    """Of the spatial axes from axis ``first`` on, those that are missing or of one pixel included.

    Example:
        >>> strides(Tensor(2, 3, 5, 7), 2, (1, 5, 7))
        (35, 7, 1)
    """
    given = [*[0] * (3 - (tensor.ndim - first)), *tensor.stride()[first:]]
    depth, height, width = spatial
    w = given[2] if width > 1 else 1
    h = given[1] if height > 1 else width * w
    return given[0] if depth > 1 else height * h, h, w


def is_flat(steps: tuple[int, int, int], spatial: tuple[int, int, int]) -> bool:
    """Whether the pixels of an image lie at even distances, as one axis.

    Example:
        >>> is_flat((35, 7, 1), (1, 5, 7)), is_flat((70, 14, 1), (2, 5, 7))
        (True, False)
    """
    height, width = spatial[1:]
    return steps[1] == width * steps[2] and steps[0] == height * steps[1]


def is_wide(spatial: tuple[int, int, int], *steps: tuple[int, int, int]) -> bool:
    """Whether offsets within an image need 64 bits, or the number of its pixels does.

    Example:
        >>> is_wide((1, 5, 7), (35, 7, 1)), is_wide((2, 5, 7), (2**31, 7, 1))
        (False, True)
    """
    reach = [sum((side - 1) * abs(step) for side, step in zip(spatial, each, strict=True)) for each in steps]
    return max(*reach, math.prod(spatial)) > _FARTHEST


def check_reach(programs: int, ignore_index: int) -> None:
    """Refuse what kernels cannot address or compare.

    Raises:
        NotCovered: If it is too many or too large.
    """
    if programs >= 2**31:
        raise NotCovered(f"{programs} blocks of pixels are more than a grid has programs")
    if not -(2**31) <= ignore_index < 2**31:
        raise NotCovered(f"ignore_index={ignore_index} does not fit 32 bits")
