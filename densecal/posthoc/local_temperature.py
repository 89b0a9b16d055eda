"""Local temperature scaling: a temperature for each pixel, from the logits around it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from densecal.checks import check_odd, check_positive
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation, probabilities
from densecal.posthoc.base import Calibrator
from densecal.posthoc.temperature import MOST, best_temperature
from densecal.registry import CALIBRATORS
from densecal.seeds import derive_seed
from densecal.targets.base import SoftTarget

__all__ = ["LocalTemperatureScaling", "local_temperature"]

_LEAVES, _GATES = 4, 3
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CANDIDATES = 8
"""Crops that a case offers."""
_BATCH = 4
_SURE = 16.0
"""Classes less probable than e^-16 are all the same to the convolutions."""


def local_temperature(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dilation: int = 2,
    base: float = 1.0,
    least: float = 1 / MOST,
    image: Tensor | None = None,
    image_weight: Tensor | None = None,
    image_bias: Tensor | None = None,
) -> Tensor:
    r"""A temperature for each pixel, from a tree of convolutions.

    Four leaves :math:`t_i = \text{base} + (w_i * z)` are mixed by three gates :math:`g_i = \sigma(v_i * z)`, two by two and then the two results:

    .. math:: T = g_3 (g_1 t_1 + (1 - g_1) t_2) + (1 - g_3) (g_2 t_3 + (1 - g_2) t_4)

    With an image, a last gate mixes T with a leaf of the image. Borders are reflected; along an axis of no more pixels than are reflected they are repeated.

    Args:
        features: What the convolutions see, the logits in the paper, ``(N, C, *spatial)``, 1 to 3 spatial dims.
        weight: Kernels of the four leaves and three gates ``(7, C, *kernel)``; with an image an eighth, its gate.
        bias: As many numbers.
        dilation: Distance between the taps of a kernel.
        base: Temperature where all kernels are 0.
        least: Smaller temperatures are raised to this.
        image: ``(N, C_image, *spatial)``.
        image_weight: Kernel of the image's leaf ``(1, C_image, *kernel)``.
        image_bias: Its number, ``(1,)``.

    Returns:
        ``(N, 1, *spatial)``, at least ``least``.

    Reference:
        Ding et al., "Local Temperature Scaling for Probability Calibration", ICCV 2021, arXiv:2008.05105.
        Differs from the authors' code: there 1 is added twice, which is ``base=2``.

    Example:
        >>> local_temperature(torch.randn(1, 3, 6, 6), torch.zeros(7, 3, 3, 3), torch.zeros(7)).unique()
        tensor([1.])
    """
    found = _convolve(features, weight, bias, dilation)
    t, g = base + found[:, :_LEAVES], found[:, _LEAVES:].sigmoid()
    left = g[:, :1] * t[:, :1] + (1 - g[:, :1]) * t[:, 1:2]
    right = g[:, 1:2] * t[:, 2:3] + (1 - g[:, 1:2]) * t[:, 3:4]
    temperature = g[:, 2:3] * left + (1 - g[:, 2:3]) * right
    if image is not None:
        assert image_weight is not None
        assert image_bias is not None
        leaf = base + _convolve(image, image_weight, image_bias, dilation)
        temperature = g[:, 3:4] * temperature + (1 - g[:, 3:4]) * leaf
    return temperature.clamp_min(least)


def _convolve(values: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    dims = values.ndim - 2
    for axis in range(dims):
        margin = dilation * (weight.shape[2 + axis] // 2)
        padding = [0] * (2 * dims)
        padding[2 * (dims - 1 - axis)] = padding[2 * (dims - 1 - axis) + 1] = margin  # torch counts axes from the last
        values = F.pad(values, padding, mode="reflect" if values.shape[2 + axis] > margin else "replicate")
    return _CONVOLUTIONS[dims](values, weight.to(values.dtype), bias.to(values.dtype), dilation=dilation)


@CALIBRATORS.register("local_temperature")
class LocalTemperatureScaling(Calibrator):
    r"""Divide the logits of each pixel by a temperature of its own, which a small tree of convolutions sees in the logits around it: :math:`\mathrm{softmax}(z / T(x))`.

    The most probable class stays. Fitted by Adam on crops: every case offers eight, around pixels that count, and ``max_crops`` of all are kept, drawn as the pixels of
    :class:`densecal.posthoc.sample.PixelSample` are. It begins at the one temperature that is best for the crops, and stays there if nothing better is found.

    Args:
        num_classes: Number of classes C, or of regions.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label of pixels to leave out.
        kernel_size: Side of the kernels, odd.
        dilation: Distance between their taps, in pixels.
        steps: Steps of Adam, of four crops each.
        learning_rate: Of Adam.
        max_crops: Crops to fit on, at most.
        crop_size: Side of a crop, in pixels.
        seed: Of all draws.

    Attributes:
        weight: Kernels ``(7, C, *kernel)``, four leaves and three gates.
        bias: ``(7,)``.

    Raises:
        ValueError: If an option is out of its range, or ``kernel_size`` even.

    Reference:
        Ding et al., "Local Temperature Scaling for Probability Calibration", ICCV 2021, arXiv:2008.05105.
        Differs from the paper: the image is left out, so that saved probabilities are enough (:func:`local_temperature` takes one); the convolutions see log p, cut at -16 and
        divided by 16; the tree begins at the best single temperature, its gates at small random numbers, without which its branches would stay the same.

    Example:
        >>> z = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> scaling = LocalTemperatureScaling(2, steps=10).fit([(z, torch.zeros(1, 16, 16, dtype=torch.long))])
        >>> torch.equal(scaling(z).argmax(1), z.argmax(1))
        True
    """

    keeps_labels = True
    pointwise = False
    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        kernel_size: int = 5,
        dilation: int = 2,
        steps: int = 150,
        learning_rate: float = 0.003,
        max_crops: int = 64,
        crop_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(num_classes, activation=activation, ignore_index=ignore_index)
        check_odd("kernel_size", kernel_size)
        for name, value in (
            ("dilation", dilation),
            ("steps", steps),
            ("learning_rate", learning_rate),
            ("max_crops", max_crops),
            ("crop_size", crop_size),
        ):
            check_positive(name, value)
        self.kernel_size, self.dilation, self.steps, self.learning_rate = kernel_size, dilation, steps, learning_rate
        self.max_crops, self.crop_size, self.seed = max_crops, crop_size, seed
        self.register_buffer("weight", torch.zeros(_LEAVES + _GATES, num_classes, 1))
        self.register_buffer("bias", torch.zeros(_LEAVES + _GATES))
        self._forget()

    def summary(self) -> dict[str, Any]:
        return {"kernel": list(self.weight.shape), "bias": self.bias.tolist()}

    def _observe(self, z: Tensor, target: SoftTarget, counted: Tensor, case_ids: list[str]) -> None:
        hard = target.label_map is not None
        labels = target.label_map.unsqueeze(1) if target.label_map is not None else target.one_hot
        for n, case_id in enumerate(case_ids):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "crops", case_id))
            places = counted[n].nonzero()
            if not len(places):
                continue
            for centre in places[torch.randint(0, len(places), (_CANDIDATES,), generator=generator).to(places.device)].tolist():
                key = float(torch.rand((), generator=generator, dtype=torch.float64))
                starts = [max(0, min(c - self.crop_size // 2, size - self.crop_size)) for c, size in zip(centre, z.shape[2:], strict=True)]
                window = (slice(None), *(slice(start, start + self.crop_size) for start in starts))
                logits, label, valid = (part.unsqueeze(0).cpu().clone() for part in (z[n][window].float(), labels[n][window], counted[n][window[1:]]))
                self._crops.append((key, logits, label[:, 0] if hard else label.float(), valid))
            self._crops.sort(key=lambda one: one[0])
            del self._crops[self.max_crops :]

    def _solve(self) -> None:
        dims = self._crops[0][1].ndim - 2
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "fit"))
        weight = torch.zeros(_LEAVES + _GATES, self.num_classes, *([self.kernel_size] * dims))
        gates = weight[_LEAVES:]
        gates.copy_(torch.randn(gates.shape, generator=generator) / math.sqrt(gates[0].numel()))
        bias = torch.zeros(_LEAVES + _GATES)
        bias[:_LEAVES] = self._single() - 1
        best = (weight.clone(), bias.clone())
        before = self._mean_loss(*best)
        found = [weight.requires_grad_(), bias.requires_grad_()]
        optimizer = torch.optim.Adam(found, lr=self.learning_rate)
        with torch.enable_grad():
            for _ in range(self.steps):
                optimizer.zero_grad()
                for number in torch.randint(0, len(self._crops), (_BATCH,), generator=generator).tolist():
                    total, count = self._loss(self._crops[number], *found)
                    (total / (count * _BATCH)).backward()
                optimizer.step()
        after = (weight.detach(), bias.detach())
        if self._mean_loss(*after) < before:
            best = after
        self.weight, self.bias = (value.to(self.bias.device) for value in best)

    def _single(self) -> float:
        """The one temperature that is best for all crops."""
        z, labels = [], []
        for _, logits, label, counted in self._crops:
            z.append(logits.movedim(1, -1)[counted].double())
            labels.append(label[counted] if self._hard(label, logits) else label.movedim(1, -1)[counted].double())
        flat = torch.cat(z)
        if self.activation == "softmax":
            return best_temperature(flat, torch.cat(labels))
        half, inside = flat.flatten() / 2, torch.cat(labels).flatten()
        return best_temperature(torch.stack([half, -half], dim=1), torch.stack([inside, 1 - inside], dim=1))

    @staticmethod
    def _hard(label: Tensor, logits: Tensor) -> bool:
        return label.ndim < logits.ndim

    def _temperature(self, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return local_temperature(z.clamp(-_SURE, _SURE) / _SURE, weight, bias, dilation=self.dilation)

    def _loss(self, crop: tuple[float, Tensor, Tensor, Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, int]:
        """Summed negative log-likelihood of a crop's pixels that count, and their number."""
        _, z, label, counted = crop
        scaled = z / self._temperature(z, weight, bias)
        if self.activation == "softmax":
            values = F.cross_entropy(scaled, label, reduction="none")
        else:
            values = F.binary_cross_entropy_with_logits(scaled, label, reduction="none").mean(1)
        return (values * counted).sum(), int(counted.sum())

    def _mean_loss(self, weight: Tensor, bias: Tensor) -> float:
        parts = [self._loss(crop, weight, bias) for crop in self._crops]
        return sum(float(total) for total, _ in parts) / sum(count for _, count in parts)

    def _calibrate(self, z: Tensor) -> Tensor:
        return probabilities(z / self._temperature(z, self.weight, self.bias), self.activation)

    def _forget(self) -> None:
        self._crops: list[tuple[float, Tensor, Tensor, Tensor]] = []

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        if (value := state_dict.get(f"{prefix}weight")) is not None:  # as many axes as the images had
            self.weight = torch.empty_like(value, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
