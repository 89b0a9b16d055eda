"""From image files to network inputs; augmentation is albumentations' in the order that the card gives."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densecal.data.card import DataCard
from densecal.data.images.files import read_image, read_label
from densecal.data.images.labels import LabelReader
from densecal.data.layouts import Case
from densecal.registry import near_matches

__all__ = ["ImageLoading", "Normalisation", "build_pipeline"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageLoading:
    """Images for training and testing; see :class:`densecal.data.medium.Loading`.

    In memory an image stays as it is in the file, ``(H, W, C)``, uint8 where that has 8 bits, and its label is a byte per pixel.
    """

    def __init__(self, card: DataCard, *, train: bool) -> None:
        self.card = card
        self.reader = LabelReader(card)
        self.normalise = Normalisation(card.normalisation)
        self._pipelines: dict[torch.dtype, Any] = {}
        if train:
            self._pipelines[torch.uint8] = build_pipeline(card, self.reader, np.uint8)  # shows at once what albumentations refuses

    def load(self, case: Case) -> dict[str, Tensor]:
        assert case.label is not None
        image = read_image(case.image[0], self.card.image_channels, self.card.exif)
        label = self.reader(read_label(case.label))
        if label.shape[:2] != image.shape[:2]:
            raise ValueError(f"the label is {label.shape[:2]}, but the image {image.shape[:2]}")
        return {
            "image": torch.from_numpy(image),
            "label": torch.from_numpy(np.ascontiguousarray(label)),
            "statistics": torch.from_numpy(self.normalise.statistics(image)),
        }

    def patch(self, item: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        dtype = item["image"].dtype
        if dtype not in self._pipelines:
            self._pipelines[dtype] = build_pipeline(self.card, self.reader, np.float32)
        pipeline = self._pipelines[dtype]
        pipeline.set_random_seed(seed % 2**32)
        varied = pipeline(image=item["image"].numpy(), mask=item["label"].numpy())
        image, label = varied["image"], varied["mask"]
        if image.shape[:2] != tuple(self.card.patch_size):
            raise ValueError(
                f"`pipeline` gives {image.shape[:2]} instead of `patch_size` {tuple(self.card.patch_size)}; let it end with a RandomCrop"
            )
        return self._finished(torch.from_numpy(image), torch.from_numpy(label), item["statistics"])

    def whole(self, item: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._finished(item["image"], item["label"], item["statistics"])

    def _finished(self, image: Tensor, label: Tensor, statistics: Tensor) -> dict[str, Tensor]:
        """Padding becomes 0 in the image, which is the mean, and "no class" in the label, whatever came after it in the pipeline."""
        normalised = self.normalise(image, statistics)
        if self.reader.soft:
            shares, total = label.movedim(-1, 0)[:-1], label.sum(dim=-1)
            padded = total < 0.5
            known = shares.sum(dim=0)
            target = torch.where(known > 0.5, shares / known.clamp(min=0.5), 0.0)
        else:
            padded = label == self.reader.padding
            code = label.long()
            target = torch.where(padded | (code == 0), self.card.ignore_index, code - 1).unsqueeze(0)
        return {"image": normalised.masked_fill_(padded, 0.0), "label": target}


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
            values = image.reshape(-1, channels).astype(np.float64)
            if self.kind == "percentile":
                low, high = np.percentile(values, (0.5, 99.5), axis=0)
                values = values.clip(low, high)
            mean, std = values.mean(axis=0), values.std(axis=0)
            std[std == 0] = 1
        return np.stack([low, high, mean, std]).astype(np.float32)

    def __call__(self, image: Tensor, statistics: Tensor) -> Tensor:
        """``(H, W, C)`` -> float32 ``(C, H, W)``, in memory of its own."""
        low, high, mean, std = statistics[:, :, None, None]
        result = image.movedim(-1, 0).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if self.kind == "percentile":
            result = result.clamp(low, high)
        return result.sub_(mean).div_(std)


def build_pipeline(card: DataCard, reader: LabelReader, dtype: Any) -> Any:
    """The card's augmentation as one albumentations transform of ``image=`` and ``mask=``.

    Raises:
        ValueError: If a name is no transform of albumentations, or an argument is not one of its arguments or has a value that it refuses.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks a server for its newest version
    import albumentations as A

    steps = card.pipeline if card.augment else {"RandomCrop": {"pad_if_needed": True}}
    mean = np.array(IMAGENET_MEAN if card.image_channels == 3 else [np.mean(IMAGENET_MEAN)]) * (255 if dtype == np.uint8 else 1)
    return A.Compose([_step(A, name, dict(arguments or {}), card, reader, mean.tolist()) for name, arguments in steps.items()])


def _step(albumentations: Any, name: str, arguments: dict[str, Any], card: DataCard, reader: LabelReader, mean: list[float]) -> Any:
    kinds = {
        key: value
        for key, value in vars(albumentations).items()
        if inspect.isclass(value) and issubclass(value, albumentations.BasicTransform) and not inspect.isabstract(value)
    }
    if name not in kinds:
        near = near_matches(name, kinds).partition(" Valid:")[0]
        raise ValueError(f"data.pipeline.{name}: albumentations has no such transform. {near}".rstrip())
    parameters = inspect.signature(kinds[name].__init__).parameters
    if unknown := [key for key in arguments if key not in parameters]:
        raise ValueError(
            f"data.pipeline.{name}.{unknown[0]}: not an argument of {name}. {near_matches(unknown[0], [p for p in parameters if p != 'self'])}"
        )
    suited = _suited(parameters, card, reader, mean)
    if not reader.soft and arguments.get("mask_interpolation", suited.get("mask_interpolation")) != suited.get("mask_interpolation"):
        raise ValueError(f"data.pipeline.{name}.mask_interpolation: labels are resized to the nearest and nothing else. Leave it out.")
    try:
        return kinds[name](**suited | arguments)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data.pipeline.{name}: {reason}") from None


def _suited(parameters: Mapping[str, inspect.Parameter], card: DataCard, reader: LabelReader, mean: list[float]) -> dict[str, Any]:
    """What an argument is unless the card gives it."""
    import cv2

    height, width = card.patch_size
    exact = "INTER_NEAREST_EXACT" in str(parameters["mask_interpolation"].annotation) if "mask_interpolation" in parameters else False
    nearest = cv2.INTER_NEAREST_EXACT if exact else cv2.INTER_NEAREST  # the exact one has the same centres as the image's
    values = {
        "height": height,
        "width": width,
        "min_height": height,
        "min_width": width,
        "size": (height, width),
        "fill": mean if len(mean) > 1 else mean[0],
        "fill_mask": reader.padding,
        "mask_interpolation": cv2.INTER_LINEAR if reader.soft else nearest,
    }
    # A transform whose fill_mask is None leaves labels as they are.
    return {key: value for key, value in values.items() if key in parameters and not (key == "fill_mask" and parameters[key].default is None)}
