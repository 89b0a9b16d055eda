"""Small pictures and masks, made on the fly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SHAPE = (24, 40)


def photo(seed: int = 0, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Noise in colour, ``(H, W, 3)``."""
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def mask(values: Sequence[int], seed: int = 0, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Blocks of 4 x 4 pixels of the given values, each of which occurs."""
    rows, columns = -(-shape[0] // 4), -(-shape[1] // 4)
    blocks = np.resize(np.asarray(values), rows * columns)
    np.random.default_rng(seed).shuffle(blocks)
    return blocks.reshape(rows, columns).repeat(4, axis=0).repeat(4, axis=1)[: shape[0], : shape[1]].astype(np.uint8)


def save(path: Path, pixels: np.ndarray, *, palette: np.ndarray | None = None, **options: Any) -> Path:
    """Write a picture in the format that its name says, with ``palette`` ``(256, 3)`` as one that has a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette.astype(np.uint8).tobytes())
    image.save(path, **options)
    return path


def voc_palette() -> np.ndarray:
    """The 256 colours of PASCAL VOC: bits 0, 3, 6 of the number are the highest bits of red, bits 1, 4, 7 of green, bits 2 and 5 of blue."""
    colors = [[sum((number >> (3 * k + channel) & 1) << (7 - k) for k in range(3)) for channel in range(3)] for number in range(256)]
    return np.array(colors, np.uint8)
