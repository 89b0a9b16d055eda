"""Saved probabilities written anew, each file in its own format, layout and type."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densecal.data.arrays import ArrayFile, file_stem, one_line, open_array
from densecal.data.predictions import AFFIXES, COMPANION, PROBABILITY_KEYS, best_files, is_nnunet, visible_files
from densecal.files import write_atomically
from densecal.ops.activation import Activation

__all__ = ["StoredPrediction", "find_predictions"]


def find_predictions(folder: Path, prediction_suffix: str | None = None) -> dict[str, Path]:
    """The file of each case of a folder of predictions, sorted by case; of a case's several files the one that is most sure to hold probabilities.

    Args:
        folder: The folder.
        prediction_suffix: As :class:`densecal.data.PredictionFolder` takes it.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no predictions, or two files that may be a case's.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder.")
    affixes = AFFIXES if prediction_suffix is None else (prediction_suffix,)
    found: dict[str, list[Path]] = defaultdict(list)
    stems = {path: stem for path in visible_files(folder) if (stem := file_stem(path))}
    for path, stem in stems.items():
        bare = next((stem.removesuffix(affix) for affix in affixes if affix and stem.endswith(affix) and stem != affix), stem)
        companion = COMPANION.fullmatch(stem)
        if (prediction_suffix and bare == stem) or (companion and f"{companion[1]}_probs" in stems.values()):
            continue
        found[bare].append(path)
    chosen = {case_id: files if len(files) == 1 else best_files(files) for case_id, files in sorted(found.items())}
    if not chosen:
        raise ValueError(f"{folder}: found no predictions. Expected .npz, .npy, .safetensors, .nii.gz, .nii, .png or .tif files, one per case.")
    for case_id, files in chosen.items():
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            raise ValueError(f"{files[0]}: case {case_id!r} is in more than one file ({names}). Keep one, or choose by `prediction_suffix`.")
    return {case_id: files[0] for case_id, files in chosen.items()}


@dataclass(frozen=True)
class StoredPrediction:
    """A file of probabilities, and where its class axis is.

    Args:
        file: What its header says.
        channel: Its class axis; None where it holds the probability of the foreground alone.
    """

    file: ArrayFile
    channel: int | None

    @classmethod
    def open(cls, path: Path, num_classes: int, activation: Activation, axes: str = "auto") -> StoredPrediction:
        """Look at the header.

        Args:
            path: The file.
            num_classes: Number of classes C, or of regions.
            activation: ``"softmax"`` or ``"sigmoid"``.
            axes: As :class:`densecal.data.PredictionFolder` takes it.

        Raises:
            ValueError: If it cannot be read, holds a hard label map, or not these classes; one line.
        """
        try:
            file = open_array(path, PROBABILITY_KEYS)
        except Exception as error:
            raise ValueError(f"{path}: cannot be read ({one_line(error)}). Save or copy it again.") from error
        shape, rank = file.shape, len(file.shape)
        alone = num_classes == (2 if activation == "softmax" else 1)
        if axes == "channels_first" or axes == "nnunet" or is_nnunet(file):
            places = [0]
        elif axes == "channels_last" or file.format == "nifti":
            places = [rank - 1] if rank > 3 or file.format != "nifti" else []
        elif file.format == "image":
            places = [0] if rank == 3 else []
        else:
            places = [0, *([1] if rank > 3 and shape[0] == 1 else []), rank - 1]
        fits = [axis for axis in places if shape[axis] == num_classes] or [axis for axis in places if shape[axis] == 1 and alone and rank > 2]
        fits = [axis for axis in fits if rank > 1]
        if len(set(fits)) > 1:
            raise ValueError(
                f"{path}: has the shape {shape}, of which two axes may be that of {num_classes} classes. Say axes=channels_first or channels_last."
            )
        if not fits and not alone:
            raise ValueError(
                f"{path}: has the shape {shape}, without an axis of {num_classes} classes. Set `axes`, or take the file out of the folder."
            )
        if file.format != "image" and file.integer:
            raise ValueError(f"{path}: is a hard label map, which tells no probabilities. Save the probabilities, or take it out of the folder.")
        if file.palette:
            raise ValueError(f"{path}: is a hard label map of palette colours, which tells no probabilities.")
        return cls(file, fits[0] if fits else None)

    @property
    def _scale(self) -> int:
        return int(np.iinfo(self.file.dtype).max) if self.file.format == "image" and self.file.integer else 1

    def read(self, num_classes: int, activation: Activation) -> Tensor:
        """The values ``(C, *rest)``, float32 (float64 of such a file), the other axes in the order of the file. A foreground's probability p becomes (1 - p, p) of two
        classes; where nnU-Net left 0 in every class is background.

        Raises:
            ValueError: If the file is damaged or holds NaN.
        """
        try:
            values = self.file.read()
        except Exception as error:
            raise ValueError(f"{self.file.path}: cannot be read to its end ({one_line(error)}). Save or copy it again.") from error
        values = values[None] if self.channel is None else np.moveaxis(values, self.channel, 0)
        result = torch.from_numpy(np.array(values, dtype=np.float64 if self.file.dtype == "float64" else np.float32, order="C")) / self._scale
        if not bool(torch.isfinite(result).all()):
            raise ValueError(f"{self.file.path}: holds NaN or infinite values. Look for them in the model's output.")
        if len(result) == 1 and num_classes == 2 and activation == "softmax":
            return torch.cat([1 - result, result])
        if activation == "softmax" and is_nnunet(self.file):
            result[0][result.sum(0) == 0] = 1
        return result

    def write(self, target: Path, probs: Tensor) -> Path:
        """Write other probabilities ``(C, *rest)`` as a file of the same kind, whole or not at all."""
        stored = 1 if self.channel is None else self.file.shape[self.channel]
        values = (probs[-1:] if stored == 1 else probs).numpy()
        values = values[0] if self.channel is None else np.moveaxis(values, 0, self.channel)
        if self._scale > 1:
            values = np.rint(values * self._scale)
        return write_atomically(target, _ENCODERS[self.file.format](self.file, values))


def _npz(file: ArrayFile, values: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(file.path) as source, zipfile.ZipFile(buffer, "w") as archive:
        for info in source.infolist():
            content = source.read(info)
            if info.filename == f"{file.key}.npy":
                content = _npy(file, values)
            archive.writestr(zipfile.ZipInfo(info.filename, info.date_time), content, compress_type=info.compress_type)
    return buffer.getvalue()


def _npy(file: ArrayFile, values: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(values, dtype=file.dtype), allow_pickle=False)
    return buffer.getvalue()


def _safetensors(file: ArrayFile, values: NDArray[Any]) -> bytes:
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(file.path, framework="pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 -- not a mapping
        metadata = content.metadata()
    tensors[file.key] = torch.from_numpy(np.ascontiguousarray(values)).to(tensors[file.key].dtype)
    return save(tensors, metadata)


def _nifti(file: ArrayFile, values: NDArray[Any]) -> bytes:
    source: Any = nib.load(file.path)
    slope, offset = source.dataobj.slope, source.dataobj.inter
    kind = source.header.get_data_dtype()
    if (slope, offset) != (1, 0):
        values = (values - offset) / slope
    values = np.rint(values) if kind.kind in "iu" else values
    header = source.header.copy()
    image = type(source)(np.asarray(values, dtype=kind.newbyteorder("=")), source.affine, header)
    image.header.set_data_dtype(kind)
    if (slope, offset) != (1, 0):
        image.header.set_slope_inter(slope, offset)
    content: bytes = image.to_bytes()
    return gzip.compress(content, compresslevel=1, mtime=0) if file.path.name.lower().endswith(".gz") else content


def _image(file: ArrayFile, values: NDArray[Any]) -> bytes:
    from PIL import Image

    pages = [Image.fromarray(np.ascontiguousarray(page, dtype=file.dtype)) for page in (values if len(file.shape) == 3 else values[None])]
    buffer = io.BytesIO()
    more = {"save_all": True, "append_images": pages[1:]} if len(pages) > 1 else {}
    pages[0].save(buffer, format="PNG" if file.path.suffix.lower() == ".png" else "TIFF", **more)
    return buffer.getvalue()


_ENCODERS: dict[str, Callable[[ArrayFile, NDArray[Any]], bytes]] = {
    "npz": _npz,
    "npy": _npy,
    "safetensors": _safetensors,
    "nifti": _nifti,
    "image": _image,
}
