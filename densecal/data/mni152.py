"""The average of 152 brains that ships inside nilearn, with real soft labels: the data set that is always there."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

__all__ = ["GAP", "SLABS", "prepare"]

RESOLUTION = 2
"""Voxel size in mm."""

GAP = 16
"""Voxels along the front-back axis between the training slab and the others: one patch length of the card."""

BOX = ((13, 86), (13, 105), (0, 78))
"""First voxel of the brain and the one after its last, per axis, at 2 mm: where the template is above 1 % of its maximum, or not all rest."""

SLABS = {"mni152_front": (60, 105), "mni152_middle": (36, 44), "mni152_back": (13, 36)}
"""Voxels of each case along the front-back axis; larger is further to the front. Left and right are mirror images, so nothing is divided there."""


def prepare(root: Path) -> None:
    """Write the three slabs to ``root`` as paired folders ``images`` and ``labels``.

    Labels are ``(X, Y, Z, 3)`` float32: the shares of rest, grey matter and white matter, from nilearn's probability maps; rest is what the two leave.

    Args:
        root: Existing folder.
    """
    from nilearn import datasets

    brain = datasets.load_mni152_template(resolution=RESOLUTION)
    image = np.asarray(brain.dataobj, dtype=np.float32)
    shares = soft_labels(
        np.asarray(datasets.load_mni152_gm_template(resolution=RESOLUTION).dataobj),
        np.asarray(datasets.load_mni152_wm_template(resolution=RESOLUTION).dataobj),
    )
    (x0, x1), _, (z0, z1) = BOX
    for folder in ("images", "labels"):
        (root / folder).mkdir(exist_ok=True)
    for name, (y0, y1) in SLABS.items():
        affine = brain.affine @ nib.affines.from_matvec(np.eye(3), [x0, y0, z0])
        for folder, values in (("images", image), ("labels", shares)):
            nib.save(nib.Nifti1Image(values[x0:x1, y0:y1, z0:z1], affine), root / folder / f"{name}.nii.gz")


def soft_labels(grey: NDArray[np.floating], white: NDArray[np.floating]) -> NDArray[np.float32]:
    """Shares of (rest, grey, white) that sum to 1, ``(*spatial, 3)``."""
    grey, white = (np.clip(share.astype(np.float64), 0, 1) for share in (grey, white))
    shares = np.stack([np.clip(1 - grey - white, 0, 1), grey, white], axis=-1)
    return (shares / shares.sum(axis=-1, keepdims=True)).astype(np.float32)
