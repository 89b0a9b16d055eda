"""What nnU-Net writes beside its predictions: class names, regions, the ignore label, and whether volumes were turned."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densecal.data.arrays import file_stem, one_line
from densecal.labels import DEFAULT_IGNORE_INDEX

if TYPE_CHECKING:
    from densecal.data.card import DataCard

__all__ = ["LabelDescription", "describe_labels", "description_file", "description_of", "turns_to_ras", "validated_cases"]


@dataclass(frozen=True)
class LabelDescription:
    """The classes of a ``dataset.json``.

    Args:
        names: Class names in the order of their numbers, or names of the regions in the order of their channels.
        regions: Labels that make up each region, or ``None`` where classes exclude each other.
        ignore_index: Label of voxels without a class, if there is one.
        outside: Labels that are in no region.
    """

    names: tuple[str, ...]
    regions: tuple[tuple[int, ...], ...] | None
    ignore_index: int | None
    outside: tuple[int, ...] = (0,)


def describe_labels(predictions: Path, labels: Path) -> LabelDescription | None:
    """What the nearest ``dataset.json`` says of the classes; ``None`` if there is none.

    It is looked for in the folder of predictions (for nnU-Net's ``fold_*/validation`` also two folders up), in that of labels, and beside ``labelsTr`` or
    ``labelsTs``. Version 1's ``{"0": "background"}`` is read as well as version 2's ``{"background": 0}``. Where ``regions_class_order`` is there or an entry has several
    labels, the entries are regions; ``"background"`` may then list every label that is in none of them.

    Raises:
        ValueError: If it cannot be read, or does not number classes from 0.
    """
    folders = [predictions, *_trainer(predictions), labels, *([labels.parent] if labels.name in ("labelsTr", "labelsTs") else [])]
    path = next((folder / "dataset.json" for folder in folders if (folder / "dataset.json").is_file()), None)
    if path is None:
        return None
    content = _read_json(path)
    labels_of = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels_of, dict) or not labels_of:
        raise ValueError(
            f'{path}: expected "labels" to name the classes, as {{"background": 0, "tumour": 1}}. Mend it, or move it out of the folder.'
        )
    if all(str(key).isdecimal() and isinstance(name, str) for key, name in labels_of.items()):  # nnU-Net v1 and the Decathlon: number -> name
        labels_of = {name: int(key) for key, name in labels_of.items()}
    try:
        values = {str(name): tuple(int(v) for v in (value if isinstance(value, list) else [value])) for name, value in labels_of.items()}
    except (TypeError, ValueError):
        raise ValueError(f'{path}: expected each of "labels" to be a whole number or a list of them, but got {labels_of}.') from None
    ignore = values.pop("ignore", None)
    ignore_index = ignore[0] if ignore else None
    if "regions_class_order" in content or any(len(value) > 1 for value in values.values()):
        outside = values.pop("background", (0,))
        regions = {name: value for name, value in values.items() if set(value) != {0}}
        return LabelDescription(tuple(regions), tuple(regions.values()), ignore_index, outside)
    names = sorted(values, key=lambda name: values[name])
    if [values[name] for name in names] != [(n,) for n in range(len(names))]:
        raise ValueError(f'{path}: expected "labels" to number the classes 0 to {len(names) - 1}, but got {labels_of}.')
    return LabelDescription(tuple(names), None, ignore_index)


def description_of(card: DataCard) -> str:
    """What :func:`describe_labels` reads, of the classes or regions of a card: content of a ``dataset.json`` beside predictions."""
    schema = card.schema
    content: dict[str, Any] = {"labels": {name: c for c, name in enumerate(schema.names)}}
    if schema.regions:
        inside = {c for region in schema.regions for c in region}
        labels = {"background": [c for c in range(len(card.classes)) if c not in inside]}
        labels |= {name: list(region) for name, region in zip(schema.names, schema.regions, strict=True)}
        content = {"labels": labels, "regions_class_order": list(range(1, len(schema.names) + 1))}
    if schema.ignore_index != DEFAULT_IGNORE_INDEX:
        content["labels"]["ignore"] = schema.ignore_index
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def turns_to_ras(predictions: Path) -> bool:
    """Whether ``plans.json`` says that nnU-Net turned volumes to RAS before it predicted them; it leaves the probabilities so."""
    path = description_file(predictions, "plans.json")
    content = None if path is None else _read_json(path)
    return isinstance(content, dict) and content.get("image_reader_writer") == "NibabelIOWithReorient"


def validated_cases(predictions: Path) -> frozenset[str] | None:
    """The cases that nnU-Net's own validation of a fold was of, by the ``summary.json`` that it ends with; ``None`` for any other folder.

    ``labelsTr`` holds the cases of all folds, of which a fold's ``validation`` predicts its own.

    Raises:
        ValueError: If ``summary.json`` cannot be read.
    """
    path = predictions / "summary.json"
    if not _trainer(predictions) or not path.is_file():
        return None
    try:
        files = [str(case["prediction_file"]) for case in _read_json(path)["metric_per_case"]]
    except (KeyError, TypeError):
        raise ValueError(
            f'{path}: expected "metric_per_case" to name the "prediction_file" of each case. Mend it, or move it out of the folder.'
        ) from None
    return frozenset(stem for file in files if (stem := file_stem(Path(file.replace("\\", "/")))))


def description_file(predictions: Path, name: str) -> Path | None:
    """``dataset.json`` or ``plans.json`` that belongs to a folder of predictions; ``None`` if there is none."""
    return next((folder / name for folder in (predictions, *_trainer(predictions)) if (folder / name).is_file()), None)


def _trainer(predictions: Path) -> list[Path]:
    """nnU-Net's folder of a trained model, for its own validation folder."""
    return [predictions.parent.parent] if predictions.name.startswith("validation") and predictions.parent.name.startswith("fold_") else []


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)}). Mend it, or move it out of the folder.") from None
