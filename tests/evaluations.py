"""Evaluations with everything that a report can show, of made-up models on made-up cases."""

from __future__ import annotations

import torch
from torch import Tensor

from densecal.labels import LabelSchema
from densecal.metrics import Evaluation, SegmentationEvaluation
from densecal.metrics.evaluation import LengthUnit
from densecal.report import Example


def blobs(
    schema: LabelSchema, spatial: tuple[int, ...], num_cases: int, *, sharpness: float = 1.0, noise: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Probabilities ``(N, C, *spatial)`` and label maps of smooth random structures; the last class never occurs. ``sharpness`` above 1 is over-confidence."""
    generator = torch.Generator().manual_seed(seed)
    coarse = [max(3, size // 10) for size in spatial]
    mode = "trilinear" if len(spatial) == 3 else "bilinear"

    def field(channels: int) -> Tensor:
        values = torch.randn(num_cases, channels, *coarse, generator=generator)
        return torch.nn.functional.interpolate(values, size=spatial, mode=mode, align_corners=True)

    score = 6 * field(schema.num_classes)
    score[:, -1] = -20
    if schema.background is not None:
        score[:, schema.background] += 4
    logits = score + noise * (1 + torch.rand(num_cases, *[1] * (1 + len(spatial)), generator=generator)) * field(schema.num_classes)
    logits = logits + 0.4 * torch.randn(logits.shape, generator=generator)
    return (0.8 * sharpness * logits).softmax(1), score.argmax(1)


def full_evaluation(schema: LabelSchema, probs: Tensor, label: Tensor, *, unit: LengthUnit = "mm") -> Evaluation:
    """All that the package computes."""
    metric = SegmentationEvaluation(schema, boundary_width=3.0, boundary_unit=unit, surface_tolerance=1.0, detail=True, replicates=50)
    metric.update(probs, label, torch.arange(len(probs)), spacing=torch.ones(probs.ndim - 2))
    return metric.compute()


def examples(schema: LabelSchema, probs: Tensor, label: Tensor, names: list[str]) -> list[Example]:
    """One example per name, the probability of class 0 with grain as its image."""
    grain = 0.05 * torch.randn(probs[:, 0].shape, generator=torch.Generator().manual_seed(1))
    return [Example(name, probs[i, 0] + grain[i], label[i], probs[i]) for i, name in enumerate(names)]
