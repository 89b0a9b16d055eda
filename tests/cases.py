"""Inputs that many tests share: small, odd-sized, seeded, in one, two and three dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX

SHAPES = {"1d": (7,), "2d": (5, 7), "3d": (3, 5, 4)}

each_dimension = pytest.mark.parametrize("spatial", SHAPES.values(), ids=SHAPES.keys())


@dataclass(frozen=True)
class Case:
    """Logits ``(N, C, *spatial)``, a label map with ignored pixels, and soft labels with the same pixels ignored."""

    logits: Tensor
    label_map: Tensor
    soft_labels: Tensor

    @property
    def valid(self) -> Tensor:
        return self.label_map != DEFAULT_IGNORE_INDEX


def make_case(spatial: tuple[int, ...], *, num_classes: int = 3, batch: int = 2, ignored: float = 0.2, seed: int = 0, dtype=torch.float64) -> Case:
    """A random case; a fifth of the pixels is ignored unless told."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, num_classes, *spatial, generator=generator, dtype=dtype)
    label_map = torch.randint(0, num_classes, (batch, *spatial), generator=generator)
    soft_labels = torch.randn(batch, num_classes, *spatial, generator=generator, dtype=dtype).softmax(1)
    out = torch.rand(batch, *spatial, generator=generator) < ignored
    return Case(logits, label_map.masked_fill(out, DEFAULT_IGNORE_INDEX), soft_labels.masked_fill(out.unsqueeze(1), float(DEFAULT_IGNORE_INDEX)))
