"""What the handlers of golden strata share: reading a case, comparing values and gradients, the list of handlers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import shared_folder
from torch import Tensor, nn

from densecal.labels import DEFAULT_IGNORE_INDEX

FOLDER = shared_folder("DENSECAL_GOLDEN", "golden")

HANDLERS: dict[str, Any] = {}


def handles(*strata: str):
    def register(function):
        HANDLERS.update(dict.fromkeys(strata, function))
        return function

    return register


def load(case: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import safe_open

    assert FOLDER is not None
    with safe_open(str(FOLDER / case["file"]), "pt") as file:
        return {name: file.get_tensor(f"{case['id']}/{name}") for name in case["tensors"]}


def check(case: dict[str, Any], tensors: dict[str, Tensor], loss: nn.Module, target: Tensor, *, factor: float = 1.0, gradient: bool = True) -> None:
    """Loss and gradient in float64 and float32 within the tolerances of the folder's README."""
    for dtype, loss_tolerance, gradient_tolerance in ((torch.float64, 1e-6, 1e-5), (torch.float32, 1e-5, 1e-4)):
        logits = with_spatial(tensors["logits"]).to(dtype).requires_grad_()
        labels = target.to(dtype) if target.is_floating_point() else target
        value = loss(logits, labels) * factor
        expected = case["results"]["loss"]
        absolute = 1e-6 if abs(expected) < 1e-3 else 0.0  # 0 up to rounding, where prediction equals target
        assert value.dtype == dtype
        assert value.item() == pytest.approx(expected, rel=loss_tolerance, abs=absolute)
        if gradient:
            value.backward()
            published = with_spatial(tensors["grad"]).to(dtype)
            largest = published.abs().max().item()
            torch.testing.assert_close(logits.grad, published, rtol=0, atol=gradient_tolerance * largest)


def with_spatial(logits: Tensor) -> Tensor:
    """Classification logits ``(N, C)`` as ``(N, C, 1)``."""
    return logits.unsqueeze(-1) if logits.ndim == 2 else logits


def labels_of(tensors: dict[str, Tensor]) -> Tensor:
    labels = tensors["labels"].long()
    return labels.unsqueeze(-1) if tensors["logits"].ndim == 2 else labels


def ignore(case: dict[str, Any]) -> int:
    value = case["params"].get("ignore_index")
    return DEFAULT_IGNORE_INDEX if value is None else value
