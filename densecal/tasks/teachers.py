"""Where a student's teachers are: networks that look at the same patches, or probabilities that were written down before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from densecal.checks import check_choice
from densecal.data.card import DataCard
from densecal.data.layouts import Case, Companion
from densecal.data.soft_labels import SoftLabels
from densecal.inference import Predictor, full_resolution
from densecal.ops.activation import logits_from_probabilities
from densecal.runs import file_hash, find_checkpoint

__all__ = ["CachedTeachers", "OnlineTeachers", "Teachers"]

_PREPROCESSING = ("orientation", "spacing", "normalisation")
"""What a network that is handed the student's patches must have been trained with, too."""


class Teachers(Protocol):
    """What :class:`densecal.tasks.DistillationTask` asks for the logits of a batch.

    Attributes:
        fingerprints: One text per teacher that changes when the teacher does.
    """

    fingerprints: tuple[str, ...]

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits ``(M, N, C, *patch)`` of M teachers on a training batch, without a gradient."""
        ...

    def whole_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """The same of whole cases.

        Raises:
            ValueError: If they are not known.
        """
        ...

    def companions(self, case: Case) -> tuple[Companion, ...]:
        """What the data have to bring along with a training case."""
        ...


class OnlineTeachers:
    """Trained runs that look at what the student looks at, with the same augmentation.

    They are frozen, in evaluation mode and single precision, and no part of the student: neither of its parameters nor of its checkpoint. They follow the batch from device
    to device; under DDP each process has its own.

    Args:
        teachers: Run directories or checkpoint files, of any architecture.
        checkpoint: Which one of a run directory, ``"best"`` or ``"last"``.
        card: The student's data set. The teachers know the same classes or regions, take as many channels and were trained on images prepared alike.
        trust_config: As for :meth:`densecal.inference.Predictor.from_run`.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If there is no teacher, or one does not fit the card.

    Example:
        >>> teachers = OnlineTeachers(["runs/hippocampus_small/2026-01-31_12-00-00"], card=card)  # doctest: +SKIP
        >>> teachers.logits({"image": torch.zeros(4, 1, 48, 64, 48)}).shape  # doctest: +SKIP
        torch.Size([1, 4, 3, 48, 64, 48])
    """

    def __init__(self, teachers: Sequence[str], *, checkpoint: str = "best", card: DataCard, trust_config: bool = False) -> None:
        check_choice("checkpoint", checkpoint, ("best", "last"))
        if not teachers:
            raise ValueError("Expected at least one teacher, but got none. Give trained runs: distillation.teachers=[runs/EXPERIMENT/TIME].")
        paths = [find_checkpoint(Path(teacher), checkpoint) for teacher in teachers]
        self.predictors = [Predictor.from_run(path, trust_config=trust_config) for path in paths]
        for path, predictor in zip(paths, self.predictors, strict=True):
            predictor.model.requires_grad_(False)
            _check_fits(path, predictor, card)
        self.fingerprints = tuple(file_hash(path) for path in paths)

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        image = batch["image"]
        return torch.stack([full_resolution(self._on(image, one).model(image.float()), image.ndim - 2).float() for one in self.predictors])

    @torch.no_grad()
    def whole_logits(self, batch: Mapping[str, Any]) -> Tensor:
        image = batch["image"]
        return torch.stack(
            [one.window.with_logits(self._on(image, one).model, image.float(), activation=one.card.schema.activation)[1] for one in self.predictors]
        )

    def companions(self, case: Case) -> tuple[Companion, ...]:
        return ()

    @staticmethod
    def _on(image: Tensor, predictor: Predictor) -> Predictor:
        if predictor.device != image.device:
            predictor.model.to(image.device)
            predictor.device = image.device
        return predictor


class CachedTeachers:
    """Probabilities that teachers have said about every training case, cropped, turned and resampled with its label.

    What they say is about whole images as they are; a network that looks at the augmented patch may say something else about it.

    Args:
        teachers: A folder of ``densecal-soft-labels`` for each teacher, or of ``densecal-predict outputs=[probs]``.
        card: The student's data set.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is no teacher, or one knows other classes or regions.
    """

    def __init__(self, teachers: Sequence[str], *, card: DataCard) -> None:
        if not teachers:
            raise ValueError("Expected at least one teacher, but got none. Give folders of densecal-soft-labels: distillation.teachers=[DIR].")
        self.folders = [SoftLabels(teacher, card) for teacher in teachers]
        self.names = tuple(f"teacher_probs_{number}" for number in range(len(self.folders)))
        self.fingerprints = tuple(folder.fingerprint for folder in self.folders)

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        known = zip(self.names, self.folders, strict=True)
        return torch.stack([logits_from_probabilities(batch[name].float(), folder.activation) for name, folder in known])

    def whole_logits(self, batch: Mapping[str, Any]) -> Tensor:
        if missing := [name for name in self.names if name not in batch]:
            raise ValueError(
                f"Expected {missing[0]!r} of the cases, but only training cases have soft labels. A term that learns from validation takes distillation=online."
            )
        return self.logits(batch)

    def companions(self, case: Case) -> tuple[Companion, ...]:
        return tuple(Companion(name, (folder.file(case),), shares=True) for name, folder in zip(self.names, self.folders, strict=True))


@torch.no_grad()
def _check_fits(path: Path, predictor: Predictor, card: DataCard) -> None:
    known = predictor.card
    if known.told_apart != card.told_apart:
        raise ValueError(f"{path}: the teacher knows {known.told_apart}, but {card.name} has {card.told_apart}.")
    if (known.image_channels, known.spatial_dims) != (card.image_channels, card.spatial_dims):
        raise ValueError(
            f"{path}: the teacher takes {known.image_channels} channel(s) in {known.spatial_dims}D, but {card.name} has {card.image_channels} in {card.spatial_dims}D."
        )
    for name in _PREPROCESSING:
        if getattr(known, name) != getattr(card, name):
            raise ValueError(
                f"{path}: the teacher was trained with data.{name}={getattr(known, name)}, but the student has {getattr(card, name)}. Train both alike, or write the "
                "teacher's probabilities down with densecal-soft-labels and take distillation=cached."
            )
    patch = torch.zeros(1, card.image_channels, *card.patch_size)
    expected = (1, card.schema.num_classes, *card.patch_size)
    try:
        shape = tuple(full_resolution(predictor.model(patch), card.spatial_dims).shape)
        problem = "" if shape == expected else f"its output is {shape} instead of {expected}"
    except Exception as error:
        problem = str(error).splitlines()[0].rstrip(".")
    if problem:
        size = " x ".join(map(str, card.patch_size))
        raise ValueError(
            f"{path}: the teacher cannot take patches of {size} ({problem}). Choose data.patch_size=[...] divisible by its strides; it was trained on "
            f"{' x '.join(map(str, known.patch_size))}."
        )
