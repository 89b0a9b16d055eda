"""Read a NIfTI file whole, so that a damaged one is noticed."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib

__all__ = ["read_nifti"]


def read_nifti(path: Path) -> Any:
    """The image in a ``.nii`` or ``.nii.gz`` file, as a nibabel image in memory.

    ``nibabel.load`` stops reading at the last voxel, before the checksum at the end of a ``.gz`` file; here the file is unpacked to its end.

    Raises:
        Exception: Whatever gzip or nibabel raises for a file that is missing, cut short, damaged or of another kind.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    header_size = (int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big"))
    kind = nib.Nifti2Image if 540 in header_size else nib.Nifti1Image
    return kind.from_bytes(content)
