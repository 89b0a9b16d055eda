"""Shares of the classes around a pixel, where neighbours that look like it count more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from densecal.ops.activation import Activation
from densecal.ops.guided_neighbourhood import Similarity, guided_convolution
from densecal.ops.neighbourhood import Border, Kernel, _broadcast
from densecal.targets.base import Recipe

__all__ = ["ImageGuided"]


@dataclass(frozen=True, eq=False)
class ImageGuided(Recipe):
    """Shares of the classes in a window weighted by the intensities of ``image`` ``(N, channels, *spatial)``; see :func:`densecal.ops.guided_convolution`.

    ``divisor`` (a number, or one per image) takes the place of the sum of the weights where it is given.
    """

    kernel: Kernel
    image: Tensor
    similarity: Similarity
    intensity_scale: float = 1.0
    border: Border = "replicate"
    divisor: Any = None

    def __call__(self, one_hot: Tensor, valid: Tensor, activation: Activation) -> Tensor:
        shares = guided_convolution(
            one_hot,
            valid,
            self.image,
            self.kernel,
            similarity=self.similarity,
            intensity_scale=self.intensity_scale,
            border=self.border,
            normalize=self.divisor is None,
        )
        return shares if self.divisor is None else shares * _broadcast(1.0 / self.divisor, shares)
