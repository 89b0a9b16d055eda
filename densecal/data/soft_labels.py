"""Folders of probabilities that a network has said about the cases of a data set, to teach another one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from densecal.data.arrays import one_line, open_array
from densecal.data.card import DataCard
from densecal.data.layouts import Case
from densecal.data.medium import medium_of
from densecal.files import write_atomically
from densecal.ops.activation import Activation

__all__ = ["MANIFEST", "SoftLabels", "channels", "soft_label_manifest"]

MANIFEST = "soft_labels.json"
_OUTPUTS = ("soft_label", "probs")


def soft_label_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Say what the soft labels of a folder are before the first is written; a folder that was begun is gone on with only by the same teacher.

    Args:
        folder: The folder.
        content: ``teacher`` (hash of the checkpoint), what :func:`channels` says, and whatever else must not differ from one soft label to the next.

    Raises:
        ValueError: If the folder holds other ones.
    """
    path = folder / MANIFEST
    if path.is_file():
        held = _read(path)
        if different := [key for key in {**content, **held} if held.get(key) != content.get(key)]:
            raise ValueError(
                f"{folder}: holds soft labels with {different[0]} {held.get(different[0])}, not {content.get(different[0])}. Choose an empty folder, or remove this one."
            )
        return
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def channels(card: DataCard) -> dict[str, Any]:
    """What the channels of probabilities are, for the manifest: the names of the classes or regions, what makes their probabilities, and the classes of each region."""
    return {"classes": list(card.schema.names), "activation": card.schema.activation, "regions": card.region_classes}


class SoftLabels:
    """Probabilities of one teacher, a file per case: ``<id>_soft_label`` or ``<id>_probs``, in the formats of :func:`densecal.inference.write_prediction`.

    Args:
        folder: The folder, with the manifest of ``densecal-soft-labels`` or without.
        card: The data set they are for.

    Attributes:
        fingerprint: Hash of the teacher's checkpoint, or the name of the folder where it has no manifest.
        activation: What made the probabilities: ``"softmax"``, or ``"sigmoid"`` of regions.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the manifest cannot be read, or names other classes or regions.
    """

    def __init__(self, folder: Path | str, card: DataCard) -> None:
        self.folder = Path(folder)
        self.card = card
        self.suffix = {2: ".npz", 3: ".nii.gz"}[card.spatial_dims]
        if not self.folder.is_dir():
            raise FileNotFoundError(f"No folder of soft labels {self.folder}. Write them with densecal-soft-labels run=TEACHER output={self.folder}.")
        self.manifest = _read(self.folder / MANIFEST) if (self.folder / MANIFEST).is_file() else {}
        self.fingerprint = str(self.manifest.get("teacher", self.folder.name))
        self.activation: Activation = card.schema.activation
        for name, expected in channels(card).items():
            if (held := self.manifest.get(name, expected)) != expected:
                raise ValueError(f"{self.folder}: the soft labels are of the {name} {held}, but {card.name} has {expected}.")

    def path(self, case_id: str) -> Path | None:
        """The file of a case, if there is one."""
        paths = (self.folder / f"{case_id}_{output}{self.suffix}" for output in _OUTPUTS)
        return next((path for path in paths if path.is_file()), None)

    def file(self, case: Case) -> Path:
        """The file of a case, whose header says that it has a channel per class.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it cannot be read, or has other channels.
        """
        path = self.path(case.id)
        if path is None:
            raise FileNotFoundError(
                f"{self.folder}: no soft label of the training case {case.id!r}, {case.id}_soft_label{self.suffix}. densecal-soft-labels with the same output= goes on "
                f"where it stopped."
            )
        try:
            shape = open_array(path, ["probs"]).shape
        except Exception as error:
            raise ValueError(f"{path}: cannot be read ({one_line(error)}). Remove it, and write it again with densecal-soft-labels.") from error
        classes = self.card.schema.num_classes
        axis = 0 if self.card.spatial_dims == 2 else -1
        if len(shape) != self.card.spatial_dims + 1 or shape[axis] != classes:
            raise ValueError(
                f"{path}: expected a channel for each of the {classes} {'regions' if self.card.regions else 'classes'} of {self.card.name}, but got the shape {shape} of a "
                f"{medium_of(self.card).noun}."
            )
        return path


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({one_line(error)}). Remove the folder, and write it again with densecal-soft-labels.") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected an object, but got {type(content).__name__}. Remove the folder, and write it again with densecal-soft-labels."
        )
    return content
