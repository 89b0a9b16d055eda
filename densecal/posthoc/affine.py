"""Affine maps of the logits: a factor and an offset per class (vector scaling), or a matrix (Dirichlet calibration)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from densecal.checks import check_non_negative
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation, probabilities
from densecal.posthoc.sample import SampledCalibrator
from densecal.registry import CALIBRATORS

__all__ = ["DirichletCalibration", "VectorScaling", "dirichlet_map", "vector_scale"]

_BLOCK = 1 << 16
"""Pixels whose gradient is taken at a time."""


def vector_scale(logits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r"""A factor and an offset for each class, :math:`w_c z_c + b_c`.

    Args:
        logits: ``(N, C, *spatial)``.
        weight: ``(C,)``.
        bias: ``(C,)``.

    Returns:
        Logits of the same shape.

    Example:
        >>> vector_scale(torch.tensor([[[2.0], [1.0]]]), torch.tensor([0.5, 1.0]), torch.tensor([0.0, -1.0])).flatten()
        tensor([1., 0.])
    """
    shape = (-1, *([1] * (logits.ndim - 2)))
    return logits * weight.to(logits.dtype).view(shape) + bias.to(logits.dtype).view(shape)


def dirichlet_map(logits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r"""A linear map of the classes' logits, :math:`W z + b`.

    Args:
        logits: ``(N, C, *spatial)``.
        weight: ``(C, C)``; row c is what class c takes of each logit.
        bias: ``(C,)``.

    Returns:
        Logits of the same shape.

    Example:
        >>> dirichlet_map(torch.tensor([[[2.0], [1.0]]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.zeros(2)).flatten()
        tensor([3., 1.])
    """
    mapped = torch.einsum("dc,nc...->nd...", weight.to(logits.dtype), logits)
    return mapped + bias.to(logits.dtype).view(-1, *([1] * (logits.ndim - 2)))


class _Affine(SampledCalibrator):
    """Fitted by L-BFGS on the negative log-likelihood of a sample of pixels, which is convex in weights and offsets.

    A class that no pixel of the sample has is left out of the fit and keeps its logit: the likelihood would push it down without end.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, num_classes: int, *, activation: Activation, ignore_index: int, max_pixels: int, seed: int, weight: Tensor) -> None:
        super().__init__(num_classes, activation=activation, ignore_index=ignore_index, max_pixels=max_pixels, seed=seed)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.zeros(num_classes, dtype=torch.float64))

    def summary(self) -> dict[str, Any]:
        return {"weight": self.weight.tolist(), "bias": self.bias.tolist()}

    @abstractmethod
    def _map(self, logits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The map itself."""

    def _penalty(self, weight: Tensor, bias: Tensor) -> Tensor:
        """What is added to the mean negative log-likelihood."""
        return weight.new_zeros(())

    def _solve(self) -> None:
        z, labels = self._sample.logits.double(), self._sample.labels
        shares = labels if labels.ndim == 1 else labels.double()
        known = (labels.bincount(minlength=self.num_classes) if labels.ndim == 1 else labels.sum(0)) > 0
        start = [
            torch.ones_like(self.weight) if self.weight.ndim == 1 else torch.eye(self.num_classes, dtype=torch.float64),
            torch.zeros_like(self.bias),
        ]
        found = [value.cpu().clone().requires_grad_() for value in start]
        optimizer = torch.optim.LBFGS(
            found, max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, history_size=20, line_search_fn="strong_wolfe"
        )
        total = len(z) * (1 if self.activation == "softmax" else self.num_classes)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self._penalty(*found)
            loss.backward() if loss.requires_grad else None
            value = loss.detach()
            for logits, part in zip(z.split(_BLOCK), shares.split(_BLOCK), strict=True):
                mapped = self._map(logits, *found)
                mapped = mapped if self.activation == "sigmoid" else mapped.masked_fill(~known, -1e30)  # infinity times a share of 0 is no number
                if self.activation == "softmax":
                    block = F.cross_entropy(mapped, part, reduction="sum") / total
                else:
                    block = F.binary_cross_entropy_with_logits(mapped, part, reduction="sum") / total
                block.backward()
                value = value + block.detach()
            for parameter in found:
                assert parameter.grad is not None
                parameter.grad[~known] = 0
            return value

        with torch.enable_grad():
            optimizer.step(closure)
        for buffer, value in zip((self.weight, self.bias), found, strict=True):
            buffer.copy_(value.detach())

    def _calibrate(self, z: Tensor) -> Tensor:
        return probabilities(self._map(z, self.weight, self.bias), self.activation)


@CALIBRATORS.register("vector")
class VectorScaling(_Affine):
    r"""A factor and an offset for each class or region: :math:`\mathrm{softmax}(w \odot z + b)`, or a sigmoid (Platt scaling of every region).

    Fitted by L-BFGS on at most ``max_pixels`` pixels, drawn evenly (:class:`densecal.posthoc.sample.PixelSample`). A class without a pixel is left out of the fit and keeps its logit. The most
    probable class may change.

    Args:
        num_classes: Number of classes C, or of regions.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label of pixels to leave out.
        max_pixels: Pixels to fit on, at most.
        seed: Of their draw.

    Attributes:
        weight: w, ``(C,)``, float64.
        bias: b, ``(C,)``, float64.

    Raises:
        ValueError: If an option is out of its range.

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599; for regions Platt, "Probabilistic Outputs for Support Vector Machines",
        1999.
        Differs from the paper: z is log p, the network's logits up to a constant in each pixel, so that what was fitted on logits acts alike on saved probabilities.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
        >>> scaling = VectorScaling(2).fit([(logits, torch.tensor([[0, 0, 0, 1]]))])
        >>> scaling(logits)[0, :, 0]
        tensor([0.7500, 0.2500])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        max_pixels: int = 262_144,
        seed: int = 0,
    ) -> None:
        weight = torch.ones(num_classes, dtype=torch.float64)
        super().__init__(num_classes, activation=activation, ignore_index=ignore_index, max_pixels=max_pixels, seed=seed, weight=weight)

    def _map(self, logits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return vector_scale(logits, weight, bias)


@CALIBRATORS.register("dirichlet")
class DirichletCalibration(_Affine):
    r"""A linear map of log probabilities, :math:`\mathrm{softmax}(W \log p + b)`: the calibration map if the network's outputs are Dirichlet-distributed in each class.

    Fitted by L-BFGS on at most ``max_pixels`` pixels, drawn evenly (:class:`densecal.posthoc.sample.PixelSample`), with off-diagonal and intercept regularisation
    (ODIR) added to the mean negative log-likelihood:

    .. math:: \frac{\lambda}{C (C - 1)} \sum_{i \ne j} w_{ij}^2 + \frac{\mu}{C} \sum_j b_j^2

    A class without a pixel is left out of the fit and keeps its logit. The most probable class may change.

    Args:
        num_classes: Number of classes C.
        activation: ``"softmax"`` alone.
        ignore_index: Label of pixels to leave out.
        off_diagonal: Weight lambda, at least 0.
        intercept: Weight mu, at least 0.
        max_pixels: Pixels to fit on, at most.
        seed: Of their draw.

    Attributes:
        weight: W, ``(C, C)``, float64.
        bias: b, ``(C,)``, float64.

    Raises:
        ValueError: If an option is out of its range, or for regions.

    Reference:
        Kull et al., "Beyond temperature scaling", NeurIPS 2019, arXiv:1910.12656. Their matrix scaling has logits in place of log p, which differ by a constant in
        each pixel. They choose lambda and mu by cross-validation.

    Example:
        >>> logits = torch.zeros(1, 2, 4)
        >>> calibration = DirichletCalibration(2, off_diagonal=0.0, intercept=0.0).fit([(logits, torch.tensor([[0, 0, 0, 1]]))])
        >>> calibration(logits)[0, :, 0]
        tensor([0.7500, 0.2500])
    """

    activations = ("softmax",)

    def __init__(
        self,
        num_classes: int,
        *,
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        off_diagonal: float = 0.01,
        intercept: float = 0.01,
        max_pixels: int = 262_144,
        seed: int = 0,
    ) -> None:
        check_non_negative("off_diagonal", off_diagonal)
        check_non_negative("intercept", intercept)
        self.off_diagonal, self.intercept = off_diagonal, intercept
        weight = torch.eye(num_classes, dtype=torch.float64)
        super().__init__(num_classes, activation=activation, ignore_index=ignore_index, max_pixels=max_pixels, seed=seed, weight=weight)

    def _map(self, logits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dirichlet_map(logits, weight, bias)

    def _penalty(self, weight: Tensor, bias: Tensor) -> Tensor:
        c = self.num_classes
        others = weight - weight.diag().diag()
        return self.off_diagonal * others.square().sum() / (c * (c - 1)) + self.intercept * bias.square().sum() / c
