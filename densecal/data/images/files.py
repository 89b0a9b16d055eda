"""Picture files: images read by OpenCV, labels by Pillow, which keeps the numbers of a palette apart from its colours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

__all__ = ["StoredLabel", "decode_fully", "read_image", "read_label", "read_shares"]


@dataclass(frozen=True)
class StoredLabel:
    """The content of a label file.

    Args:
        values: Numbers ``(H, W)``, boolean in files of one bit; or colours ``(H, W, 3)``, uint8; or shares per class ``(H, W, K)``, floating.
        palette: Colour of each number ``(256, 3)``, uint8, where the file has a palette.
    """

    values: NDArray[Any]
    palette: NDArray[np.uint8] | None = None


def read_image(path: Path, channels: int, exif: str = "apply") -> NDArray[Any]:
    """An image as ``(H, W, channels)``: uint8 for files of 8 bits, else float32, whole numbers scaled to [0, 1].

    OpenCV fills up what is missing of a damaged JPEG file; :func:`decode_fully` notices.

    Args:
        path: The file.
        channels: 3 for red, green and blue, or 1 for grey.
        exif: ``"apply"`` turns the image as the camera noted, ``"ignore"`` does not.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is no image.
    """
    flags = cv2.IMREAD_ANYDEPTH | (cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE)
    if exif == "ignore":
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
    content = np.frombuffer(path.read_bytes(), np.uint8)
    image = cv2.imdecode(content, flags) if content.size else None
    if image is None:
        raise ValueError("not an image that OpenCV can read")
    image = image if channels == 3 else image[..., None]
    if image.dtype == np.uint8:
        return image
    return image.astype(np.float32) / (65535 if image.dtype == np.uint16 else 1)


def decode_fully(path: Path) -> None:
    """Read a picture to its end, if it is of a kind that Pillow knows.

    Raises:
        OSError: If it is missing, cut short or damaged.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except UnidentifiedImageError:
        return


def read_label(path: Path) -> StoredLabel:
    """The numbers, colours or shares in a label file: a picture, ``.npy``, ``.npz`` with one array, or ``.mat`` of the Semantic Boundaries Dataset.

    Raises:
        Exception: Whatever is raised for a file that is missing, damaged or of another kind.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return StoredLabel(np.load(path, allow_pickle=False))
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            if len(arrays.files) != 1:
                raise ValueError(f"expected one array, but it has {', '.join(arrays.files) or 'none'}")
            return StoredLabel(arrays[arrays.files[0]])
    if suffix == ".mat":
        return StoredLabel(_read_sbd(path))
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        raise ValueError("not a picture") from None
    with image:
        if image.mode == "P":
            colors = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
            palette = np.zeros((256, 3), np.uint8)
            palette[: len(colors)] = colors
            return StoredLabel(np.asarray(image), palette)
        without_alpha = {"RGBA": "RGB", "PA": "RGB", "LA": "L"}.get(image.mode)
        return StoredLabel(np.asarray(image.convert(without_alpha) if without_alpha else image))


def read_shares(path: Path) -> NDArray[np.float32]:
    """Shares ``(K, H, W)`` in [0, 1] from ``.npy`` or ``.npz``, as predictions are saved: floats, or whole numbers of which the largest of their kind means 1.

    Raises:
        Exception: Whatever is raised for a file that is missing, damaged or of another kind.
    """
    values = read_label(path).values
    if values.ndim != 3:
        raise ValueError(f"expected shares (K, H, W), but got shape {values.shape}")
    scale = 1 if values.dtype.kind == "f" else np.iinfo(values.dtype).max
    return values.astype(np.float32) / np.float32(scale)


def _read_sbd(path: Path) -> NDArray[Any]:
    from scipy.io import loadmat

    content = loadmat(path, squeeze_me=True, struct_as_record=False)
    if "GTcls" not in content:
        raise ValueError("expected the variable GTcls of the Semantic Boundaries Dataset")
    return np.asarray(content["GTcls"].Segmentation)
