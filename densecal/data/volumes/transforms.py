"""From files to network inputs, as MONAI dictionary transforms.

``prepare_transforms`` is what never changes about a case and may be cached; ``train_transforms`` draws a patch from its result and varies it;
``eval_transforms`` gives whole volumes. In between a label is stored compactly: class ``c`` as ``c + 1``, and 0 where there is none, so that whatever pads with zeros
pads with "no label". Soft labels are floats from end to end, with zeros in every class where there is no label.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Affine,
    CastToTyped,
    ClipIntensityPercentilesd,
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    Invertd,
    LoadImage,
    LoadImaged,
    MapTransform,
    NormalizeIntensityd,
    Orientationd,
    RandAdjustContrastd,
    RandBiasFieldd,
    RandFlipd,
    RandGaussianNoised,
    Randomizable,
    Spacingd,
    Transform,
)
from torch import Tensor

from densecal.checks import plain
from densecal.data.card import DataCard
from densecal.data.layouts import Case, Companion
from densecal.data.raters import check_fusion, draw, fuse

__all__ = ["VolumeLoading", "eval_transforms", "load_image", "prepare_transforms", "restore", "train_transforms"]

_FOREGROUND_VOXELS = 10_000
"""Foreground voxels remembered per case as patch centres, evenly over the structure, as nnU-Net does."""


class VolumeLoading:
    """Volumes for training and testing; see :class:`densecal.data.medium.Loading`.

    A label of several raters whose mean is not asked for is kept as ``(R, X, Y, Z)``; each patch has the labels of one.

    Raises:
        ValueError: If raters are to be fused by a package that is not installed.
    """

    def __init__(self, card: DataCard, *, train: bool) -> None:
        check_fusion(card.rater_fusion)
        self.card = card
        self.need_foreground = train and card.foreground_fraction is not None
        self._draws: dict[tuple[str, ...], Compose] = {}  # by the names of the companions

    def load(self, case: Case) -> dict[str, Tensor]:
        steps: list[Transform] = [prepare_transforms(self.card, companions=case.companions)]
        if self.need_foreground:
            steps.append(ForegroundVoxelsd(self.card))
        files = {companion.name: companion.files for companion in case.companions}
        label = case.raters if self.card.rater_files else str(case.label)
        data: dict[str, Any] = Compose(steps)({"image": [str(path) for path in case.image], "label": label, **files})
        spacing = torch.as_tensor(data["image"].pixdim, dtype=torch.float32)
        return {name: plain(data[name]).contiguous() for name in ("image", "label", "foreground", *files) if name in data} | {"spacing": spacing}

    def patch(self, item: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        names = _companions_in(item)
        if names not in self._draws:
            self._draws[names] = train_transforms(self.card, companions=names)
        self._draws[names].set_random_state(seed=seed)
        if not item["label"].is_floating_point():
            rater = draw(seed, len(item["label"]))
            item = {**item, "label": item["label"][rater : rater + 1]}
        return self._finished(item, self._draws[names])

    def whole(self, item: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._finished(item, DecodeLabeld(self.card, _companions_in(item)))

    def _finished(self, item: dict[str, Tensor], transform: Transform) -> dict[str, Tensor]:
        data: dict[str, Any] = transform({name: value for name, value in item.items() if name != "spacing"})
        return {name: plain(data[name]).contiguous() for name in ("image", "label", *_companions_in(item))} | {"spacing": item["spacing"]}


def _companions_in(item: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(name for name in item if name not in ("image", "label", "foreground", "spacing"))


def eval_transforms(card: DataCard, *, label: bool = True) -> Compose:
    """Whole volumes: load, normalise, and turn and resample where the card says so.

    Args:
        card: Preprocessing of the data set.
        label: Whether items have a label. Without, ``{"image": path}`` is enough.

    Returns:
        Transform from ``{"image": path or paths, "label": path}`` to ``image`` float32 ``(C, X, Y, Z)``, a MetaTensor that knows its affine and the steps taken, and
        ``label`` int64 ``(1, X, Y, Z)`` or soft float32 ``(K, X, Y, Z)``.
    """
    return Compose([prepare_transforms(card, label=label), *([DecodeLabeld(card)] if label else [])]).flatten()


def load_image(path: Path | str | Sequence[Path | str], card: DataCard) -> tuple[MetaTensor, Compose]:
    """An image file without a label, as the network takes it; several files are stacked as channels.

    Returns:
        The image, float32 ``(C, X, Y, Z)``, and the transform that made it, for :func:`restore`.
    """
    transform = eval_transforms(card, label=False)
    paths = [path] if isinstance(path, (str, Path)) else path
    return transform({"image": [str(p) for p in paths]})["image"], transform


def restore(probabilities: Tensor, image: MetaTensor, transform: Compose) -> Tensor:
    """Bring a prediction back to the grid of the file: undo resampling (linearly) and turning.

    Args:
        probabilities: Prediction on the grid of ``image``, ``(K, X, Y, Z)``.
        image: Output of ``transform``.
        transform: The transform of :func:`eval_transforms` that made ``image``.

    Returns:
        Probabilities ``(K, X0, Y0, Z0)`` on the grid of the file, whose affine is ``image.meta["original_affine"]``.
    """
    if not any(isinstance(step, (Orientationd, Spacingd)) for step in transform.flatten().transforms):
        return plain(probabilities)
    prediction = MetaTensor(plain(probabilities).float(), meta=dict(image.meta))
    invert = Invertd(keys="prediction", transform=transform, orig_keys="image", nearest_interp=False, to_tensor=True)
    return plain(invert({"prediction": prediction, "image": image})["prediction"])


def prepare_transforms(card: DataCard, *, label: bool = True, companions: Sequence[Companion] = ()) -> Compose:
    """The part without randomness: ``image`` float32 ``(C, X, Y, Z)``, ``label`` uint8 ``(1, X, Y, Z)`` holding class + 1, or soft float32 ``(K, X, Y, Z)``.

    Companions of the label become like it: label maps uint8 ``(R, X, Y, Z)``, shares float16 ``(K, X, Y, Z)``. Several raters become the label as the card says, before
    anything is resampled; those to draw from stay apart, ``(R, X, Y, Z)``.
    """
    shares = {"label": card.soft, **{companion.name: companion.shares for companion in companions}} if label else {}
    keys = ["image", *shares]
    modes = ["bilinear", *("bilinear" if of_shares else "nearest" for of_shares in shares.values())]
    stacks = [companion.name for companion in companions if not companion.shares] + (["label"] if label and card.rater_files else [])
    single = [key for key in keys if key not in stacks]
    steps: list[Transform] = [
        LoadImaged(single, reader="NibabelReader", dtype=np.float32),
        EnsureChannelFirstd(single),
        *([LoadLabelMapsd(stacks, card.ignore_index)] if stacks else []),
        EnsureTyped(keys, dtype=torch.float32),
    ]
    if card.normalisation == "percentile":
        steps.append(ClipIntensityPercentilesd("image", lower=0.5, upper=99.5, channel_wise=True))
    if card.normalisation != "none":
        steps.append(NormalizeIntensityd("image", nonzero=card.normalisation == "zscore_nonzero", channel_wise=True))
    if label:
        steps.append(SameGridd([*shares]))
    if label and card.rater_files:
        steps.append(FuseRatersd(card))
    if card.orientation is not None:
        steps.append(Orientationd(keys, axcodes=card.orientation, labels=(("L", "R"), ("P", "A"), ("I", "S"))))
    if card.spacing is not None:
        steps.append(Spacingd(keys, pixdim=card.spacing, mode=modes, padding_mode="border"))
    if label:
        steps.append(EncodeLabeld(card))
    for companion in companions:
        steps.append(CastToTyped(companion.name, dtype=torch.float16) if companion.shares else EncodeLabeld(card, companion.name))
    return Compose(steps)


def train_transforms(card: DataCard, *, companions: Sequence[str] = ()) -> Compose:
    """One training patch from the result of ``prepare_transforms``.

    Intensities are varied before the patch is padded, so padding is always 0 in the image and "no label" in the label.

    Args:
        card: Says what is drawn.
        companions: Names of the companions that items hold.

    Returns:
        Transform to ``image`` float32 ``(C, *patch_size)`` and ``label`` int64 ``(1, *patch_size)`` or soft float32 ``(K, *patch_size)``. Its draws follow from
        ``set_random_state(seed)`` alone.
    """
    a = card.augmentation
    keys = ["image", "label", *companions]
    steps: list[Transform] = [RandCropd(card, keys)]
    if card.augment:
        if a.bias_probability and a.bias:
            steps.append(RandBiasFieldd("image", prob=a.bias_probability, degree=3, coeff_range=(-a.bias, a.bias)))
        if a.contrast_probability:
            steps.append(RandAdjustContrastd("image", prob=a.contrast_probability, gamma=(a.contrast[0], a.contrast[1]), retain_stats=True))
        if a.noise_probability and a.noise:
            steps.append(RandGaussianNoised("image", prob=a.noise_probability, std=a.noise, sample_std=True))
    steps.append(RandFitd(card, keys))
    if card.augment:
        steps += [RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in a.flip_axes]
    return Compose([*steps, DecodeLabeld(card, companions)])


class LoadLabelMapsd(MapTransform):
    """Files of several label maps -> ``(R, X, Y, Z)``, floats; where one is ``None``, all of it is ``ignore_index``."""

    def __init__(self, keys: Sequence[str], ignore_index: int) -> None:
        super().__init__(keys)
        self.ignore_index = ignore_index
        self.load = LoadImage(reader="NibabelReader", dtype=np.float32, ensure_channel_first=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.keys:
            loaded = [None if path is None else self.load(str(path)) for path in item[key]]
            first = next(one for one in loaded if one is not None)
            nothing = torch.full(first.shape, float(self.ignore_index))
            item[key] = MetaTensor(torch.cat([nothing if one is None else plain(one) for one in loaded]), meta=first.meta)
        return item


class FuseRatersd(MapTransform):
    """Label maps of several raters ``(R, X, Y, Z)`` -> the label that the card makes of them, label maps or shares ``(K, X, Y, Z)``."""

    def __init__(self, card: DataCard) -> None:
        super().__init__("label")
        self.classes, self.fusion, self.ignore_index = len(card.classes), card.rater_fusion, card.ignore_index

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        raters = item["label"]
        fused = fuse(plain(raters).round().long(), self.classes, self.fusion, ignore_index=self.ignore_index)
        item["label"] = MetaTensor(fused.float(), meta=raters.meta)
        return item


class SameGridd(MapTransform):
    """Give what is on the image's grid its affine, so that all are resampled alike; validation allows a tenth of a voxel between them."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.keys:
            if item[key].shape[1:] != item["image"].shape[1:]:
                raise ValueError(f"{key} has the shape {tuple(item[key].shape[1:])}, but the image has {tuple(item['image'].shape[1:])}")
            item[key].affine = item["image"].affine
        return item


class EncodeLabeld(MapTransform):
    """Label values as stored -> class + 1, 0 for none, as uint8 (int16 for 255 classes and more). Soft labels stay floats."""

    def __init__(self, card: DataCard, key: str = "label") -> None:
        super().__init__(key)
        self.classes, self.ignore_index, self.soft = len(card.classes), card.ignore_index, card.soft and key == "label"

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.keys:
            item[key] = self._encoded(plain(item[key]), key)
        return item

    def _encoded(self, label: Tensor, key: Hashable) -> Tensor:
        if self.soft:
            if label.shape[0] != self.classes:
                raise ValueError(f"the soft {key} has {label.shape[0]} channels, but the card has {self.classes} classes")
            return label
        label = label.round()
        ignored = label == self.ignore_index
        if bool((~ignored & ((label < 0) | (label >= self.classes))).any()):
            raise ValueError(f"{key} has values outside the card's classes 0 to {self.classes - 1}")
        return torch.where(ignored, 0, label + 1).to(torch.uint8 if self.classes < 255 else torch.int16)


class DecodeLabeld(MapTransform):
    """Class + 1 -> class, 0 -> ``ignore_index``, int64. Soft labels are divided by their sum, which interpolation at the border has lowered, or set to 0 below 1/2."""

    def __init__(self, card: DataCard, companions: Sequence[str] = ()) -> None:
        super().__init__(["label", *companions])
        self.ignore_index = card.ignore_index

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.keys:
            label = plain(item[key])
            if not label.is_floating_point():
                code = label.long()
                item[key] = torch.where(code == 0, self.ignore_index, code - 1)
            elif key == "label":
                total = label.sum(dim=0, keepdim=True)
                item[key] = torch.where(total > 0.5, label / total.clamp(min=0.5), 0.0)
            else:
                item[key] = label.float()
        return item


class ForegroundVoxelsd(MapTransform):
    """Add ``foreground``, int32 ``(V, 3)``: voxels whose (most likely) class is part of the structure, by any of the raters to draw from, at most 10,000 of them,
    evenly spaced in memory order."""

    def __init__(self, card: DataCard) -> None:
        super().__init__("label")
        self.codes, self.soft = torch.tensor(card.structure) + 1, card.soft

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        label = plain(item["label"])
        code = torch.where(label.sum(0) > 0.5, label.argmax(0) + 1, 0).unsqueeze(0) if self.soft else label
        mask = torch.isin(code.long(), self.codes).any(0)
        flat = torch.nonzero(mask.flatten())[:, 0]
        if len(flat) > _FOREGROUND_VOXELS:
            flat = flat[torch.linspace(0, len(flat) - 1, _FOREGROUND_VOXELS, dtype=torch.float64).long()]
        item["foreground"] = torch.stack(torch.unravel_index(flat, mask.shape), dim=1).int()
        return item


class RandCropd(MapTransform, Randomizable):
    """Cut out the neighbourhood of a patch, as far as the volume reaches, with the margin that rotating it may need.

    Adds ``pad``: what is missing before and after along each axis. Where the volume is larger than the patch the patch lies inside it, else it is centred.
    """

    def __init__(self, card: DataCard, keys: Sequence[str] = ("image", "label")) -> None:
        super().__init__(keys)
        self.patch, self.fraction = tuple(card.patch_size), card.foreground_fraction
        self.margin = _margin(card)
        self.start: tuple[int, ...] = (0, 0, 0)

    def randomize(self, data: Mapping[Hashable, Any]) -> None:
        shape = data["image"].shape[1:]
        centre = tuple(n // 2 for n in shape)
        if self.fraction is not None:
            foreground = data["foreground"]
            near, voxel = self.R.random_sample() < self.fraction, self.R.random_sample()
            anywhere = tuple(int(self.R.randint(n)) for n in shape)
            centre = tuple(foreground[int(voxel * len(foreground))].tolist()) if near and len(foreground) else anywhere
        self.start = tuple(
            min(max(c - p // 2, 0), n - p) if n >= p and self.fraction is not None else (n - p) // 2
            for c, p, n in zip(centre, self.patch, shape, strict=True)
        )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        self.randomize(item)
        shape = item["image"].shape[1:]
        low = [s - m for s, m in zip(self.start, self.margin, strict=True)]
        high = [s + p + m for s, p, m in zip(self.start, self.patch, self.margin, strict=True)]
        window = tuple(slice(max(a, 0), min(b, n)) for a, b, n in zip(low, high, shape, strict=True))
        for key in self.keys:
            item[key] = item[key][(slice(None), *window)]
        item["pad"] = [(max(-a, 0), max(b - n, 0)) for a, b, n in zip(low, high, shape, strict=True)]
        return item


class RandFitd(MapTransform, Randomizable):
    """Pad what :class:`RandCropd` cut out and bring it to the patch size, sometimes rotated and scaled about its centre (in voxels).

    Label maps take the nearest value. Image and label are padded with zeros; shares of a companion go on as at the border, so that none is lowered by what is beyond it.
    """

    def __init__(self, card: DataCard, keys: Sequence[str] = ("image", "label")) -> None:
        super().__init__(keys)
        self.patch, self.margin = tuple(card.patch_size), _margin(card)
        self.probability = card.augmentation.affine_probability if card.augment else 0.0
        self.angle, self.scale = math.radians(card.augmentation.rotate), card.augmentation.scale
        self.affine: tuple[list[float], list[float]] | None = None

    def randomize(self, data: Any = None) -> None:
        self.affine = None
        if self.R.random_sample() < self.probability:
            self.affine = (self.R.uniform(-self.angle, self.angle, 3).tolist(), (1 + self.R.uniform(-self.scale, self.scale, 3)).tolist())

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        self.randomize()
        pad = [n for before_after in reversed(item.pop("pad")) for n in before_after]  # torch counts axes from the last
        centre = tuple(slice(m, m + p) for m, p in zip(self.margin, self.patch, strict=True))
        for key in self.keys:
            values = plain(item[key])
            nearest = not values.is_floating_point()
            beyond = "constant" if nearest or key in ("image", "label") else "replicate"
            padded = torch.nn.functional.pad(values if nearest else values.float(), pad, mode=beyond)
            if self.affine is None:
                item[key] = padded[(slice(None), *centre)]
            else:
                rotate, scale = self.affine
                turn = Affine(rotate_params=rotate, scale_params=scale, spatial_size=self.patch, padding_mode="zeros", image_only=True)
                turned = plain(turn(padded.float(), mode="nearest" if nearest else "bilinear"))  # type: ignore[arg-type]
                item[key] = turned.round().to(values.dtype) if nearest else turned
        return item


def _margin(card: DataCard) -> tuple[int, ...]:
    """Voxels beyond the patch on each side that the strongest rotation and scaling may reach."""
    a = card.augmentation
    if not card.augment or not a.affine_probability:
        return (0,) * card.spatial_dims
    half = np.array(card.patch_size) / 2
    reach = half.copy()
    for angles in itertools.product((-1, 0, 1), repeat=3):
        x, y, z = (np.deg2rad(a.rotate) * s for s in angles)
        about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
        about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
        about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
        reach = np.maximum(reach, np.abs(about_x @ about_y @ about_z) @ half)
    return tuple(int(n) for n in np.ceil(reach * (1 + a.scale) - half))
