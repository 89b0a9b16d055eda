"""Images as a medium; OpenCV and albumentations are imported when the first is loaded."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densecal.data.card import DataCard
from densecal.data.medium import Loading, OpenedImage
from densecal.files import write_atomically
from densecal.pictures import label_overlay

if TYPE_CHECKING:
    from densecal.data.layouts import Case
    from densecal.data.validate import CaseFacts

__all__ = ["ImageMedium"]


class ImageMedium:
    """Pictures; see :class:`densecal.data.medium.Medium`."""

    noun = "image"
    element = "pixel"
    measured = False
    suffixes: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".nii.gz", ".nii")
    label_suffixes: tuple[str, ...] = (".png", ".tif", ".tiff", ".bmp", ".gif", ".npy", ".npz", ".mat", ".nii.gz", ".nii")
    outputs: tuple[str, ...] = ("label", "probs", "soft_label", "confidence", "confidence_png", "overlay")

    def inspector(self, card: DataCard) -> Callable[[Case], CaseFacts]:
        from densecal.data.images.check import inspect
        from densecal.data.images.labels import LabelReader

        reader = LabelReader(card)  # its tables take longer to make than many a label to read
        return lambda case: inspect(case, card, reader)

    def loading(self, card: DataCard, *, train: bool) -> Loading:
        from densecal.data.images.transforms import ImageLoading

        return ImageLoading(card, train=train)

    def open(self, paths: Sequence[Path], card: DataCard) -> OpenedImage:
        from densecal.data.images.files import decode_fully, read_image
        from densecal.data.images.transforms import Normalisation

        if len(paths) != 1:
            raise ValueError(f"expected one file per image, but got {len(paths)}")
        decode_fully(paths[0])
        image = read_image(paths[0], card.image_channels, card.exif)
        normalise = Normalisation(card.normalisation)
        network_input = normalise(torch.from_numpy(image), torch.from_numpy(normalise.statistics(image)))
        return OpenedImage(network_input, lambda probs: probs, header=_shown(image))

    def picture(self, paths: Sequence[Path], card: DataCard) -> NDArray[Any]:
        from densecal.data.images.files import read_image

        return _shown(read_image(paths[0], card.image_channels, card.exif))

    def read_label(self, path: Path, card: DataCard) -> tuple[NDArray[np.int64], tuple[float, ...]]:
        from densecal.data.images.rewrite import read_classes

        return read_classes(path, card), ()

    def rewrite_label(self, source: Path, target: Path, label_map: NDArray[np.int64], card: DataCard) -> Path:
        from densecal.data.images.rewrite import rewrite_classes

        return rewrite_classes(source, target, label_map, card)

    def write(self, folder: Path, case_id: str, output: str, probs: Tensor, opened: OpenedImage, card: DataCard) -> Path:
        if output == "probs":
            return write_atomically(folder / f"{case_id}_probs.npz", _npz(np.savez, probs=probs.numpy().astype(np.float32)))
        if output == "soft_label":
            return write_atomically(
                folder / f"{case_id}_soft_label.npz", _npz(np.savez_compressed, probs=np.rint(65535 * probs.double().numpy()).astype(np.uint16))
            )
        label, confidence = probs.argmax(dim=0).numpy(), probs.amax(dim=0).numpy().astype(np.float32)
        if output == "label":
            return write_atomically(folder / f"{case_id}_label.png", _palette_png(label, card))
        if output == "confidence":
            return write_atomically(folder / f"{case_id}_confidence.tif", _encoded(confidence, "TIFF"))
        if output == "confidence_png":
            return write_atomically(folder / f"{case_id}_confidence.png", _encoded(np.rint(255 * confidence).astype(np.uint8), "PNG"))
        return write_atomically(folder / f"{case_id}_overlay.png", _encoded(label_overlay(opened.header, label, card.schema), "PNG"))


def _shown(image: NDArray[Any]) -> NDArray[Any]:
    """Colours as uint8, grey values without their channel axis."""
    if image.shape[2] == 1:
        return image[..., 0]
    return image if image.dtype == np.uint8 else np.rint(255 * image.clip(0, 1)).astype(np.uint8)


def _npz(save: Callable[..., None], **arrays: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def _encoded(values: NDArray[Any], kind: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format=kind)
    return buffer.getvalue()


def _palette_png(label: NDArray[Any], card: DataCard) -> bytes:
    """Class numbers as palette indices in the colours of the classes; without a palette, 16 bits, for more classes than a palette holds."""
    from PIL import Image

    if len(card.classes) > 256:
        return _encoded(label.astype(np.uint16), "PNG")
    image = Image.fromarray(label.astype(np.uint8), mode="P")
    image.putpalette([value for color in card.schema.palette for value in color])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
