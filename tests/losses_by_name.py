"""Every registered loss, and calling it with the side inputs that it asks for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from densecal.registry import LOSSES

COMPOSITIONS = ("compound", "deep_supervision")
"""They take objects, not settings."""

NAMES = [name for name in LOSSES.list() if name not in COMPOSITIONS]


CASE_IDS = ("one", "two", "three")
"""Names of the images of a batch, for losses that keep something for each."""


def takes(name: str, option: str) -> bool:
    return option in inspect.signature(LOSSES[name]).parameters


def make_loss(name: str, *, num_classes: int = 3, **options: Any) -> nn.Module:
    """The loss, with those of ``options`` that it has."""
    options |= {"num_classes": num_classes, "case_ids": CASE_IDS}
    return LOSSES.create(name, **{key: value for key, value in options.items() if takes(name, key)})


def side_inputs(loss: nn.Module, logits: Tensor) -> Mapping[str, Any]:
    """Made-up values, the same at each call, of what a loss needs."""
    n, _, *spatial = logits.shape
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=logits.device, dtype=logits.dtype)

    makers = {
        "image": lambda: draw(n, 1, *spatial),
        "spacing": lambda: torch.ones(n, len(spatial)),
        "teacher_logits": lambda: (
            3 * logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).sin()
        ),  # turned and renamed as the logits are
        "case_id": lambda: list(CASE_IDS[:n]),
        "perturbation": lambda: torch.full((n,), 0.1, device=logits.device),
    }
    return {need: makers[need]() for need in loss.needs}


def evaluate(loss: nn.Module, logits: Tensor, target: Tensor) -> Tensor:
    return loss(logits, target, context=side_inputs(loss, logits))
