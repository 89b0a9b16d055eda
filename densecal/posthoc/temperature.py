"""Temperature scaling: one number for every pixel and class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation, probabilities
from densecal.posthoc.sample import SampledCalibrator
from densecal.registry import CALIBRATORS

__all__ = ["MOST", "TemperatureScaling", "best_temperature"]

MOST = 100.0
"""Temperatures are looked for between 1/100 and 100."""

_BLOCK = 1 << 16
"""Pixels whose derivatives are taken at a time."""


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    r"""The temperature of the lowest negative log-likelihood.

    With :math:`\beta = 1/T` the mean of :math:`-\log \mathrm{softmax}(\beta z)_y` is convex; its derivative is the mean of :math:`E_p[z] - z_y`, its second one that of
    :math:`\mathrm{Var}_p[z]`. Newton's steps within a bracket that halves where they leave it find the root to rounding.

    Args:
        logits: ``(P, C)``, float64.
        labels: Classes ``(P,)``, or shares ``(P, C)``.

    Returns:
        T in [1/100, 100]. Where predictions are all right, the highest with which the likelihood is 1 to rounding; where they are all wrong, 100.

    Example:
        >>> z = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
        >>> round(best_temperature(z, torch.tensor([0, 0, 0, 1])), 4)  # 4 / log 3: then the softmax says 3/4
        3.641
    """
    low, high, beta = 1 / MOST, MOST, 1.0
    for _ in range(200):
        slope, curvature = _derivatives(logits, labels, beta)
        low, high = (beta, high) if slope < 0 else (low, beta)
        step = beta - slope / curvature if curvature > 0 else low
        following = step if low < step < high else (low * high) ** 0.5
        if abs(following - beta) <= 1e-12 * beta:
            break
        beta = following
    return 1 / beta


def _derivatives(logits: Tensor, labels: Tensor, beta: float) -> tuple[float, float]:
    slope = curvature = 0.0
    for z, y in zip(logits.split(_BLOCK), labels.split(_BLOCK), strict=True):
        p = (beta * z).softmax(1)
        mean = (p * z).sum(1)
        right = z.gather(1, y.unsqueeze(1)).squeeze(1) if y.ndim == 1 else (y * z).sum(1)
        weight = 1.0 if y.ndim == 1 else y.sum(1)
        slope += float((weight * mean - right).sum())
        curvature += float((weight * (p * (z - mean.unsqueeze(1)).square()).sum(1)).sum())
    return slope / len(logits), curvature / len(logits)


@CALIBRATORS.register("temperature")
class TemperatureScaling(SampledCalibrator):
    r"""Divide all logits by one number: :math:`\mathrm{softmax}(z / T)`, or :math:`\sigma(z / T)` of every region.

    T has the lowest negative log-likelihood of the labels. The most probable class stays, so masks and Dice do. Above 1 the network was over-confident.

    It is fitted on at most ``max_pixels`` of the pixels that count, drawn evenly (:class:`densecal.posthoc.sample.PixelSample`), exactly on those.

    Args:
        num_classes: Number of classes C, or of regions.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label of pixels to leave out.
        max_pixels: Pixels to fit on, at most.
        seed: Of their draw.

    Attributes:
        temperature: T, float64, a number.

    Raises:
        ValueError: If an option is out of its range.

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599.

    Example:
        >>> logits = torch.tensor([[[4.0, 4.0, 4.0, 4.0], [0.0, 0.0, 0.0, 0.0]]])
        >>> scaling = TemperatureScaling(2).fit([(logits, torch.tensor([[0, 0, 0, 1]]))])
        >>> scaling(logits)[0, 0]
        tensor([0.7500, 0.7500, 0.7500, 0.7500])
        >>> scaling(torch.tensor([[[0.982], [0.018]]]), from_probs=True)[0, :, 0]
        tensor([0.7500, 0.2500])
    """

    keeps_labels = True
    temperature: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        max_pixels: int = 262_144,
        seed: int = 0,
    ) -> None:
        super().__init__(num_classes, activation=activation, ignore_index=ignore_index, max_pixels=max_pixels, seed=seed)
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))

    def summary(self) -> dict[str, Any]:
        return {"temperature": float(self.temperature)}

    def _solve(self) -> None:
        self.temperature.fill_(best_temperature(*self._sample.outcomes()))

    def _calibrate(self, z: Tensor) -> Tensor:
        return probabilities(z / self.temperature.to(z.dtype), self.activation)
