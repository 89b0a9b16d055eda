"""NIfTI files: read whole, so that a damaged one is noticed, and placed in space."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from io import IOBase
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np

from densecal.files import write_file

__all__ = ["corner_shift", "plane_names", "read_nifti", "write_nifti"]

_PLANES = {"L": "sagittal", "R": "sagittal", "P": "coronal", "A": "coronal", "I": "axial", "S": "axial"}


def read_nifti(path: Path) -> Any:
    """The image in a ``.nii`` or ``.nii.gz`` file, as a nibabel image in memory.

    ``nibabel.load`` stops reading at the last voxel, before the checksum at the end of a ``.gz`` file; here the file is unpacked to its end.

    Raises:
        Exception: Whatever gzip or nibabel raises for a file that is missing, cut short, damaged or of another kind.
    """
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        content = gzip.decompress(content)
    header_size = (int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big"))
    kind = nib.Nifti2Image if 540 in header_size else nib.Nifti1Image
    return kind.from_bytes(content)


def corner_shift(shape: Sequence[int], affine: np.ndarray, other: np.ndarray) -> float:
    """How far apart two affines place a corner voxel of a volume of this shape, at most, in the affines' unit, along one axis."""
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape], [1], indexing="ij"), dtype=float).reshape(4, -1)
    return float(np.abs((affine - other) @ corners).max())


def plane_names(affine: np.ndarray) -> tuple[str, ...]:
    """Name of the plane across each voxel axis; none where the affine does not tell.

    Example:
        >>> plane_names(np.diag([-1.0, 1.0, 2.0, 1.0]))
        ('sagittal', 'coronal', 'axial')
    """
    codes = nib.aff2axcodes(affine)
    return () if None in codes else tuple(_PLANES[code] for code in codes)


def write_nifti(path: Path, values: np.ndarray, source: Any, *, unsigned_16_bits: bool = False) -> Path:
    """Write values on the grid that the header ``source`` describes, with its place in space and its units.

    ``unsigned_16_bits`` stores floats in [0, 1] as multiples of 1/65535, which any reader that heeds the header's scale gives back as floats.
    """
    if unsigned_16_bits:
        values = np.rint(65535 * values.astype(np.float64)).astype(np.uint16)
    image = nib.Nifti1Image(values, source.get_best_affine())  # a fresh header: intensity scaling and display range of the source do not apply
    if unsigned_16_bits:
        image.header.set_slope_inter(1 / 65535, 0)
    image.header.set_xyzt_units(*source.get_xyzt_units())
    image.set_qform(*source.get_qform(coded=True) if source["qform_code"] else (None, 0))
    if source["sform_code"]:
        image.set_sform(*source.get_sform(coded=True))
    else:
        image.set_sform(None, 0)
    return write_file(path, lambda file: _stream(image, file, zipped=path.name.lower().endswith(".gz")))


def _stream(image: nib.Nifti1Image, file: BinaryIO, *, zipped: bool) -> None:
    if not zipped:
        image.to_stream(cast("IOBase", file))
        return
    with gzip.GzipFile(fileobj=file, filename="", mode="wb", compresslevel=1, mtime=0) as archive:  # nibabel's level
        image.to_stream(archive)
