"""Volumes as a medium; MONAI is imported when the first is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from densecal.data.card import DataCard
from densecal.data.medium import Loading, OpenedImage
from densecal.data.volumes.labels import read_classes, rewrite_classes
from densecal.data.volumes.nifti import plane_names, read_nifti, write_nifti
from densecal.ops.activation import most_probable

if TYPE_CHECKING:
    from densecal.data.layouts import Case
    from densecal.data.validate import CaseFacts

__all__ = ["VolumeMedium"]


class VolumeMedium:
    """NIfTI volumes; see :class:`densecal.data.medium.Medium`."""

    noun = "volume"
    element = "voxel"
    measured = True
    suffixes: tuple[str, ...] = (".nii.gz", ".nii")
    label_suffixes: tuple[str, ...] = suffixes
    outputs: tuple[str, ...] = ("label", "probs", "soft_label", "confidence")

    def inspector(self, card: DataCard) -> Callable[[Case], CaseFacts]:
        from densecal.data.volumes.check import inspect

        return lambda case: inspect(case, card)

    def loading(self, card: DataCard, *, train: bool) -> Loading:
        from densecal.data.volumes.transforms import VolumeLoading

        return VolumeLoading(card, train=train)

    def open(self, paths: Sequence[Path], card: DataCard) -> OpenedImage:
        from densecal.data.volumes.transforms import load_image, restore

        header = read_nifti(paths[0]).header
        image, transform = load_image(paths, card)
        return OpenedImage(
            image.as_tensor(),
            lambda probs: restore(probs, image, transform),
            tuple(float(z) for z in header.get_zooms()[:3]),
            plane_names(header.get_best_affine()),
            header,
        )

    def picture(self, paths: Sequence[Path], card: DataCard) -> NDArray[Any]:
        values = read_nifti(paths[0]).get_fdata(dtype=np.float32)
        return values.reshape(*values.shape[:3], -1)[..., 0]

    def read_label(self, path: Path, card: DataCard) -> tuple[NDArray[np.int64], tuple[float, ...]]:
        return read_classes(path)

    def rewrite_label(self, source: Path, target: Path, label_map: NDArray[np.int64], card: DataCard) -> Path:
        return rewrite_classes(source, target, label_map)

    def write(self, folder: Path, case_id: str, output: str, probs: Tensor, opened: OpenedImage, card: DataCard) -> list[Path]:
        path = folder / f"{case_id}_{output}.nii.gz"
        if output == "soft_label":
            return [write_nifti(path, probs.movedim(0, -1).numpy(), opened.header, unsigned_16_bits=True)]
        label, confidence = most_probable(probs, card.schema.activation, dim=0)
        values = {"label": label, "probs": probs.movedim(0, -1), "confidence": confidence}[output]
        if output != "probs" and card.schema.activation == "sigmoid":
            values = values[0] if len(values) == 1 else values.movedim(0, -1)
        kind = np.dtype(np.float32 if output != "label" else np.uint8 if card.schema.num_outcomes <= 256 else np.int16)
        return [write_nifti(path, values.numpy().astype(kind), opened.header)]
