"""Small volumes with boxes in noise, made on the fly."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def blob(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and a label with classes 0, 1 and 2, a box each."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    a, b, c = (n // 3 for n in shape)
    label[a : 2 * a, b : 2 * b, c : 2 * c] = 1
    label[2 * a :, 2 * b :, 2 * c :] = 2
    return (100 + 50 * label + rng.normal(0, 10, shape)).astype(np.float32), label


def save(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path
