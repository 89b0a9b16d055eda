"""Data for the examples: the real sets where $DENSECAL_DATA holds them, else small made ones in the same folders and files."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

_MADE = tempfile.TemporaryDirectory(prefix="densecal_examples_")  # gone when the example ends


def camvid() -> Path:
    """Street scenes in 11 classes and 11 for none: ``train/*.png`` and ``trainannot/*.png``, ``val`` and ``valannot``."""
    return _real("CamVid") or _made_scenes(Path(_MADE.name) / "CamVid")


def hippocampus() -> Path:
    """MRI volumes of 3 classes, smaller than 48 x 64 x 48: ``imagesTr/*.nii.gz`` and ``labelsTr/*.nii.gz``."""
    return _real("Task04_Hippocampus") or _made_volumes(Path(_MADE.name) / "Task04_Hippocampus", (36, 48, 36), classes=3, level=300.0, step=150.0)


def spleen() -> Path:
    """CT volumes of 2 classes in Hounsfield units: ``imagesTr/*.nii.gz`` and ``labelsTr/*.nii.gz``."""
    return _real("Task09_Spleen") or _made_volumes(Path(_MADE.name) / "Task09_Spleen", (56, 56, 40), classes=2, level=0.0, step=100.0)


def is_made(root: Path) -> bool:
    """Whether a folder is a made one, for smaller settings."""
    return root.is_relative_to(_MADE.name)


def _real(name: str) -> Path | None:
    folder = Path(os.environ.get("DENSECAL_DATA", "")) / name
    if "DENSECAL_DATA" in os.environ and folder.is_dir():
        return folder
    print(f"No {name} below $DENSECAL_DATA: running on made data.")
    return None


def _made_volumes(root: Path, shape: tuple[int, int, int], *, classes: int, level: float, step: float, number: int = 8) -> Path:
    """Ellipsoids in noise, one in another."""
    rng = np.random.default_rng(0)
    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    names = [f"case_{n:02}.nii.gz" for n in range(number)]
    for name in names:
        centre = [side * rng.uniform(0.4, 0.6) for side in shape]
        radii = [side * rng.uniform(0.25, 0.35) for side in shape]
        distance = sum(((axis - c) / r) ** 2 for axis, c, r in zip(np.indices(shape), centre, radii, strict=True)) ** 0.5
        label = sum((distance < 1.0 - 0.4 * inner).astype(np.uint8) for inner in range(classes - 1))
        image = level + step * label + rng.normal(0, 0.7 * step, shape)
        for folder, values in (("imagesTr", image.astype(np.float32)), ("labelsTr", label)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values, affine), root / folder / name)
    listing = [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names]
    (root / "dataset.json").write_text(json.dumps({"labels": {str(c): f"class {c}" for c in range(classes)}, "training": listing}))
    return root


def _made_scenes(root: Path, shape: tuple[int, int] = (90, 120), number: int = 8) -> Path:
    """Bands of sky, buildings and road with a car, in noisy colours, and a frame without a class."""
    rng = np.random.default_rng(0)
    colors = rng.integers(40, 216, (12, 3))
    for split in ("train", "val"):
        for n in range(number):
            label = np.full(shape, 1, np.uint8)
            label[: int(shape[0] * rng.uniform(0.2, 0.4))] = 0
            label[int(shape[0] * rng.uniform(0.55, 0.7)) :] = 3
            top, left = (int(side * rng.uniform(0.3, 0.6)) for side in shape)
            label[top : top + shape[0] // 4, left : left + shape[1] // 4] = 8
            label[:2] = label[-2:] = 11
            image = colors[label] + rng.normal(0, 30, (*shape, 3))
            for folder, values in ((split, image.clip(0, 255).astype(np.uint8)), (f"{split}annot", label)):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(root / folder / f"scene_{n:02}.png")
    return root
