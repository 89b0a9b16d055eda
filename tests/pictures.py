"""Small street scenes, made on the fly: coloured boxes in noise, with labels in a palette."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

CLASSES = ["road", "car", "sky"]
PALETTE = [[128, 64, 128], [0, 0, 142], [70, 130, 180]]
VOID = 255
CARD: dict[str, Any] = {
    "name": "scenes",
    "classes": CLASSES,
    "palette": PALETTE,
    "background": None,
    "ignore_index": VOID,
    "image_files": "images/{id}.*",
    "label_files": ["labels/{id}.png"],
    "case_lists": "{split}.txt",
    "split_names": {"train": ["train"], "val": ["val"], "test": ["test"]},
    "image_channels": 3,
    "normalisation": "imagenet",
    "patch_size": [32, 32],
    "batch_size": 2,
    "num_workers": 0,
    "epochs": 1,
}
SPLITS = {"train": range(4), "val": range(4, 6), "test": range(6, 9)}


def scene(shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image ``(H, W, 3)`` and its label ``(H, W)``: road below, sky above, a car, and a void border a pixel wide."""
    rng = np.random.default_rng(seed)
    height, width = shape
    label = np.zeros(shape, np.uint8)
    label[: height // 2] = 2
    top, left = height // 3 + seed % 4, width // 4 + seed % 5
    label[top : top + height // 4, left : left + width // 4] = 1
    image = np.array(PALETTE)[label] + rng.normal(0, 12, (*shape, 3))
    label[[0, -1]] = VOID
    label[:, [0, -1]] = VOID
    return image.clip(0, 255).round().astype(np.uint8), label


def save_image(path: Path, image: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


def save_label(path: Path, label: np.ndarray, palette: list[list[int]] | None = None) -> Path:
    """A palette PNG, as PASCAL VOC has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(label, mode="P")
    colors = [*[*(palette or PALETTE), *[[0, 0, 0]] * 256][:255], [224, 224, 192]]  # VOC's colour of void
    picture.putpalette([value for color in colors for value in color])
    picture.save(path)
    return path


def make_scenes(root: Path, **changes: Any) -> Path:
    """Write nine scenes of different sizes, their lists and their card; return the card's file."""
    for name, numbers in SPLITS.items():
        (root / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.txt").write_text("".join(f"s{n}\n" for n in numbers))
        for n in numbers:
            image, label = scene((40 + n, 52 - n), seed=n)
            save_image(root / "images" / f"s{n}.{'jpg' if n % 2 else 'png'}", image)
            save_label(root / "labels" / f"s{n}.png", label)
    card = root / "scenes.yaml"
    card.write_text(yaml.safe_dump(CARD | changes))
    return card
