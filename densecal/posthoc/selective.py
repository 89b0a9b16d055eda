"""Selective scaling: only where a classifier suspects a mistake, the confidence is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from densecal.checks import check_positive
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.posthoc.sample import SampledCalibrator
from densecal.posthoc.temperature import best_temperature
from densecal.registry import CALIBRATORS
from densecal.seeds import derive_seed

__all__ = ["SelectiveScaling"]

_BATCH = 8192


@CALIBRATORS.register("selective")
class SelectiveScaling(SampledCalibrator):
    r"""Divide the logits of pixels that are likely to be wrong by a temperature, and leave the others as they are.

    A network of one hidden layer learns from the probabilities of a pixel whether its most probable class is wrong; mistakes and hits weigh alike in its
    cross-entropy, since mistakes are few. Where it says so, the logits are divided by the temperature of lowest negative log-likelihood among the pixels that it suspects.
    The most probable class stays.

    Both are fitted on at most ``max_pixels`` pixels, drawn evenly (:class:`densecal.posthoc.sample.PixelSample`). Classes only.

    Args:
        num_classes: Number of classes C.
        activation: ``"softmax"`` alone.
        ignore_index: Label of pixels to leave out.
        hidden: Units of the hidden layer.
        steps: Steps of Adam, of 8,192 pixels each.
        learning_rate: Of Adam.
        max_pixels: Pixels to fit on, at most.
        seed: Of all draws.

    Attributes:
        temperature: Of suspected pixels, float64, a number; 1 where no pixel is suspected.

    Raises:
        ValueError: If an option is out of its range, or for regions.

    Reference:
        Wang et al., "On Calibrating Semantic Segmentation Models: Analyses and An Algorithm", CVPR 2023, arXiv:2212.12053.
        Differs from the paper: the temperature is that of lowest negative log-likelihood, and the size of the classifier is ours.

    Example:
        >>> z = torch.randn(1, 3, 500, generator=torch.Generator().manual_seed(0))
        >>> label = torch.randint(0, 3, (1, 500), generator=torch.Generator().manual_seed(1))
        >>> scaling = SelectiveScaling(3, steps=20).fit([(4 * z, label)])
        >>> float(scaling.temperature) > 1, torch.equal(scaling(z).argmax(1), z.argmax(1))
        (True, True)
    """

    activations = ("softmax",)
    keeps_labels = True
    temperature: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        hidden: int = 32,
        steps: int = 300,
        learning_rate: float = 0.01,
        max_pixels: int = 262_144,
        seed: int = 0,
    ) -> None:
        super().__init__(num_classes, activation=activation, ignore_index=ignore_index, max_pixels=max_pixels, seed=seed)
        for name, value in (("hidden", hidden), ("steps", steps), ("learning_rate", learning_rate)):
            check_positive(name, value)
        self.hidden, self.steps, self.learning_rate = hidden, steps, learning_rate
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))
        for name, shape in zip(self._LAYERS, ((hidden, num_classes), (hidden,), (1, hidden), (1,)), strict=True):
            self.register_buffer(name, torch.zeros(shape))

    _LAYERS = ("hidden_weight", "hidden_bias", "output_weight", "output_bias")

    def summary(self) -> dict[str, Any]:
        return {"temperature": float(self.temperature)}

    def _solve(self) -> None:
        z, labels = self._sample.outcomes()
        probs, top = z.float().exp(), z.argmax(1)
        wrong = (top != labels).float() if labels.ndim == 1 else 1 - labels.gather(1, top.unsqueeze(1)).squeeze(1).float()
        share = wrong.mean().clamp(1e-6, 1 - 1e-6)
        balance = wrong / share + (1 - wrong) / (1 - share)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "classifier"))
        layers = [torch.randn(self.hidden, self.num_classes, generator=generator), torch.zeros(self.hidden)]
        layers += [torch.randn(1, self.hidden, generator=generator) / self.hidden**0.5, torch.zeros(1)]
        for layer in layers:
            layer.requires_grad_()
        optimizer = torch.optim.Adam(layers, lr=self.learning_rate)
        with torch.enable_grad():
            for _ in range(self.steps):
                batch = torch.randint(0, len(probs), (min(_BATCH, len(probs)),), generator=generator)
                loss = F.binary_cross_entropy_with_logits(
                    self._suspicion(probs[batch].T.unsqueeze(0), layers)[0], wrong[batch], weight=balance[batch]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for name, layer in zip(self._LAYERS, layers, strict=True):
            getattr(self, name).copy_(layer.detach())
        suspected = self._suspicion(probs.T.unsqueeze(0), [layer.detach() for layer in layers])[0] > 0
        self.temperature.fill_(best_temperature(z[suspected], labels[suspected]) if bool(suspected.any()) else 1.0)

    @staticmethod
    def _suspicion(probs: Tensor, layers: list[Tensor]) -> Tensor:
        """Log odds of a mistake ``(N, P)`` from probabilities ``(N, C, P)``."""
        first, first_bias, second, second_bias = (layer.to(probs.dtype) for layer in layers)
        inner = torch.einsum("hc,ncp->nhp", first, probs) + first_bias.view(-1, 1)
        return torch.einsum("oh,nhp->nop", second, inner.relu()).squeeze(1) + second_bias

    def _calibrate(self, z: Tensor) -> Tensor:
        suspected = self._suspicion(z.exp(), [getattr(self, name) for name in self._LAYERS]) > 0
        temperature = torch.where(suspected, self.temperature.to(z.dtype), 1.0)
        return (z / temperature.unsqueeze(1)).softmax(1)
