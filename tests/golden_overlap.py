"""Golden strata of overlap measures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import handles, ignore

from densecal.metrics import FineGrainedOverlap

NAMES = {"Acc": "accuracy", "IoU": "iou", "Dice": "dice"}
SENSES = {"D": "dataset", "I": "image", "C": "class"}


def numbers(case: dict[str, Any], tensors: dict[str, torch.Tensor], *, background: int | None) -> dict[str, float]:
    """Ours by their names, in percent, image by image."""
    q = case["params"]["q"]
    metric = FineGrainedOverlap(tensors["probs"].shape[1], background=background, worst_percent=q, ignore_index=ignore(case))
    for probs, label in zip(tensors["probs"].split(1), tensors["labels"].long().split(1), strict=True):
        metric.update(probs, label)
    ours = {name: 100 * value.item() for name, value in metric.compute().items()}
    theirs = {"Acc": ours["accuracy_pooled"]}
    for short, score in NAMES.items():
        for letter, sense in SENSES.items():
            theirs[f"m{short}{letter}"] = ours[f"{score}_{sense}"]
            if sense != "dataset":
                theirs[f"m{short}{letter}{q}"] = ours[f"{score}_{sense}_worst"]
                theirs[f"m{short}{letter}Q"] = ours[f"{score}_{sense}_worst_mean"]
    return theirs


@handles("finegrained_accuracy")
def check_fine_grained(case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    found = numbers(case, tensors, background=None)
    if case["params"]["binary"]:
        # The published code leaves the background out of D and I, not out of C.
        foreground = numbers(case, tensors, background=0)
        found = {name: value if "C" in name[-3:] else foreground[name] for name, value in found.items()}
    assert found == pytest.approx(case["results"], abs=1e-4)


@handles("finegrained_absent_class")
def check_absent_class(case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    # Its filler for absent classes leaks into D and C; I is right. Without the class, D and C are what its other case shows for classes that occur.
    found, results = numbers(case, tensors, background=None), case["results"]
    right = {name: value for name, value in results.items() if name == "Acc" or "I" in name.removeprefix("mIoU")}
    assert {name: found[name] for name in right} == pytest.approx(right, abs=1e-4)
    assert len(right) == 10
    assert all(0 < value < 100 for value in found.values())
    occurring = [c for c in range(tensors["probs"].shape[1]) if (tensors["labels"] == c).any()]
    assert len(occurring) == tensors["probs"].shape[1] - 1
    fewer = {"probs": tensors["probs"][:, occurring], "labels": torch.searchsorted(torch.tensor(occurring), tensors["labels"].long())}
    fewer["probs"] = fewer["probs"] / fewer["probs"].sum(1, keepdim=True)
    assert found == pytest.approx(numbers(case, fewer, background=None))
