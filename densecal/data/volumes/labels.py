"""Label maps of volumes: read as classes, and written back into a file that differs in nothing else."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from densecal.data.volumes.nifti import read_nifti
from densecal.files import write_atomically

__all__ = ["read_classes", "rewrite_classes"]


def read_classes(path: Path) -> tuple[NDArray[np.int64], tuple[float, ...]]:
    """Classes ``(X, Y, Z)``, and the voxel size in mm."""
    image = read_nifti(path)
    spacing = tuple(float(z) for z in image.header.get_zooms()[:3])
    return np.rint(image.get_fdata(dtype=np.float32)).astype(np.int64).reshape(image.shape[:3]), spacing


def rewrite_classes(source: Path, target: Path, label_map: NDArray[np.int64]) -> Path:
    """Write the header of ``source`` with other classes; a file that stored them scaled stores them as they are."""
    image = read_nifti(source)
    stored = image.header.get_data_dtype()
    scaled = image.dataobj.slope not in (None, 1.0) or image.dataobj.inter not in (None, 0.0)
    fits = stored.kind == "f" or (not scaled and np.iinfo(stored).min <= label_map.min() and label_map.max() <= np.iinfo(stored).max)
    kind = stored if fits else np.dtype(np.int16)
    copy = type(image)(label_map.reshape(image.shape).astype(kind), None, image.header)  # no affine: the header's codes stay as they are
    copy.set_data_dtype(kind)
    copy.header.set_slope_inter(1, 0)
    content = copy.to_bytes()
    return write_atomically(target, gzip.compress(content, mtime=0) if target.name.lower().endswith(".gz") else content)
