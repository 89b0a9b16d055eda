"""One array in a file of any common format: a look at its header, then its values."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from densecal.data.volumes.nifti import read_nifti

__all__ = ["SUFFIXES", "ArrayFile", "file_stem", "one_line", "open_array"]

SUFFIXES = (".npz", ".npy", ".safetensors", ".nii.gz", ".nii", ".png", ".tif", ".tiff")
"""Endings of the files that :func:`open_array` reads, in any case."""

_MILLIMETRES = {"meter": 1e3, "micron": 1e-3}
_IMAGE_TYPES = {"1": "bool", "L": "uint8", "P": "uint8", "I;16": "uint16", "I;16L": "uint16", "I;16B": "uint16", "I": "int32", "F": "float32"}


@dataclass(frozen=True)
class ArrayFile:
    """What the header of a file says about the array in it.

    Args:
        path: The file.
        format: ``"npz"``, ``"npy"``, ``"safetensors"``, ``"nifti"`` or ``"image"`` (PNG or TIFF).
        shape: Shape as stored; ``(height, width)`` of an image, ``(pages, height, width)`` of a TIFF with several pages.
        dtype: Type of the values, as numpy or torch spells it. A NIfTI file with a scale factor holds ``"float32"``, whatever it stores.
        key: Name of the array in an ``.npz`` or ``.safetensors`` file.
        palette: Whether an image stores numbers of palette colours.
        affine: From voxels to millimetres, ``(4, 4)``, of a NIfTI file.
        spacing: Voxel size in mm per axis of a NIfTI file, at most three.
    """

    path: Path
    format: str
    shape: tuple[int, ...]
    dtype: str
    key: str = ""
    palette: bool = False
    affine: NDArray[np.float64] | None = None
    spacing: tuple[float, ...] | None = None

    @property
    def integer(self) -> bool:
        return self.dtype.startswith(("int", "uint", "bool"))

    def read(self) -> NDArray[Any]:
        """The values as stored, ``shape``; an ``.npy`` file is mapped into memory, a bfloat16 array comes as float32.

        Raises:
            Exception: Whatever the format's reader raises for a damaged file.
        """
        return _READERS[self.format](self)


def open_array(path: Path, keys: Sequence[str] = ()) -> ArrayFile:
    """Read the header of a file, not its values. Nothing is ever unpickled.

    Args:
        path: File with one of the :data:`SUFFIXES`.
        keys: Names to prefer, best first, where an ``.npz`` or ``.safetensors`` file holds several arrays.

    Raises:
        ValueError: If the file holds no array, several of which none is preferred, Python objects or a colour image.
        Exception: Whatever the format's reader raises for a damaged file.
    """
    name = path.name.lower()
    if name.endswith(".npz"):
        return _open_npz(path, keys)
    if name.endswith(".npy"):
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        return ArrayFile(path, "npy", values.shape, _dtype_name(values.dtype))
    if name.endswith(".safetensors"):
        return _open_safetensors(path, keys)
    if name.endswith((".nii", ".nii.gz")):
        return _open_nifti(path)
    return _open_image(path)


def file_stem(path: Path) -> str | None:
    """Name without its ending, or ``None`` if it is not one of the :data:`SUFFIXES`.

    Example:
        >>> file_stem(Path("s001.nii.gz")), file_stem(Path("s1.5.PNG")), file_stem(Path("s001.pkl"))
        ('s001', 's1.5', None)
    """
    ending = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)
    return None if ending is None else path.name[: -len(ending)]


def one_line(error: Exception) -> str:
    """What went wrong, for the middle of a sentence."""
    text = str(error).strip()
    text = text if type(error) is ValueError and text else f"{type(error).__name__}: {text or 'no detail'}"
    return text.splitlines()[0].rstrip(".")


def _open_npz(path: Path, keys: Sequence[str]) -> ArrayFile:
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        key = _pick(names, keys)
        with archive.open(f"{key}.npy") as file:
            version = np.lib.format.read_magic(file)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
            if header is None:
                raise ValueError(f"the array {key!r} has the unknown npy version {version}")
            shape, _, dtype = header(file)
    return ArrayFile(path, "npz", shape, _dtype_name(dtype), key)


def _open_safetensors(path: Path, keys: Sequence[str]) -> ArrayFile:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        key = _pick(list(file.keys()), keys)
        part = file.get_slice(key)
        code = part.get_dtype()
    kind = {"F": "float", "I": "int", "U": "uint"}.get(code[0], code.lower())
    dtype = "bfloat16" if code == "BF16" else "bool" if code == "BOOL" else f"{kind}{code[1:]}"
    return ArrayFile(path, "safetensors", tuple(part.get_shape()), dtype, key)


def _open_nifti(path: Path) -> ArrayFile:
    image: Any = nib.load(path)
    header = image.header
    scaled = (image.dataobj.slope, image.dataobj.inter) != (1, 0)
    dtype = "float32" if scaled else _dtype_name(header.get_data_dtype())
    millimetres = _MILLIMETRES.get(header.get_xyzt_units()[0], 1.0)
    if path.suffix.lower() == ".nii" and path.stat().st_size < header.get_data_offset() + np.prod(image.shape) * header.get_data_dtype().itemsize:
        raise ValueError("the file is shorter than its header says")
    spacing = tuple(float(size) * millimetres for size in header.get_zooms()[:3])
    return ArrayFile(path, "nifti", tuple(int(size) for size in image.shape), dtype, affine=image.affine, spacing=spacing)


def _open_image(path: Path) -> ArrayFile:
    from PIL import Image

    with Image.open(path) as image:
        dtype = _IMAGE_TYPES.get(image.mode)
        if dtype is None:
            raise ValueError(f"the image has colours (mode {image.mode}); expected grey values or, for labels, a palette")
        if image.mode == "I" and image.format == "PNG":  # how older versions of pillow read 16 bits
            dtype = "uint16"
        pages = getattr(image, "n_frames", 1)
        shape = (image.height, image.width) if pages == 1 else (pages, image.height, image.width)
        return ArrayFile(path, "image", shape, dtype, palette=image.mode == "P")


def _read_npz(file: ArrayFile) -> NDArray[Any]:
    with np.load(file.path, allow_pickle=False) as archive:
        return archive[file.key]


def _read_npy(file: ArrayFile) -> NDArray[Any]:
    return np.load(file.path, mmap_mode="r", allow_pickle=False)


def _read_safetensors(file: ArrayFile) -> NDArray[Any]:
    from safetensors import safe_open

    with safe_open(file.path, framework="pt") as content:
        values = content.get_tensor(file.key)
    return (values.float() if file.dtype == "bfloat16" else values).numpy()


def _read_nifti(file: ArrayFile) -> NDArray[Any]:
    image = read_nifti(file.path)
    return np.asanyarray(image.dataobj) if file.integer else image.get_fdata(dtype=np.float32, caching="unchanged")


def _read_image(file: ArrayFile) -> NDArray[Any]:
    from PIL import Image, ImageSequence

    with Image.open(file.path) as image:
        pages = [np.array(page) for page in ImageSequence.Iterator(image)]
    return pages[0] if len(file.shape) == 2 else np.stack(pages)


_READERS: dict[str, Callable[[ArrayFile], NDArray[Any]]] = {
    "npz": _read_npz,
    "npy": _read_npy,
    "safetensors": _read_safetensors,
    "nifti": _read_nifti,
    "image": _read_image,
}


def _pick(names: Sequence[str], keys: Sequence[str]) -> str:
    if preferred := [key for key in keys if key in names]:
        return preferred[0]
    if len(names) != 1:
        held = f"{len(names)} arrays, {', '.join(sorted(names)[:6])}" if names else "no array"
        wanted = f", or name it {' or '.join(keys)}" if names and keys else ""
        raise ValueError(f"expected one array in the file, but it holds {held}. Keep one{wanted}")
    return names[0]


def _dtype_name(dtype: np.dtype) -> str:
    if dtype.hasobject or dtype.kind not in "biuf":
        raise ValueError(f"expected real numbers, but the file holds {'Python objects, which are never unpickled' if dtype.hasobject else dtype}")
    return dtype.name
