"""Images as a medium; OpenCV and albumentations are imported when the first is loaded."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densecal.data.card import DataCard
from densecal.data.medium import Loading, OpenedImage
from densecal.files import name_in_file, write_atomically
from densecal.labels import LabelSchema
from densecal.ops.activation import most_probable
from densecal.pictures import label_overlay

if TYPE_CHECKING:
    from densecal.data.layouts import Case
    from densecal.data.validate import CaseFacts

__all__ = ["ImageMedium"]

Palette: TypeAlias = Sequence[Sequence[int]]


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

    def write(self, folder: Path, case_id: str, output: str, probs: Tensor, opened: OpenedImage, card: DataCard) -> list[Path]:
        if output == "probs":
            return [write_atomically(folder / f"{case_id}_probs.npz", _npz(np.savez, probs=probs.numpy().astype(np.float32)))]
        if output == "soft_label":
            values = np.rint(65535 * probs.double().numpy()).astype(np.uint16)
            return [write_atomically(folder / f"{case_id}_soft_label.npz", _npz(np.savez_compressed, probs=values))]
        label, confidence = (values.numpy() for values in most_probable(probs.float(), card.schema.activation, dim=0))
        if output == "overlay":
            return [write_atomically(folder / f"{case_id}_overlay.png", _encoded(label_overlay(opened.header, label, card.schema), "PNG"))]
        files = []
        for part, classes, sure, palette in _maps(label, confidence, card.schema):
            if output == "label":
                ending, content = f"label{part}.png", _palette_png(classes, palette)
            elif output == "confidence":
                ending, content = f"confidence{part}.tif", _encoded(sure, "TIFF")
            else:
                ending, content = f"confidence{part}.png", _encoded(np.rint(255 * sure).astype(np.uint8), "PNG")
            files.append(write_atomically(folder / f"{case_id}_{ending}", content))
        return files


def _maps(label: NDArray[Any], confidence: NDArray[Any], schema: LabelSchema) -> Iterator[tuple[str, NDArray[Any], NDArray[Any], Palette]]:
    """What an image file can hold, one map: an addition to its name, the label, how sure it is, and its colours."""
    if schema.activation == "softmax":
        yield "", label, confidence, schema.palette
        return
    for name, region, sure, color in zip(schema.names, label, confidence, schema.palette, strict=True):
        yield f"_{name_in_file(name)}" if len(label) > 1 else "", region, sure, ((0, 0, 0), color)


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


def _palette_png(label: NDArray[Any], palette: Palette) -> bytes:
    """Class numbers as palette indices in the colours of the classes; without a palette, 16 bits, for more classes than a palette holds."""
    from PIL import Image

    if len(palette) > 256:
        return _encoded(label.astype(np.uint16), "PNG")
    image = Image.fromarray(label.astype(np.uint8), mode="P")
    image.putpalette([value for color in palette for value in color])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
