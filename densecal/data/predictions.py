"""Saved predictions of any segmentation model beside their labels, one case at a time, as every metric reads them.

What is known of nnU-Net's files (from its source, versions 1 and 2): ``--save_probabilities`` (in training ``--npz``; version 1 ``--save_npz``)
writes ``<case>.npz`` beside the hard label map ``<case>.nii.gz`` and a pickled ``<case>.pkl``, which is never opened here. The array is called
``probabilities`` (version 1: ``softmax``) and has the class axis first and the spatial axes as SimpleITK gives them, ``(C, Z, Y, X)``, the reverse of
what nibabel reads; nnU-Net's own nibabel reader does the same, and ``NibabelIOWithReorient`` turns the volume to RAS first, as ``plans.json`` tells.
A 2D image is ``(C, 1, H, W)``. Around the box that nnU-Net crops to, early releases of version 2 leave 0 in every channel where later ones write certain
background; version 1 saves the box alone. Regions have one sigmoid channel each, in the order of ``labels`` in ``dataset.json``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densecal.checks import check_choice
from densecal.data.arrays import ArrayFile, file_stem, one_line, open_array
from densecal.data.card_labels import CardLabels
from densecal.data.nnunet import describe_labels, turns_to_ras, validated_cases
from densecal.data.validate import DataProblems, Problem
from densecal.data.volumes.nifti import corner_shift, plane_names
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation, probabilities

__all__ = ["AXES", "PredictedCase", "PredictionFolder", "PredictionProblem"]

Kind: TypeAlias = Literal["missing", "extra", "ambiguous", "unreadable", "hard", "shape", "place", "values"]

AXES = ("auto", "nnunet", "channels_first", "channels_last")
_NNUNET_KEYS = ("probabilities", "softmax")
PROBABILITY_KEYS = (*_NNUNET_KEYS, "probs")
AFFIXES = ("_probs", "_probabilities", "_softmax")
COMPANION = re.compile(r"(.+)_(?:label|confidence|overlay)(?:_.*)?")
"""What densecal-predict writes beside ``<case>_probs``; of regions with their names."""
_SUM = 5e-3
"""Sums of rounded probabilities differ from 1 by up to 5e-4 (float16) or 2e-3 (bfloat16), after an interpolation somewhat more."""
_WHOLE = 1e-3
_SHIFT = 0.1
_SAVE_PROBABILITIES = (
    "Save the probabilities (nnU-Net: `nnUNetv2_predict --save_probabilities`, in training `--npz`, in version 1 `--save_npz`; "
    "densecal-predict: outputs=[probs])."
)


@dataclass(frozen=True)
class PredictionProblem(Problem):
    """One thing that is wrong with one case; its text is one line that names the file, the case and the repair.

    Args:
        kind: ``"missing"`` (a label without a prediction), ``"extra"`` (a prediction without a label), ``"ambiguous"`` (two files for one),
            ``"unreadable"``, ``"hard"`` (a label map instead of probabilities), ``"shape"`` (classes or shape do not fit the label), ``"place"`` (the
            affines differ) or, only when a case is read, ``"values"``.
    """

    kind: Kind = "unreadable"

    def __str__(self) -> str:
        return f"{self.file}: case {self.case_id!r} {self.message}"


@dataclass(frozen=True)
class PredictedCase:
    """One case on the grid and in the axis order of its label file.

    Args:
        case_id: Its name.
        probs: Probabilities ``(C, *spatial)``, float32, in [0, 1].
        label: Label map ``(*spatial)``, int64; or a soft reference ``(C, *spatial)``, float32; or, under sigmoid, one 0/1 map per region
            ``(C, *spatial)``, int32. ``ignore_index`` marks voxels without a class.
        spacing: Voxel size in mm per axis, ``None`` where the label file does not tell.
        axis_names: Name of the plane across each axis of a volume, such as ``("sagittal", "coronal", "axial")``; empty where not known.
    """

    case_id: str
    probs: Tensor
    label: Tensor
    spacing: tuple[float, ...] | None = None
    axis_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Layout:
    """How to bring a file's array into the label's order: drop axes of size 1, then transpose."""

    drop: tuple[int, ...]
    axes: tuple[int, ...]
    channels: int | None
    order: str


@dataclass(frozen=True)
class _Plan:
    case_id: str
    prediction: ArrayFile
    label: ArrayFile
    layout: _Layout
    spatial: tuple[int, ...]
    soft: bool
    turn: NDArray[Any] | None


class PredictionFolder:
    """The cases of a folder of predictions that have a label, read when asked for.

    A case is a file name without its ending. Predictions may be ``.npz`` (nnU-Net's, or any single array), ``.npy``, ``.safetensors``, ``.nii`` and
    ``.nii.gz`` with the classes on the last axis, or ``.png`` and ``.tif`` with the probability of the foreground (8 or 16 bits: times 255 or 65535).
    They may end in ``_probs``, ``_probabilities`` or ``_softmax``. Labels are label maps in the same formats, soft references ``(C, *spatial)`` (floating
    arrays; NIfTI ``(X, Y, Z, C)``), or 0/1 maps per region. Hidden files, folders, sidecars (``.json``, ``.pkl``, ...) and all others are left alone, and
    nothing is unpickled. Where a folder holds a case twice, as nnU-Net's validation folder does, the probabilities win over the hard label map.

    A prediction without a class axis, or with one channel, is the probability of the foreground; under softmax it becomes two classes (1 - p, p).
    The remains of nnU-Net's cropping, voxels with 0 in every class, are taken for certain background.

    Args:
        predictions: Folder of predictions. ``dataset.json`` in it (for nnU-Net's ``fold_*/validation`` two folders up), in the labels' folder or
            beside ``labelsTr`` gives class names, regions and the ignore label. For such a folder ``summary.json`` says which cases it should hold.
        labels: Folder of reference labels, or the labels of a data set that has a card.
        num_classes: Number of channels C. By default that of ``dataset.json``, else of the first prediction.
        activation: ``"softmax"`` for exclusive classes, ``"sigmoid"`` for regions that may overlap. By default softmax, unless there are ``regions``.
        from_logits: The files hold logits.
        axes: Order of the axes of every prediction: ``"channels_first"`` and ``"channels_last"`` with the spatial axes as in the label, or
            ``"nnunet"``, class axis first and the spatial ones reversed (only where the label is not an image file). ``"auto"`` takes the format's own
            rule (nnU-Net's for its keys, channels last for NIfTI) and for other arrays the one order that fits the label's shape.
        ignore_index: Label of voxels to leave out. By default that of ``dataset.json``, else -100.
        regions: Name -> labels that make up the region, in the order of the channels. By default those of ``dataset.json``.
        label_values: Value that label files hold for each class, ``[0, 255]`` for a 0/255 mask. By default the class itself.
        prediction_suffix: What follows the case in the names of predictions; files without it are left alone. By default any of those above, or
            nothing.
        label_suffix: The same for labels, such as ``"_gt"``.
        images: Folder of images to show beside: the case's name, or nnU-Net's ``<case>_0000``.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If no case has both prediction and label, ``dataset.json`` makes no sense, or options contradict each other.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("predictions", "labels"):
        ...     (folder / name).mkdir()
        >>> np.save(folder / "predictions" / "a_probs.npy", np.float32([[[0.9, 0.2]], [[0.1, 0.8]]]))
        >>> np.save(folder / "labels" / "a.npy", np.uint8([[0, 1]]))
        >>> cases = PredictionFolder(folder / "predictions", folder / "labels")
        >>> cases.problems()
        []
        >>> case = cases["a"]
        >>> case.probs.shape, case.label
        (torch.Size([2, 1, 2]), tensor([[0, 1]]))
    """

    def __init__(
        self,
        predictions: Path | str,
        labels: Path | str | CardLabels,
        *,
        num_classes: int | None = None,
        activation: Activation | None = None,
        from_logits: bool = False,
        axes: str = "auto",
        ignore_index: int | None = None,
        regions: Mapping[str, Sequence[int]] | None = None,
        label_values: Sequence[int] | None = None,
        prediction_suffix: str | None = None,
        label_suffix: str = "",
        images: Path | str | None = None,
    ) -> None:
        check_choice("axes", axes, AXES)
        check_choice("activation", activation, (None, "softmax", "sigmoid"))
        self._card_labels = labels if isinstance(labels, CardLabels) else None
        self.predictions = Path(predictions)
        self.labels = labels.root if isinstance(labels, CardLabels) else Path(labels)
        self.images = None if images is None else Path(images)
        for name, folder in (("predictions", self.predictions), ("labels", self.labels), ("images", self.images)):
            if folder is not None and not folder.is_dir():
                raise FileNotFoundError(f"{name}: no folder {folder}.")
        self.from_logits = from_logits
        self.axes = axes
        self.label_values = None if label_values is None else tuple(int(value) for value in label_values)

        described = None if self._card_labels else describe_labels(self.predictions, self.labels)
        use_names = described is not None and regions is None
        self.class_names: tuple[str, ...] | None = described.names if described and use_names else tuple(regions) if regions else None
        if self._card_labels:
            schema = self._card_labels.card.schema
            self.class_names, ignore_index = schema.names, schema.ignore_index
        self.regions: tuple[tuple[int, ...], ...] | None = (
            tuple(tuple(int(v) for v in part) for part in regions.values()) if regions else described.regions if described else None
        )
        self._soft = self._card_labels is not None and self._card_labels.card.soft
        self._outside: tuple[int, ...] = described.outside if described and use_names else (0,)
        if self._card_labels and schema.regions:
            self.regions, self._outside = schema.regions, tuple(range(len(self._card_labels.card.classes)))
        self.activation: Activation = activation or ("sigmoid" if self.regions else "softmax")
        given = DEFAULT_IGNORE_INDEX if described is None or described.ignore_index is None else described.ignore_index
        self.ignore_index = given if ignore_index is None else ignore_index
        self._known = self._known_classes(num_classes)
        self._check_options()
        self._reorients = turns_to_ras(self.predictions)

        self._label_files, self._prediction_files = self._match(prediction_suffix, label_suffix)
        of_fold = validated_cases(self.predictions)
        if of_fold is not None:
            there = of_fold | self._prediction_files.keys()
            self._label_files = {case_id: files for case_id, files in self._label_files.items() if case_id in there}
        self.case_ids: tuple[str, ...] = tuple(
            case_id for case_id, files in sorted(self._label_files.items()) if len(files) == 1 == len(self._prediction_files.get(case_id, ()))
        )
        """Cases with one label and one prediction, sorted."""
        if not self._label_files.keys() & self._prediction_files.keys():
            self._nothing_in_common()

    @property
    def num_classes(self) -> int:
        """Number of channels C of ``probs``.

        Raises:
            ValueError: If it was not given and no prediction can be read.
        """
        if self._known is None:
            first: DataProblems | None = None
            for case_id in self.case_ids:
                try:
                    self._known = self._classes(self._plan(case_id).layout.channels)
                    break
                except DataProblems as error:
                    first = first or error
            else:
                raise first or ValueError(f"{self.predictions}: holds no prediction to tell the number of classes from. Give `num_classes`.")
        return self._known

    def __len__(self) -> int:
        return len(self.case_ids)

    def __iter__(self) -> Iterator[PredictedCase]:
        return (self[case_id] for case_id in self.case_ids)

    def __getitem__(self, case: int | str) -> PredictedCase:
        """Read one case, by its number in ``case_ids`` or its name.

        Raises:
            IndexError: If there is no case of this number.
            KeyError: If there is none of this name.
            DataProblems: (a ``ValueError``, one line) If a file is damaged, a value is out of range, probabilities do not sum to 1, or labels are not
                classes.
        """
        case_id = case if isinstance(case, str) else self.case_ids[case]
        plan = self._plan(case_id, self.num_classes)
        label = self._reference(plan, _read(plan, plan.label))
        probs = self._probs(plan, _read(plan, plan.prediction), label)
        dims = len(plan.spatial)
        spacing = None if plan.label.spacing is None else plan.label.spacing[:dims]
        planes = plane_names(plan.label.affine) if plan.label.affine is not None and dims == 3 else ()
        return PredictedCase(case_id, probs, label, spacing, planes)

    def problems(self) -> list[PredictionProblem]:
        """What can be seen without reading the values.

        That is files that are missing, that have no label, of which there are two, whose header is damaged, that hold no probabilities, or that do not
        fit the label's shape, classes or place in space.

        Returns:
            The problems, at most one per case, sorted by case. Reading a case that has none may still find that values are wrong.
        """
        found = []
        try:
            num_classes: int | None = self.num_classes
        except ValueError:
            num_classes = None
        for case_id in sorted(self._label_files.keys() | self._prediction_files.keys()):
            labels, predictions = self._label_files.get(case_id, []), self._prediction_files.get(case_id, [])
            try:
                if not labels:
                    _fail(case_id, predictions[0], "extra", f"has no label in {self.labels} and is left out. Add its label.")
                if not predictions:
                    _fail(case_id, labels[0], "missing", f"has no prediction in {self.predictions}. Predict it, or take the label away.")
                for files, option in ((labels, "label_suffix"), (predictions, "prediction_suffix")):
                    if len(files) > 1:
                        names = " and ".join(file.name for file in files)
                        _fail(case_id, files[0], "ambiguous", f"is in more than one file ({names}). Keep one, or choose by `{option}`.")
                _check_place(self._plan(case_id, num_classes))
            except DataProblems as error:
                found += [problem for problem in error.problems if isinstance(problem, PredictionProblem)]
        return found

    def image(self, case_id: str) -> NDArray[np.float32] | None:
        """The image to show beside a case, ``(*spatial)`` on the label's grid: the first channel of a volume, the grey values of a photograph.

        Returns:
            The image, or ``None`` if there is none for the case.

        Raises:
            DataProblems: (a ``ValueError``) If it cannot be read or has another shape than the label.
        """
        if self._card_labels:
            return self._card_labels.picture(case_id)
        if self.images is None:
            return None
        files = {_image_stem(path): path for path in visible_files(self.images)}
        path = files.get(case_id) or files.get(f"{case_id}_0000")
        if path is None:
            return None
        plan = self._plan(case_id, self._known)
        try:
            values = _grey(path)
        except Exception as error:
            _fail(case_id, path, "unreadable", f"cannot be read ({one_line(error)}). Copy it again.", error)
        if values.ndim == len(plan.spatial) + 1:
            values = values[..., 0]
        if values.shape != plan.spatial:
            _fail(case_id, path, "shape", f"has an image of shape {values.shape}, but a label of {plan.spatial}. Put them on one grid.")
        return values

    # Options and files

    def _known_classes(self, num_classes: int | None) -> int | None:
        sources = {
            "num_classes": num_classes,
            "regions": len(self.regions) if self.regions else None,
            "dataset.json": len(self.class_names) if self.class_names else None,
            "label_values": len(self.label_values) if self.label_values and self.activation == "softmax" else None,
        }
        known = {name: count for name, count in sources.items() if count is not None}
        if len(set(known.values())) > 1:
            raise ValueError(f"Expected one number of classes, but got {', '.join(f'{count} from {name}' for name, count in known.items())}.")
        return next(iter(known.values()), None)

    def _check_options(self) -> None:
        if self.regions and self.activation == "softmax":
            raise ValueError(f"Expected activation='sigmoid' for the overlapping regions {self.class_names}, but got 'softmax'.")
        if self.regions and self.label_values:
            raise ValueError("`label_values` cannot act together with `regions`, which already say which labels they are made of.")
        if self.label_values and self.activation == "sigmoid" and len(self.label_values) != 2:
            raise ValueError(f"Expected two `label_values` under sigmoid, outside and inside of the region, but got {list(self.label_values)}.")
        if self.activation == "softmax" and self._known == 1:
            raise ValueError("Expected at least 2 classes under softmax, but got num_classes=1. One foreground channel makes num_classes=2.")
        if self.activation == "sigmoid" and 0 <= self.ignore_index <= 1:
            raise ValueError(f"Expected `ignore_index` other than the 0 and 1 of a region, but got {self.ignore_index}.")

    def _match(self, prediction_suffix: str | None, label_suffix: str) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
        same = self._card_labels is None and self.predictions.resolve() == self.labels.resolve()
        if same and not (prediction_suffix or label_suffix):
            raise ValueError(f"{self.predictions} holds predictions and labels. Tell them apart by `prediction_suffix` or `label_suffix`.")
        labels: dict[str, list[Path]] = defaultdict(list)
        if self._card_labels:
            labels |= {case_id: [path] for case_id, path in self._card_labels.files.items()}
        for path in visible_files(self.labels) if self._card_labels is None else []:
            if same and prediction_suffix and not label_suffix and (file_stem(path) or "").endswith(prediction_suffix):
                continue
            if (stem := file_stem(path)) and stem.endswith(label_suffix) and (case_id := stem.removesuffix(label_suffix)):
                labels[case_id].append(path)
        taken = {path.resolve() for files in labels.values() for path in files} if same else set()
        stems = {path: stem for path in visible_files(self.predictions) if path.resolve() not in taken and (stem := file_stem(path))}
        affixes = AFFIXES if prediction_suffix is None else (prediction_suffix,)
        predictions: dict[str, list[Path]] = defaultdict(list)
        for path, stem in stems.items():
            bare = next((stem.removesuffix(affix) for affix in affixes if affix and stem.endswith(affix) and stem != affix), stem)
            if prediction_suffix and bare == stem:
                continue
            predictions[stem if stem in labels and not prediction_suffix else bare].append(path)
        for stem in [stem for stem in predictions if stem not in labels]:
            companion = COMPANION.fullmatch(stem)
            if companion and f"{companion[1]}_probs" in stems.values():
                del predictions[stem]
        return labels, {case_id: files if len(files) == 1 else best_files(files) for case_id, files in predictions.items()}

    def _nothing_in_common(self) -> NoReturn:
        names = [next((files[0].name for _, files in sorted(found.items())), None) for found in (self._prediction_files, self._label_files)]
        for folder, name, what in ((self.predictions, names[0], "predictions"), (self.labels, names[1], "labels")):
            if name is None:
                raise ValueError(f"{folder}: found no {what}. Expected .npz, .npy, .safetensors, .nii.gz, .nii, .png or .tif files, one per case.")
        raise ValueError(
            f"No case has both a prediction and a label: {self.predictions} holds {names[0]} for example, {self.labels} holds {names[1]}. "
            "Give what follows the case in their names as `prediction_suffix` and `label_suffix`."
        )

    def _open_label(self, case_id: str, path: Path) -> ArrayFile:
        return _open(case_id, path, self._card_labels.open if self._card_labels else open_array)

    # From files to one case

    def _classes(self, channels: int | None) -> int:
        """Number of classes of a prediction with so many channels (``None``: no class axis)."""
        return 2 if self.activation == "softmax" and channels in (None, 1) else channels or 1

    def _plan(self, case_id: str, num_classes: int | None = None) -> _Plan:
        """Read both headers and settle the order of axes."""
        if case_id not in self._label_files or case_id not in self._prediction_files or case_id not in self.case_ids:
            raise KeyError(f"{case_id!r} is not a case with one prediction and one label.")
        (prediction_path,), (label_path,) = self._prediction_files[case_id], self._label_files[case_id]
        prediction, label = _open(case_id, prediction_path, lambda path: open_array(path, PROBABILITY_KEYS)), self._open_label(case_id, label_path)
        turn = _to_label(label) if self._reorients and is_nnunet(prediction) and label.format == "nifti" and len(label.shape) >= 3 else None
        for soft, spatial in self._readings(prediction, label):
            layouts = self._layouts(prediction, label, spatial, turn)
            if layouts and (not soft or label.shape[-1 if label.format == "nifti" else 0] == self._classes(layouts[0].channels)):
                break
        else:
            self._does_not_fit(case_id, prediction, label)
        self._check_kinds(case_id, prediction, label, layouts[0].channels, soft)
        layout, *others = layouts
        if num_classes is not None and self._classes(layout.channels) != num_classes:
            source = f"`num_classes` or {self.case_ids[0]!r} says" if self.class_names is None else f"{list(self.class_names)} says"
            count = self._classes(layout.channels)
            _fail(case_id, prediction.path, "shape", f"has {count} classes, but {source} {num_classes}. Mend `num_classes`, or the file.")
        if others:
            orders = ", ".join(f"axes={fitting.order}" for fitting in layouts)
            _fail(
                case_id,
                prediction.path,
                "shape",
                f"has the shape {prediction.shape}, which fits the label's {spatial} in more than one order. Say which it is: {orders}.",
            )
        return _Plan(case_id, prediction, label, layout, spatial, soft, turn)

    def _readings(self, prediction: ArrayFile, label: ArrayFile) -> list[tuple[bool, tuple[int, ...]]]:
        """Whether the label has one channel per class, and its spatial shape; the first that fits is taken."""
        shape = label.shape
        if label.format == "nifti":
            shape = (*shape[:3], shape[4]) if len(shape) == 5 and shape[3] == 1 else shape
            return [(len(shape) == 4 and (shape[3] > 1 or self._soft), shape[:3])]
        readings = [(False, shape)]
        same_rank = len(prediction.shape) == len(shape) or is_nnunet(prediction)
        if len(shape) > 2 and same_rank and (not label.integer or self.activation == "sigmoid"):
            readings.insert(0, (True, shape[1:]))
        if shape[0] == 1:
            readings.append((False, shape[1:]))  # a label map with a channel axis
        return readings

    def _layouts(self, prediction: ArrayFile, label: ArrayFile, spatial: tuple[int, ...], turn: NDArray[Any] | None) -> list[_Layout]:
        """The orders of axes in which a prediction fits the label, those alike but once."""
        dims, shape = len(spatial), prediction.shape
        drop: tuple[int, ...] = ()
        if len(shape) == dims + 2:  # one axis too many: NIfTI's unused fourth, the depth of nnU-Net's 2D images, or a batch of one
            axis = dims if prediction.format == "nifti" else 1 if is_nnunet(prediction) or self.axes == "nnunet" else 0
            drop = (axis,) if shape[axis] == 1 else ()
        kept = tuple(size for axis, size in enumerate(shape) if axis not in drop)
        has_channel = len(kept) == dims + 1
        if not has_channel and len(kept) != dims:
            return []
        forward = tuple(range(dims))
        found: dict[tuple[int, ...], _Layout] = {}
        for order in self._orders(prediction, label):
            axes = forward[::-1] if order == "nnunet" else forward
            target = spatial
            if order == "nnunet" and turn is not None:
                target = tuple(spatial[int(axis)] for axis in nib.io_orientation(label.affine)[:, 0].argsort())  # the shape in RAS
            if has_channel:
                channel = dims if order == "channels_last" else 0
                axes = (channel, *(axis + (channel == 0) for axis in axes))
            if tuple(kept[axis] for axis in axes[-dims:]) == target:
                found.setdefault(axes, _Layout(drop, axes, kept[axes[0]] if has_channel else None, order))
        return list(found.values())

    def _orders(self, prediction: ArrayFile, label: ArrayFile) -> tuple[str, ...]:
        if self.axes == "nnunet" and label.format == "image":
            return ("channels_first",)  # images have their rows first in both
        if self.axes != "auto":
            return (self.axes,)
        if is_nnunet(prediction):
            return {"nifti": ("nnunet",), "image": ("channels_first",)}.get(label.format, ("channels_first", "nnunet"))
        if prediction.format in ("nifti", "image"):
            return ("channels_last",) if prediction.format == "nifti" else ("channels_first",)
        return ("channels_first", "channels_last", *(("nnunet",) if label.format == "nifti" else ()))

    def _does_not_fit(self, case_id: str, prediction: ArrayFile, label: ArrayFile) -> NoReturn:
        orders = " or ".join(self._orders(prediction, label))
        hint = "Save the probabilities on the label's grid, or set `axes` if their order is another."
        if is_nnunet(prediction) and prediction.key == "softmax":
            hint = "nnU-Net v1 saves the box it cropped to, whose place is in the .pkl file alone: paste the box back into the whole volume."
        _fail(
            case_id,
            prediction.path,
            "shape",
            f"has the shape {prediction.shape}, which does not fit the shape {label.shape} of its label {label.path.name} (order of axes: {orders}). {hint}",
        )

    def _check_kinds(self, case_id: str, prediction: ArrayFile, label: ArrayFile, channels: int | None, soft: bool) -> None:
        of_image = prediction.format == "image" and (prediction.palette or prediction.dtype in ("bool", "int32"))
        if of_image or (prediction.format != "image" and prediction.integer and channels in (None, 1)):
            _fail(case_id, prediction.path, "hard", f"is a hard label map, which tells no probabilities. {_SAVE_PROBABILITIES}")
        if self.activation == "sigmoid" and not soft and not self.regions and self._classes(channels) > 1:
            _fail(
                case_id,
                label.path,
                "shape",
                f"has one label map for {channels} regions. Say by `regions` which labels make up each, or save one 0/1 map per region, (C, *spatial).",
            )

    # From stored values to tensors

    def _probs(self, plan: _Plan, values: NDArray[Any], label: Tensor) -> Tensor:
        def fail(message: str, kind: Kind = "values") -> NoReturn:
            _fail(plan.case_id, plan.prediction.path, kind, message)

        layout = plan.layout
        scale = np.iinfo(plan.prediction.dtype).max if plan.prediction.format == "image" and plan.prediction.integer else 1
        values = np.squeeze(values, layout.drop).transpose(layout.axes)
        values = values if layout.channels is not None else values[None]
        if plan.turn is not None and layout.order == "nnunet":
            values = np.moveaxis(nib.apply_orientation(np.moveaxis(values, 0, -1), plan.turn), -1, 0)
        values = np.array(values, dtype=np.float32, order="C")  # (C, *spatial), a copy
        if scale > 1:
            values /= scale
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low + high):
            bad = values.size - int(np.isfinite(values).sum())
            fail(f"holds {bad} NaN or infinite value(s). Look for them in the model's output.")
        single, exclusive = len(values) == 1, self.activation == "softmax"
        if self.from_logits:
            if low >= 0 and low < high <= 1 and (single or not exclusive or float(np.abs(values.sum(0) - 1).max()) <= _SUM):
                fail(
                    f"holds values in [0, 1]{'' if single or not exclusive else ' that sum to 1'}: probabilities, not logits. Set from_logits=false."
                )
            probs = probabilities(torch.from_numpy(values)[None], "sigmoid" if single else self.activation)[0]
        else:
            if single and _is_hard(values, scale, label):
                fail(f"holds whole numbers only: a hard label map, which tells no probabilities. {_SAVE_PROBABILITIES}", "hard")
            if low < -_WHOLE or high > 1 + _WHOLE:
                fail(
                    f"holds values from {low:.4g} to {high:.4g}, not probabilities in [0, 1]. Set from_logits=true if they are logits, or scale them."
                )
            if exclusive and not single:
                step = 0.5 * len(values) / scale if scale > 1 else 0.0  # by which rounding to 8 or 16 bits may change a sum
                _check_sums(values, max(_SUM, step), is_nnunet(plan.prediction), fail)
                if scale > 1:
                    values /= values.sum(0)
            probs = torch.from_numpy(values).clamp_(0, 1)
        return torch.cat([1 - probs, probs]) if single and exclusive else probs

    def _reference(self, plan: _Plan, values: NDArray[Any]) -> Tensor:
        def fail(message: str) -> NoReturn:
            _fail(plan.case_id, plan.label.path, "values", message)

        if plan.soft:
            values = values.reshape(*plan.spatial, -1) if plan.label.format == "nifti" else values
            return self._shares(np.moveaxis(values, -1, 0) if plan.label.format == "nifti" else values, fail)
        values = values.reshape(plan.spatial)
        if not plan.label.integer:
            whole = np.rint(values)
            if fractional := int((~(np.abs(values - whole) <= _WHOLE)).sum()):  # NaN compares as false
                fail(f"holds {fractional} label(s) that are not whole numbers. Resample labels with nearest neighbour.")
            values = whole
        label = values.astype(np.int64)
        ignored = label == self.ignore_index
        if self.regions:
            self._check_labels(label, ignored, sorted({*self._outside}.union(*self.regions)), fail)
            parts = np.stack([np.isin(label, part) for part in self.regions]).astype(np.int32)
            parts[:, ignored] = self.ignore_index
            return torch.from_numpy(parts)
        allowed = self.label_values or range(self.num_classes if self.activation == "softmax" else 2)
        self._check_labels(label, ignored, allowed, fail)
        if self.label_values:
            order = np.argsort(self.label_values)
            label = order[np.searchsorted(self.label_values, label, sorter=order).clip(max=len(order) - 1)]
            label[ignored] = self.ignore_index
        result = torch.from_numpy(label)
        return result if self.activation == "softmax" else result[None].int()

    def _check_labels(self, label: NDArray[np.int64], ignored: NDArray[np.bool_], allowed: Sequence[int], fail: Callable[[str], NoReturn]) -> None:
        outside = label[~(ignored | np.isin(label, allowed))]
        if outside.size:
            found = ", ".join(f"{v} ({n} voxels)" for v, n in zip(*np.unique(outside, return_counts=True), strict=True))
            wanted = f"0 to {allowed[-1]}" if tuple(allowed) == tuple(range(len(allowed))) else ", ".join(map(str, allowed))
            fail(
                f"has labels other than the classes {wanted} and ignore_index={self.ignore_index}: {found}. "
                "Set `ignore_index` if they mark voxels without a class, or `label_values` to the value of each class."
            )

    def _shares(self, values: NDArray[Any], fail: Callable[[str], NoReturn]) -> Tensor:
        if self.activation == "sigmoid" and values.dtype.kind in "biu":
            shares = np.array(values, dtype=np.int32, order="C")
        else:
            shares = np.array(values, dtype=np.float32, order="C")
        if bad := int(shares.size - np.isfinite(shares).sum()):
            fail(f"holds {bad} NaN or infinite value(s). Replace them by shares, or by ignore_index={self.ignore_index}.")
        ignored = (shares == self.ignore_index).any(0)
        counted = shares[:, ~ignored]
        low, high = (float(counted.min()), float(counted.max())) if counted.size else (0.0, 0.0)
        if low < -_WHOLE or high > 1 + _WHOLE:
            fail(f"expected shares in [0, 1] or ignore_index={self.ignore_index}, but got {low:.4g} to {high:.4g}.")
        if self.activation == "softmax":
            total = counted.sum(0)
            if wrong := int(((total > _SUM) & (np.abs(total - 1) > _SUM)).sum()):
                fail(f"expected shares that sum to 1 (or to 0 where there is no label), but {wrong} voxel(s) do not. Divide by their sum.")
        return torch.from_numpy(shares)


def visible_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())


def best_files(files: Sequence[Path]) -> list[Path]:
    """Of several files of one case those most sure to hold probabilities."""
    ranks = {path: _rank(path) for path in files}
    return [path for path in files if ranks[path] == min(ranks.values())]


def _rank(path: Path) -> int:
    name = path.name.lower()
    if name.endswith((".npz", ".npy", ".safetensors")):
        return 0
    if not name.endswith((".nii", ".nii.gz")):
        return 2
    try:
        file = open_array(path)
    except Exception:
        return 1  # said by `problems` if nothing better is there
    return 0 if len(file.shape) > 3 and file.shape[-1] > 1 else 3 if file.integer else 1


def _open(case_id: str, path: Path, opener: Callable[[Path], ArrayFile]) -> ArrayFile:
    try:
        file = opener(path)
    except MemoryError:
        raise
    except Exception as error:
        _fail(case_id, path, "unreadable", f"cannot be read ({one_line(error)}). Save or copy it again.", error)
    if not file.shape or min(file.shape) < 1:
        _fail(case_id, path, "unreadable", f"holds nothing: its shape is {file.shape}. Save or copy it again.")
    return file


def _read(plan: _Plan, file: ArrayFile) -> NDArray[Any]:
    try:
        return file.read()
    except MemoryError:
        raise
    except Exception as error:
        _fail(plan.case_id, file.path, "unreadable", f"cannot be read to its end ({one_line(error)}). Save or copy it again.", error)


def _fail(case_id: str, path: Path, kind: Kind, message: str, cause: Exception | None = None) -> NoReturn:
    raise DataProblems([PredictionProblem(case_id, path, message, kind)]) from cause


def is_nnunet(file: ArrayFile) -> bool:
    return file.format == "npz" and file.key in _NNUNET_KEYS


def _to_label(label: ArrayFile) -> NDArray[Any]:
    """From RAS to the orientation in which a label is stored."""
    return nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.io_orientation(label.affine))


def _check_place(plan: _Plan) -> None:
    prediction, label = plan.prediction, plan.label
    if prediction.affine is None or label.affine is None or label.spacing is None:
        return
    shift = corner_shift((*plan.spatial, 1)[:3], prediction.affine, label.affine)
    if not shift <= _SHIFT * min(label.spacing):  # NaN is out of place, too
        _fail(
            plan.case_id,
            prediction.path,
            "place",
            f"lies elsewhere in space than its label {label.path.name}: the affines differ by up to {shift:.3g} mm. Turn it to the label's orientation, "
            "or copy the right affine into its header.",
        )


def _is_hard(values: NDArray[np.float32], scale: int, label: Tensor) -> bool:
    """Whether a map of the foreground's probability is really a label map.

    It is if it holds only 0 and 1 or, of 8 or 16 bits, only 0 and the smallest step, that mostly where the label is. A low probability everywhere is
    rounded to the smallest step, too, so the steps alone do not tell.
    """
    low, high = float(values.min()), float(values.max())
    if low == 0 and high >= 1 and np.array_equal(values, np.rint(values)):
        return True
    if scale > 1 and low == 0 and high == np.float32(1) / np.float32(scale):
        marked = torch.from_numpy(values[0] > 0)
        truth = (label if label.ndim == marked.ndim else label[-1]) > 0
        return float(truth[marked].float().mean()) > 0.5
    return False


def _check_sums(values: NDArray[np.float32], tolerance: float, fill: bool, fail: Callable[[str], NoReturn]) -> None:
    """Check that probabilities sum to 1 over classes; ``fill``: where all are 0, make it background, in place."""
    total = values.sum(0)
    if fill and not total.all():
        values[0][total == 0] = 1
        total[total == 0] = 1
    off = np.abs(total - 1)
    if float(off.max()) > tolerance:
        worst = float(total.flat[int(off.argmax())])
        count = int((off > tolerance).sum())
        fail(
            f"holds probabilities that do not sum to 1 over the classes: {count} of {off.size} voxels, the worst sum is {worst:.4g}. "
            "Set activation=sigmoid for regions that overlap, from_logits=true for logits, or `axes` if the class axis is another one."
        )


def _image_stem(path: Path) -> str | None:
    return path.name[: -len(path.suffix)] if path.suffix.lower() in (".jpg", ".jpeg") else file_stem(path)


def _grey(path: Path) -> NDArray[np.float32]:
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        return np.array(open_array(path).read(), dtype=np.float32)
    from PIL import Image

    with Image.open(path) as image:
        grey = image if image.mode in ("F", "I") or image.mode.startswith("I;16") else image.convert("L")
        return np.array(grey, dtype=np.float32)
