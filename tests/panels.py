"""Small data sets with several raters per case, made on the fly: each moves the border of the same boxes a little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pictures
import volumes

from densecal.data.card import DataCard

RATERS = ("anna", "ben", "cleo")


def opinions(label: np.ndarray, raters: int, *, ignore: int, seed: int) -> list[np.ndarray]:
    """The label map as each rater draws it: class 1 moved along the last axis, a pixel in a hundred without a class."""
    rng = np.random.default_rng(seed)
    drawn = []
    for rater in range(raters):
        other = np.where(label == 1, 0, label)
        other[np.roll(label == 1, rater, axis=-1)] = 1
        other[rng.random(label.shape) < 0.01] = ignore
        drawn.append(other)
    return drawn


def make_panel(root: Path, kind: str, *, cases: int = 8, missing: tuple[tuple[int, int], ...] = (), **changes: Any) -> DataCard:
    """Write cases ``s1, s2, ...`` with three raters each and return their card.

    Args:
        root: Folder.
        kind: ``"images"`` or ``"volumes"``.
        cases: How many.
        missing: Pairs of case and rater, counted from 1 and 0, whose file is not there.
        changes: Other entries of the card.
    """
    for n in range(1, cases + 1):
        if kind == "images":
            image, label = pictures.scene((40 + n % 3, 52 - n % 3), seed=n)
            label = np.where(label == 1, 1, 0).astype(np.uint8)
            pictures.save_image(root / f"s{n}" / "image.png", image)
        else:
            image, label = volumes.blob((14, 12 + n % 2, 10), seed=n)
            volumes.save(root / f"s{n}" / "image.nii.gz", image)
        for rater, drawn in enumerate(opinions(label, len(RATERS), ignore=9, seed=n)):
            if (n, rater) in missing:
                continue
            if kind == "images":
                pictures.save_image(root / f"s{n}" / f"mask_{RATERS[rater]}.png", drawn)
            else:
                volumes.save(root / f"s{n}" / f"mask_{RATERS[rater]}.nii.gz", drawn)
    settings: dict[str, Any] = {
        "name": "panel",
        "classes": ["background", "car"] if kind == "images" else ["background", "left", "right"],
        "root": str(root),
        "image_files": "{id}/image.*",
        "rater_files": ["{id}/mask_{rater}.*"],
        "ignore_index": 9,
        "image_channels": 3 if kind == "images" else 1,
        "patch_size": [32, 32] if kind == "images" else [8, 16, 8],
        "batch_size": 2,
        "num_workers": 0,
    }
    return DataCard(**(settings | changes))
