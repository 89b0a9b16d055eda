"""A bounded sample of labelled pixels, for methods that need an optimiser."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from densecal.checks import check_positive
from densecal.ops.activation import Activation
from densecal.posthoc.base import Calibrator
from densecal.seeds import derive_seed
from densecal.targets.base import SoftTarget

__all__ = ["PixelSample", "SampledCalibrator"]

_BLOCK = 1 << 22
"""Pixels that keys are drawn for at a time."""


class PixelSample:
    """At most ``max_pixels`` pixels of all that were offered, each as likely as any other, without replacement.

    Every pixel draws a number from (seed, name of its case, place among the counted pixels of the case), and those with the smallest numbers stay. So the sample
    depends neither on the order of the cases nor on how they are batched, and a case more or less changes few of the others' pixels.

    Args:
        max_pixels: Pixels to keep.
        seed: Of the draws.
        activation: What the logits are of.

    Raises:
        ValueError: If ``max_pixels`` is not positive.
    """

    def __init__(self, max_pixels: int, seed: int, activation: Activation = "softmax") -> None:
        check_positive("max_pixels", max_pixels)
        self.max_pixels, self.seed, self.activation = max_pixels, seed, activation
        self.keys = torch.zeros(0, dtype=torch.float64)
        self.logits = torch.zeros(0)
        self.labels = torch.zeros(0)

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, z: Tensor, target: SoftTarget, counted: Tensor, case_ids: list[str]) -> None:
        """Offer the counted pixels of images.

        Args:
            z: Logits ``(N, C, *spatial)``.
            target: Their labels.
            counted: ``(N, *spatial)``, bool.
            case_ids: Name of each image.
        """
        hard = target.label_map is not None
        labels = target.label_map.flatten(1) if target.label_map is not None else target.one_hot.flatten(2)
        for n, case_id in enumerate(case_ids):
            places = counted[n].flatten().nonzero().squeeze(1)
            keys = self._draw(len(places), case_id)
            limit = float(self.keys[-1]) if len(self) == self.max_pixels else math.inf
            kept = (keys < limit).nonzero().squeeze(1)
            keys, places = keys[kept], places[kept.to(places.device)]
            drawn = z[n].flatten(1).index_select(1, places).T.cpu()  # (P, C)
            found = (labels[n][places] if hard else labels[n].index_select(1, places).T).cpu()
            self._merge(keys, drawn, found)

    def outcomes(self) -> tuple[Tensor, Tensor]:
        """Logits ``(P, K)`` of outcomes that exclude each other, float64, and what happened: classes ``(P,)`` or shares ``(P, K)``. A region is two outcomes, inside
        and outside, and R of them are R questions asked of every pixel."""
        z = self.logits.double()
        if self.activation == "softmax":
            return z, self.labels if self.labels.ndim == 1 else self.labels.double()
        half, inside = z.flatten() / 2, self.labels.double().flatten()
        return torch.stack([half, -half], dim=1), torch.stack([inside, 1 - inside], dim=1)

    def _draw(self, number: int, case_id: str) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "pixels", case_id))
        sizes = [min(_BLOCK, number - start) for start in range(0, number, _BLOCK)]
        blocks = [torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes]
        return torch.cat(blocks) if blocks else self.keys.new_zeros(0)

    def _merge(self, keys: Tensor, logits: Tensor, labels: Tensor) -> None:
        if len(self):
            if labels.ndim != self.labels.ndim:  # hard and soft references in one set: classes become shares
                labels, self.labels = (_shares(values, logits.shape[1]) for values in (labels, self.labels))
            keys, logits, labels = torch.cat([self.keys, keys]), torch.cat([self.logits, logits]), torch.cat([self.labels, labels])
        self.keys, order = keys.sort()
        order, self.keys = order[: self.max_pixels], self.keys[: self.max_pixels]
        self.logits, self.labels = logits[order], labels[order]


class SampledCalibrator(Calibrator):
    """Base of calibrators that are fitted on a :class:`PixelSample`, which is there as ``_sample`` until they are."""

    def __init__(self, num_classes: int, *, activation: Activation, ignore_index: int, max_pixels: int, seed: int) -> None:
        super().__init__(num_classes, activation=activation, ignore_index=ignore_index)
        self.max_pixels, self.seed = max_pixels, seed
        self._forget()

    def _observe(self, z: Tensor, target: SoftTarget, counted: Tensor, case_ids: list[str]) -> None:
        self._sample.add(z, target, counted, case_ids)

    def _forget(self) -> None:
        self._sample = PixelSample(self.max_pixels, self.seed, self.activation)


def _shares(labels: Tensor, num_classes: int) -> Tensor:
    return labels if labels.ndim == 2 else torch.nn.functional.one_hot(labels, num_classes).float()
