"""Small images that are their labels, painted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from densecal.data.card import DataCard

COLORS = np.array([[40, 40, 40], [230, 40, 40], [40, 230, 40], [40, 40, 230], [230, 230, 40]], np.uint8)


def tiles(shape: tuple[int, int], seed: int = 0, num_classes: int = 5) -> np.ndarray:
    """A label of tiles of 12 x 15 pixels, each of a class of its own."""
    rows, columns = -(-shape[0] // 12), -(-shape[1] // 15)
    coarse = np.random.default_rng(seed).integers(0, num_classes, (rows, columns), dtype=np.uint8)
    return np.kron(coarse, np.ones((12, 15), np.uint8))[: shape[0], : shape[1]]


def image_card(**changes: Any) -> DataCard:
    settings: dict[str, Any] = {
        "name": "painted",
        "classes": [f"c{c}" for c in range(5)],
        "background": None,
        "ignore_index": 255,
        "image_channels": 3,
        "normalisation": "imagenet",
        "patch_size": [32, 48],
        "num_workers": 0,
    }
    return DataCard(**(settings | changes))


def painted_set(root: Path, cases: int = 8, **changes: Any) -> DataCard:
    """Write images of slightly different shapes and return their card."""
    for n in range(cases):
        label = tiles((40 + n, 60 - n), seed=n)
        for name, values in (("images", COLORS[label]), ("labels", label)):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / name / f"p{n:02}.png")
    return image_card(root=str(root), **changes)


def inside(label: np.ndarray, margin: int = 2) -> np.ndarray:
    """Where all pixels within ``margin`` have the same label."""
    kernel = np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)
    return cv2.dilate(label, kernel) == cv2.erode(label, kernel)
