"""From image files to network inputs; augmentation is albumentations' in the order that the card gives."""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densecal.data.card import DataCard
from densecal.data.images.files import read_image, read_label, read_shares
from densecal.data.images.labels import LabelReader
from densecal.data.layouts import Case, Companion
from densecal.registry import near_matches

__all__ = ["ImageLoading", "ImagePipeline", "Normalisation"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageLoading:
    """Images for training and testing; see :class:`densecal.data.medium.Loading`.

    In memory an image stays as it is in the file, ``(H, W, C)``, uint8 where that has 8 bits, and its label is a byte per pixel; companions are like the label,
    ``(H, W, R)``, and shares of a companion float16. The pipeline takes label maps and a companion's shares to the nearest.

    Args:
        card: The data set.
        train: Whether patches are drawn. Then what albumentations refuses shows at once.

    Raises:
        ValueError: As :class:`ImagePipeline`, if ``train``.
    """

    def __init__(self, card: DataCard, *, train: bool) -> None:
        self.card = card
        self.reader = LabelReader(card)
        self.normalise = Normalisation(card.normalisation)
        # By the names of the companions.
        self._pipelines: dict[tuple[str, ...], ImagePipeline] = {(): ImagePipeline(card, self.reader)} if train else {}
        # Code of a pixel -> its class; the last entry is padding's, -1 in int16.
        kind: Any = np.int16 if max(self.reader.num_classes, abs(card.ignore_index)) < 2**15 else np.int32
        self._classes = np.full(max(256, self.reader.num_classes + 2), card.ignore_index, kind)
        self._classes[1 : self.reader.num_classes + 1] = range(self.reader.num_classes)

    def load(self, case: Case) -> dict[str, Tensor]:
        assert case.label is not None
        image = read_image(case.image[0], self.card.image_channels, self.card.exif)
        label = self.reader(read_label(case.label))
        maps = {"label": label, **{companion.name: self._companion(companion) for companion in case.companions}}
        for name, values in maps.items():
            if values.shape[:2] != image.shape[:2]:
                raise ValueError(f"{name} is {values.shape[:2]}, but the image {image.shape[:2]}")
        return {
            "image": torch.from_numpy(image),
            **{name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in maps.items()},
            "statistics": torch.from_numpy(self.normalise.statistics(image)),
        }

    def _companion(self, companion: Companion) -> NDArray[Any]:
        if companion.shares:
            return np.moveaxis(read_shares(companion.files[0]), 0, -1).astype(np.float16)
        if self.reader.soft:
            raise ValueError(f"{companion.name} holds classes, which cannot be resized along with soft labels")
        return np.stack([self.reader(read_label(file)) for file in companion.files], axis=-1)

    def patch(self, item: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        maps = {name: values.numpy() for name, values in item.items() if name not in ("image", "statistics")}
        companions = tuple(name for name in maps if name != "label")
        if companions not in self._pipelines:
            self._pipelines[companions] = ImagePipeline(self.card, self.reader, companions)
        image, maps = self._pipelines[companions](item["image"].numpy(), maps, item["statistics"].numpy()[2], seed)
        return self._finished(image, maps, item["statistics"])

    def whole(self, item: dict[str, Tensor]) -> dict[str, Tensor]:
        maps = {name: values.numpy() for name, values in item.items() if name not in ("image", "statistics")}
        return self._finished(item["image"].numpy(), maps, item["statistics"])

    def _finished(self, image: NDArray[Any], maps: Mapping[str, NDArray[Any]], statistics: Tensor) -> dict[str, Tensor]:
        """Padding becomes 0 in the image, which is the mean, and "no class" in the label, whatever came after it in the pipeline."""
        label = maps["label"]
        if self.reader.soft:
            codes = torch.from_numpy(label)
            padded = label.sum(axis=-1) < 0.5
            known = codes[..., :-1].sum(dim=-1)
            target = torch.where(known > 0.5, codes.movedim(-1, 0)[:-1] / known.clamp(min=0.5), 0.0)
        else:
            padded = label == self.reader.padding
            target = torch.from_numpy(self._decoded(label)).unsqueeze(0)
        normalised = self.normalise(torch.from_numpy(image), statistics)
        if padded.any():
            np.copyto(normalised.numpy(), 0, where=padded)
        companions = {name: self._finished_companion(values, padded) for name, values in maps.items() if name != "label"}
        return {"image": normalised, "label": target, **companions}

    def _finished_companion(self, values: NDArray[Any], padded: NDArray[np.bool_]) -> Tensor:
        """``(H, W, R)`` codes or shares -> classes or float32 shares ``(R, H, W)``; shares are 0 in the padding."""
        channels = np.ascontiguousarray(np.moveaxis(values, -1, 0))
        if channels.dtype.kind == "f":
            return torch.from_numpy(np.where(padded, 0, channels).astype(np.float32))
        return torch.from_numpy(np.stack([self._decoded(one) for one in channels]))

    def _decoded(self, label: NDArray[Any]) -> NDArray[Any]:
        return cv2.LUT(label, self._classes) if label.dtype == np.uint8 else np.take(self._classes, label)


class Normalisation:
    """Clip, centre and scale the channels of an image.

    Args:
        kind: ``"imagenet"``, ``"zscore"``, ``"percentile"`` or ``"none"``, as in :class:`densecal.data.card.DataCard`.

    Example:
        >>> image = np.array([[[0], [255]]], np.uint8)
        >>> zscore = Normalisation("zscore")
        >>> zscore(torch.from_numpy(image), torch.from_numpy(zscore.statistics(image)))
        tensor([[[-1.,  1.]]])
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._last: tuple[bytes, NDArray[np.float32]] = (b"", np.empty(0, np.float32))

    def statistics(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Lowest and highest value, mean and standard deviation of each channel, ``(4, C)``, in the units of the file."""
        channels = image.shape[2]
        unit = 255.0 if image.dtype == np.uint8 else 1.0
        low, high = np.full(channels, -np.inf), np.full(channels, np.inf)
        if self.kind == "none":
            mean, std = np.zeros(channels), np.full(channels, unit)
        elif self.kind == "imagenet":
            mean, std = unit * np.array(IMAGENET_MEAN), unit * np.array(IMAGENET_STD)
        else:
            values, counts = _values_and_counts(image)
            if self.kind == "percentile":
                low, high = np.percentile(image.reshape(-1, channels).astype(np.float64), (0.5, 99.5), axis=0)
                values = values.clip(low, high)
            mean = np.average(values, axis=0, weights=counts)
            std = np.sqrt(np.average((values - mean) ** 2, axis=0, weights=counts))
            std[std == 0] = 1
        return np.stack([low, high, mean, std]).astype(np.float32)

    def __call__(self, image: Tensor, statistics: Tensor) -> Tensor:
        """``(H, W, C)`` -> float32 ``(C, H, W)``, in memory of its own."""
        if image.dtype != torch.uint8:
            return self._normalised(image.movedim(-1, 0), statistics).contiguous()
        # Of 8 bits there are 256 values: to look them up takes one pass over the image.
        result = torch.empty(image.shape[2], *image.shape[:2])
        for channel, values, out in zip(cv2.split(image.numpy()), self._table(statistics), result.numpy(), strict=True):
            cv2.LUT(channel, values, dst=out)
        return result

    def _normalised(self, values: Tensor, statistics: Tensor) -> Tensor:
        low, high, mean, std = statistics[:, :, None, None]
        return (values.clamp(low, high) if self.kind == "percentile" else values).sub(mean).div_(std)

    def _table(self, statistics: Tensor) -> NDArray[np.float32]:
        """What the values 0 to 255 become, ``(C, 1, 256)``; kept for the next image, whose statistics may be the same."""
        key = statistics.numpy().tobytes()
        if key != self._last[0]:
            self._last = (key, self._normalised(torch.arange(256, dtype=torch.float32).view(1, 1, 256), statistics).numpy())
        return self._last[1]


def _values_and_counts(image: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Values of each channel ``(V, C)`` and how often each is there: of 8 bits there are 256, else every pixel is one."""
    channels = image.shape[2]
    if image.dtype != np.uint8:
        values = image.reshape(-1, channels).astype(np.float64)
        return values, np.broadcast_to(1.0, values.shape)
    counts = [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel() for c in range(channels)]
    return np.repeat(np.arange(256.0)[:, None], channels, axis=1), np.stack(counts, axis=1)


class ImagePipeline:
    """The card's augmentation of an image and its label, by albumentations.

    Args:
        card: Names the transforms; those of ``card.pipeline``, or a crop alone without ``card.augment``.
        reader: Which codes labels have.
        companions: Names of the maps that are varied with the label.

    Raises:
        ValueError: If a name is no transform of albumentations that varies an image with a label, or an argument is not one of its arguments or has a value that it
            refuses.
    """

    def __init__(self, card: DataCard, reader: LabelReader, companions: Sequence[str] = ()) -> None:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks a server for its newest version
        import albumentations as A

        self.patch_size = tuple(card.patch_size)
        steps = card.pipeline if card.augment else {"RandomCrop": {"pad_if_needed": True}}
        made = {name: _step(A, name, dict(arguments or {}), card, reader) for name, arguments in steps.items()}
        self.compose = A.Compose(list(made.values()), additional_targets=dict.fromkeys(companions, "mask"))
        self.filled = [step for name, step in made.items() if _is_filled(step) and "fill" not in (steps[name] or {})]

    def __call__(
        self, image: NDArray[Any], maps: Mapping[str, NDArray[Any]], mean: NDArray[np.float32], seed: int
    ) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        """A patch.

        Args:
            image: ``(H, W, C)``, uint8 or float32.
            maps: ``label``, codes ``(H, W)`` or shares ``(H, W, K + 1)``, and the companions, codes ``(H, W, R)`` or shares ``(H, W, K)``.
            mean: What the image is filled with, ``(C,)``.
            seed: Says all that is drawn.

        Raises:
            ValueError: If the result has another size than patches have.
        """
        fill = (np.rint(mean) if image.dtype == np.uint8 else mean).tolist()
        for step in self.filled:
            step.fill = tuple(fill) if len(fill) > 1 else fill[0]
        # One state for all: of one seed each, transforms would draw the same numbers and mirror just those patches that get other colours.
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        given = {
            "mask" if name == "label" else name: values.astype(np.float32) if values.dtype == np.float16 else values for name, values in maps.items()
        }
        result = self.compose(image=image, **given)
        if result["image"].shape[:2] != self.patch_size:
            raise ValueError(
                f"data.pipeline gives {result['image'].shape[:2]} instead of data.patch_size {self.patch_size}. Let it end with a RandomCrop"
            )
        varied = {name: np.ascontiguousarray(result["mask" if name == "label" else name]) for name in maps}
        for name, values in varied.items():
            if name != "label":
                varied[name] = values.reshape(*self.patch_size, -1)
        return np.ascontiguousarray(result["image"]).reshape(*self.patch_size, -1), varied


_DONE_ELSEWHERE = ("Normalize", "ToFloat", "FromFloat", "ToTensorV2")
_NAMES_LABELS = ("fill_mask", "mask_drop_value", "ignore_values", "mask_indices")
"""Arguments that are classes."""
_WEIGHTED_MEANS = ("INTER_NEAREST", "INTER_LINEAR", "INTER_AREA", "INTER_NEAREST_EXACT", "INTER_LINEAR_EXACT")
"""Interpolations that keep shares in [0, 1]."""


def _step(albumentations: Any, name: str, arguments: dict[str, Any], card: DataCard, reader: LabelReader) -> Any:
    kinds: dict[str, Any] = {
        key: value
        for key, value in vars(albumentations).items()
        if inspect.isclass(value)
        and issubclass(value, (albumentations.DualTransform, albumentations.ImageOnlyTransform))
        and value.__module__.startswith("albumentations.augmentations.")  # not the base classes
        and not issubclass(value, albumentations.Transform3D)
        and "BBox" not in key
    }
    if name in _DONE_ELSEWHERE:
        raise ValueError(f"data.pipeline.{name}: images are normalised and made tensors after the pipeline, as `normalisation` says. Leave it out.")
    if name not in kinds:
        near = near_matches(name, kinds).partition("Valid:")[0]  # which are a hundred
        raise ValueError(f"data.pipeline.{name}: albumentations has no such transform of images. {near}".rstrip())
    parameters = inspect.signature(kinds[name].__init__).parameters
    if unknown := [key for key in arguments if key not in parameters]:
        raise ValueError(
            f"data.pipeline.{name}.{unknown[0]}: not an argument of {name}. {near_matches(unknown[0], [p for p in parameters if p != 'self'])}"
        )
    _check_interpolation(name, arguments, reader)
    for key in _NAMES_LABELS:
        if arguments.get(key) is not None:
            arguments[key] = _codes(f"data.pipeline.{name}.{key}", arguments[key], card, reader)
    try:
        strict = {"strict": True} if "InitSchema" in vars(kinds[name]) else {}  # else some wrong values give a warning and defaults
        step = kinds[name](**_suited(parameters, card, reader) | arguments | strict)
    except (TypeError, ValueError) as error:
        raise ValueError(f"data.pipeline.{name}: {_one_line(error)}") from None
    if needs := [key for key in step.targets_as_params if key not in ("image", "mask")]:
        raise ValueError(f"data.pipeline.{name}: needs {', '.join(needs)} besides an image and its label. Leave it out.")
    if not type(step).__module__.startswith("albumentations.augmentations.crops."):  # a crop may want larger images than the one it is tried on
        _try(step, name, card, reader)
    return step


def _try(step: Any, name: str, card: DataCard, reader: LabelReader) -> None:
    """Refuse a transform that cannot take such images and labels or would make others of them, before it is drawn in the middle of the training."""
    image = np.zeros((*card.patch_size, card.image_channels), np.uint8)
    label = np.ones(card.patch_size, reader.dtype)
    label[:, card.patch_size[1] // 2 :] = 2
    if reader.soft:
        label = np.eye(reader.num_classes + 1, dtype=np.float32)[label - 1]
    step.set_random_seed(0)
    try:
        result = step(image=image, mask=label, force_apply=True)
    except Exception as error:
        raise ValueError(
            f"data.pipeline.{name}: cannot vary images of {card.image_channels} channel(s) and their labels. {_one_line(error)}"
        ) from None
    if result["image"].dtype != image.dtype or result["image"][0].size != result["image"].shape[1] * card.image_channels:
        raise ValueError(f"data.pipeline.{name}: turns {_form(image)} into {_form(result['image'])}. Leave it out.")
    if reader.soft and result["mask"].sum(axis=-1).max(initial=0) > 1.001:
        raise ValueError(f"data.pipeline.{name}: makes shares that do not sum to 1 of soft labels. Leave it out.")


def _form(image: NDArray[Any]) -> str:
    channels = image.shape[2] if image.ndim == 3 else 1
    return f"{image.dtype} images of {channels} channel{'s' if channels > 1 else ''}"


def _check_interpolation(name: str, arguments: Mapping[str, Any], reader: LabelReader) -> None:
    if "mask_interpolation" not in arguments:
        return
    if not reader.soft:
        raise ValueError(f"data.pipeline.{name}.mask_interpolation: labels are resized to the nearest and nothing else. Leave it out.")
    allowed = {getattr(cv2, kind): kind for kind in _WEIGHTED_MEANS}
    if arguments["mask_interpolation"] not in allowed:
        spelled = ", ".join(f"{number} ({kind})" for number, kind in sorted(allowed.items()))
        raise ValueError(f"data.pipeline.{name}.mask_interpolation: expected one of {spelled}, but got {arguments['mask_interpolation']!r}.")


def _codes(key: str, value: Any, card: DataCard, reader: LabelReader) -> Any:
    """Classes as the pipeline sees them; `ignore_index` is what padding is."""
    if reader.soft:
        raise ValueError(f"{key}: soft labels are filled with nothing. Leave it out.")
    if isinstance(value, (list, tuple)):
        return [_codes(key, one, card, reader) for one in value]
    if value == card.ignore_index:
        return reader.padding
    if value not in range(reader.num_classes):
        raise ValueError(f"{key}: expected a class 0 to {reader.num_classes - 1} or ignore_index {card.ignore_index}, but got {value!r}.")
    return int(value) + 1


def _suited(parameters: Mapping[str, inspect.Parameter], card: DataCard, reader: LabelReader) -> dict[str, Any]:
    """What an argument is unless the card gives it."""
    height, width = card.patch_size
    exact = "INTER_NEAREST_EXACT" in str(parameters["mask_interpolation"].annotation) if "mask_interpolation" in parameters else False
    nearest = cv2.INTER_NEAREST_EXACT if exact else cv2.INTER_NEAREST  # the exact one has the same centres as the image's
    values = {
        "height": height,
        "width": width,
        "min_height": height,
        "min_width": width,
        "size": (height, width),
        "fill_mask": reader.padding,
        "mask_interpolation": cv2.INTER_LINEAR if reader.soft else nearest,
    }
    # A transform whose fill_mask is None leaves labels as they are.
    return {key: value for key, value in values.items() if key in parameters and not (key == "fill_mask" and parameters[key].default is None)}


def _is_filled(step: Any) -> bool:
    """Whether a transform fills parts of an image with one colour."""
    fill = inspect.signature(type(step).__init__).parameters.get("fill")
    return fill is not None and "tuple" in str(fill.annotation)


def _one_line(error: Exception) -> str:
    """What pydantic says of the first value that it refuses, without its headline and its link."""
    cause = error.__cause__ or error
    if not hasattr(cause, "errors"):
        return " ".join(str(error).split())
    first = cause.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    came = f" (got {first['input']!r})" if place and first["type"] != "missing" else ""
    return f"{place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}{came}"
