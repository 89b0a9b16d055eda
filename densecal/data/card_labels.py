"""The labels of a data set that has a card, as references for saved predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from densecal.data.arrays import ArrayFile, open_array
from densecal.data.card import DataCard
from densecal.data.layouts import Case
from densecal.data.medium import medium_of
from densecal.data.raters import mean_of_raters
from densecal.labels import LabelSchema
from densecal.ops.region_maps import region_maps

if TYPE_CHECKING:
    from densecal.data.images.labels import LabelReader

__all__ = ["CardLabels"]


class CardLabels:
    """Label files that are read as a card says: by its numbers, colours or shares; of several raters their mean.

    Args:
        card: The data set.
        cases: Those of its cases that count.
        root: Folder of the set, for messages.

    Attributes:
        files: Case id -> label file, of several raters the first one's.
    """

    def __init__(self, card: DataCard, cases: Sequence[Case], root: Path) -> None:
        self.card = card.as_reference()
        self.root = root
        self.files = {case.id: case.label for case in cases if case.label is not None}
        self._cases = {case.label: case for case in cases}
        self._images = {case.id: case.image for case in cases}
        self._medium = medium_of(card)
        self._reader: LabelReader | None = None

    def open(self, path: Path) -> ArrayFile:
        """A label file as an array: classes ``(*spatial)``, or shares of the classes or regions, where ``ignore_index`` marks pixels without a class.

        Raises:
            Exception: If it cannot be read, or holds something else than the card says.
        """
        if self.card.spatial_dims == 3:
            file = self._mean(path) if self.card.rater_files else open_array(path)
            return _of_regions(file, self.card) if self.card.soft and self.card.regions else file
        from densecal.data.images.labels import LabelReader

        self._reader = self._reader or LabelReader(self.card)
        label = self._reader.of_case(self._cases[path])
        if self.card.soft:
            shares = np.ascontiguousarray(np.moveaxis(label[..., :-1], -1, 0))  # without the share of "no class"
            shares = region_maps(torch.from_numpy(shares)[None], self.card.schema)[0].numpy()
            return _Decoded(path, "npy", shares.shape, shares.dtype.name, values=shares)
        classes = np.where(label == 0, self.card.ignore_index, label.astype(np.int64) - 1)
        return _Decoded(path, "image", classes.shape, classes.dtype.name, values=classes)

    def _mean(self, path: Path) -> ArrayFile:
        """The mean of the raters of a volume, on the grid of the first one's file."""
        first, *others = (open_array(file) for file in self._cases[path].raters)
        if different := next((other for other in others if other.shape != first.shape), None):
            raise ValueError(f"{different.path} has the shape {different.shape}, but {first.path.name} has {first.shape}")
        labels = np.stack([np.rint(one.read()).astype(np.int64).reshape(first.shape[:3]) for one in (first, *others)])
        mean = mean_of_raters(torch.from_numpy(labels), len(self.card.classes), ignore_index=self.card.ignore_index)
        shares = np.ascontiguousarray(mean.movedim(0, -1).numpy())
        return _Decoded(first.path, "nifti", shares.shape, shares.dtype.name, affine=first.affine, spacing=first.spacing, values=shares)

    def picture(self, case_id: str) -> NDArray[Any]:
        """The image of a case, to be shown."""
        return self._medium.picture(self._images[case_id], self.card)


@dataclass(frozen=True)
class _Decoded(ArrayFile):
    values: NDArray[Any] | None = None

    def read(self) -> NDArray[Any]:
        assert self.values is not None
        return np.array(self.values)


@dataclass(frozen=True)
class _Regions(ArrayFile):
    """Shares of the classes ``(X, Y, Z, K)``, read as those of regions ``(X, Y, Z, R)``."""

    source: ArrayFile | None = None
    schema: LabelSchema | None = None

    def read(self) -> NDArray[Any]:
        assert self.source is not None
        assert self.schema is not None
        shares = torch.from_numpy(np.array(self.source.read(), dtype=np.float32)).movedim(-1, 0)
        return region_maps(shares[None], self.schema)[0].movedim(0, -1).numpy()


def _of_regions(file: ArrayFile, card: DataCard) -> ArrayFile:
    if len(file.shape) != 4 or file.shape[3] != len(card.classes):
        return file  # which then does not fit
    schema = card.schema
    return _Regions(
        file.path, file.format, (*file.shape[:3], schema.num_classes), "float32", affine=file.affine, spacing=file.spacing, source=file, schema=schema
    )
