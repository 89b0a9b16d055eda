"""Volumes and images: the two kinds of files that data sets are made of, behind one interface.

Nothing outside this package asks which of the two a data set holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from densecal.data.card import DataCard

if TYPE_CHECKING:
    from densecal.data.layouts import Case
    from densecal.data.validate import CaseFacts

__all__ = ["Loading", "Medium", "OpenedImage", "medium_of"]


@dataclass(frozen=True)
class OpenedImage:
    """An image file as a network takes it, and the way back.

    Args:
        image: ``(C, *spatial)``, float32, normalised.
        restore: Brings probabilities ``(K, *spatial)`` on that grid back to the grid of the file.
        spacing: Distance between neighbours along each axis of the file, in mm; empty where it has none.
        axis_names: Name of the plane across each axis of the file; empty where they have none.
        header: What the medium itself wants to remember of the file when it writes a prediction.
    """

    image: Tensor
    restore: Callable[[Tensor], Tensor]
    spacing: tuple[float, ...] = ()
    axis_names: tuple[str, ...] = ()
    header: Any = None


class Loading(Protocol):
    """From the files of a case to what a network is trained and tested on."""

    def load(self, case: Case) -> dict[str, Tensor]:
        """What never changes about a case and may be kept in memory, compactly."""
        ...

    def patch(self, item: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """A training patch: ``image`` float32 ``(C, *patch_size)``, ``label`` of any integer type ``(1, *patch_size)`` or soft float32 ``(K, *patch_size)``, and the
        companions of the case like it. Its draws follow from ``seed`` alone."""
        ...

    def whole(self, item: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole case in the same form, and its ``spacing`` in mm where it has one."""
        ...


class Medium(Protocol):
    """What differs between volumes and images.

    Attributes:
        noun: What one file is called.
        element: What its elements are called.
        measured: Whether files tell the distance between elements, so that batches hold their ``spacing``.
        suffixes: Endings of image files, in lower case.
        label_suffixes: Endings of label files.
        outputs: What a prediction can be written as.
    """

    noun: str
    element: str
    measured: bool
    suffixes: tuple[str, ...]
    label_suffixes: tuple[str, ...]
    outputs: tuple[str, ...]

    def inspector(self, card: DataCard) -> Callable[[Case], CaseFacts]:
        """From a case to what its files hold, and what is wrong with them."""
        ...

    def loading(self, card: DataCard, *, train: bool) -> Loading:
        """How cases become patches (``train``) or are taken whole."""
        ...

    def open(self, paths: Sequence[Path], card: DataCard) -> OpenedImage:
        """An image without a label; several files are stacked as channels.

        Raises:
            Exception: Whatever is raised for a file that cannot be read.
        """
        ...

    def picture(self, paths: Sequence[Path], card: DataCard) -> NDArray[Any]:
        """An image to be shown: colours ``(rows, columns, 3)``, uint8, or grey values ``(*spatial)``."""
        ...

    def read_label(self, path: Path, card: DataCard) -> tuple[NDArray[np.int64], tuple[float, ...]]:
        """The classes in a label file, ``(*spatial)`` with ``ignore_index``, on the grid of the file, and the distance between neighbours in mm; empty where it has none.

        Raises:
            Exception: If it cannot be read, or holds something else than the card says.
        """
        ...

    def rewrite_label(self, source: Path, target: Path, label_map: NDArray[np.int64], card: DataCard) -> Path:
        """Write a copy of a label file in which other classes stand, and nothing else has changed.

        Raises:
            ValueError: If a file of this kind cannot be written, or not with these classes.
        """
        ...

    def write(self, folder: Path, case_id: str, output: str, probs: Tensor, opened: OpenedImage, card: DataCard) -> list[Path]:
        """Write a prediction as one of ``outputs``, whole or not at all, and return the file; a file for each region where the format holds one map."""
        ...


def medium_of(card: DataCard) -> Medium:
    """What a data set is made of: images where its patches have two axes, volumes where they have three."""
    if card.spatial_dims == 2:
        from densecal.data.images import ImageMedium

        return ImageMedium()
    from densecal.data.volumes import VolumeMedium

    return VolumeMedium()
