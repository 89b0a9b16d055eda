"""The card of a data set: what its files mean, how they are split, and how to train on them."""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from numpy.typing import NDArray
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from densecal.checks import check_choice, check_non_negative, check_positive
from densecal.files import name_in_file
from densecal.labels import DEFAULT_IGNORE_INDEX, LabelSchema
from densecal.registry import near_matches
from densecal.resources import cards_dir

__all__ = ["Augmentation", "DataCard", "card_names", "list_cards", "load_card", "override_card", "resolve_root"]

LAYOUTS = ("decathlon", "nnunet", "paired")
RATER_FUSIONS = ("mean", "majority", "staple", "random", "all")
NORMALISATIONS = {3: ("zscore", "zscore_nonzero", "percentile", "none"), 2: ("imagenet", "zscore", "percentile", "none")}
"""By the number of spatial dims."""
LABEL_ENCODINGS = ("index", "color")
PREPARERS = ("mni152",)
SPLITS = ("train", "val", "test")

STANDARD_PIPELINE: dict[str, dict[str, Any]] = {
    "RandomScale": {"scale_limit": [-0.5, 1.0], "p": 1.0},
    "RandomCrop": {"pad_if_needed": True},
    "HorizontalFlip": {"p": 0.5},
    "ColorJitter": {"brightness": [0.5, 1.5], "contrast": [0.5, 1.5], "saturation": [0.5, 1.5], "hue": [-0.07, 0.07], "p": 0.5},
}
"""Training on natural images as it is customary: resized to 0.5 to 2 times, cropped, mirrored, with other colours."""

_LABEL_FILES = ["labels/{id}.*"]
_VOLUMES_ONLY = ("orientation", "spacing", "augmentation", "decathlon_task", "prepare", "download")
_IMAGES_ONLY = ("label_encoding", "label_values", "ignore_values", "ignore_colors", "color_tolerance", "exif", "pipeline")


@dataclass
class Augmentation:
    """How strongly the training patches of volumes are varied. A probability of 0 leaves a step out.

    Args:
        affine_probability: Share of the patches that are rotated and scaled.
        rotate: Largest rotation about each axis, in degrees.
        scale: Largest change of size along each axis; 0.1 means 0.9 to 1.1 times.
        flip_axes: Spatial axes that may be mirrored, each with probability 0.5. Leave out left-right where the classes tell the sides apart.
        contrast_probability: Share of the patches with another gamma.
        contrast: Range of gamma, ``[low, high]``; 1 changes nothing.
        noise_probability: Share of the patches with Gaussian noise.
        noise: Largest standard deviation of the noise, in units of the normalised image.
        bias_probability: Share of the patches multiplied by a smooth field, as MR coils do.
        bias: Largest coefficient of the field's polynomials, in log intensity.
    """

    affine_probability: float = 0.5
    rotate: float = 15.0
    scale: float = 0.1
    flip_axes: list[int] = field(default_factory=list)
    contrast_probability: float = 0.3
    contrast: list[float] = field(default_factory=lambda: [0.7, 1.5])
    noise_probability: float = 0.15
    noise: float = 0.1
    bias_probability: float = 0.15
    bias: float = 0.2

    def __post_init__(self) -> None:
        for name in ("affine_probability", "contrast_probability", "noise_probability", "bias_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Expected `augmentation.{name}` in [0, 1], but got {getattr(self, name)}.")
        for name in ("rotate", "scale", "noise", "bias"):
            check_non_negative(f"augmentation.{name}", getattr(self, name))
        if self.scale >= 1:
            raise ValueError(f"Expected `augmentation.scale` below 1, but got {self.scale}.")
        if len(self.contrast) != 2 or not 0 < self.contrast[0] <= self.contrast[1]:
            raise ValueError(f"Expected `augmentation.contrast` to be [low, high] with 0 < low <= high, but got {list(self.contrast)}.")


@dataclass
class DataCard:
    """Everything ``data=<card>`` brings; each entry can be set on the command line as ``data.<key>=``.

    Args:
        name: Name of the data set, as in ``data=<name>``.
        classes: Class names; class ``c`` of a label file is ``classes[c]``.
        aliases: Other names that ``data=`` accepts.
        description: One sentence.
        folder: Folder of the set below ``$DENSECAL_DATA``.
        root: Folder of the set itself; wins over ``folder``.
        test_root: Folder of a second set in the same layout. The trained model is evaluated on all its cases instead of on the test split.
        layout: ``"decathlon"`` (dataset.json, imagesTr, labelsTr), ``"nnunet"`` (its raw layout: ``imagesTr/<id>_0000.nii.gz``, a file for each channel, and
            ``labelsTr``; volumes only) or ``"paired"`` (images and labels by patterns).
        image_files: Where the images of a paired set lie, relative to its folder: a path with ``{id}`` for the name of the case, maybe ``{subject}`` for a folder of a
            person, place or film (names need to differ only within it, and a drawn split never cuts through it), ``{split}`` for the set's own name of a split, ``*``
            for any part of a name, ``**`` for any folders, and ``.*`` for any ending of an image.
        label_files: The same for the labels; of several patterns the first that finds a file counts. An absolute pattern may lie elsewhere.
        rater_files: Instead of ``label_files``, the label maps of several raters: patterns with ``{id}`` and ``{rater}``, the name of the rater; of several patterns the
            first that finds a file of a case and rater counts. The number of raters may differ from case to case, see ``missing_raters``.
        raters: Names of the raters to use; empty for all whose files there are.
        rater_fusion: What training makes of several raters. ``"mean"``: soft labels, the share of the raters who chose each class; ``"majority"``: the class that most
            chose, of tied ones that with the lowest number; ``"staple"``: STAPLE, computed by SimpleITK (extra ``raters``); ``"random"``: each patch has the labels of one
            rater, drawn by the seed of the patch; ``"all"``: the majority, and every rater's map in the batch as ``rater_labels`` ``(N, R, *spatial)``, ``ignore_index``
            where a rater has not rated, for targets that need it. Validation and tests use the mean whatever this is.
        missing_raters: Whether cases may lack some of the raters; else every one that is missing is a problem.
        case_lists: Text files with a case in the first word of each line, a path with ``{split}``. The word is the name of the case, or the path of its image, whose
            folders may have been moved. ``None``: the cases are the files that there are.
        split_names: What the set calls the splits that make up ours, as in ``{train: [train, extra], test: [val]}``. A side without a name (or with an empty list) is
            drawn from the training subjects by its fraction; where nothing is named, all are.
        exclude: Case ids to leave out, of files known to be broken for instance.
        regions: Regions to train on instead of the classes, as in ``{whole: [oedema, core], core: [core]}``: the classes, by name or number, that make up each. They
            may overlap; a single one, ``{car: [car]}``, is one class against the rest. A network has a channel for each, under a sigmoid.
        background: Class left out of foreground means, or ``None``. Where there are regions, all of them count.
        ignore_index: Label of pixels without a class; padding gets it too.
        label_encoding: ``"index"``, numbers in grey or palette files, or ``"color"``, the colours of ``palette``. Images only.
        label_values: For each class what stands for it in the files: a number, a range such as ``"128-255"``, or a list of them. Empty where the numbers are the
            classes themselves. Images only.
        ignore_values: Numbers and ranges besides ``ignore_index`` that stand for no class. Images only.
        ignore_colors: Colours that stand for no class. Images only.
        color_tolerance: Largest difference of red, green and blue from the colour that is meant; below half the distance of any two colours. Images only.
        palette: One ``[red, green, blue]`` of 0 to 255 per class; empty for the default.
        soft_labels: Whether label files hold one share per class, ``(X, Y, Z, C)`` floats that sum to 1 (all 0 where there is no label). Of images they are ``.npy`` or
            ``.npz`` files ``(H, W, C)`` or, for two classes, grey files whose brightness is the share of the second.
        image_channels: Number of image channels. More than one are stored as the fourth axis of a volume, or (``nnunet``) in a file each; those of an image are 1 or 3.
        exif: What the orientation that a camera stored in an image does: ``"apply"`` turns the image as viewers show it, ``"ignore"`` keeps the pixels as stored.
            Labels are never turned. Images only.
        modality: For the report, "MRI T1" for example.
        subject_pattern: Regular expression whose first group is the person in a case id. The default makes each case its own subject.
        subject_size: Cases per person where they are numbered in turn: with 2, numbers 2k-1 and 2k are one person.
        val_fraction: Share of the subjects for validation.
        test_fraction: Share of the subjects for testing.
        train_fraction: Share of the training subjects to train on, in (0, 1]: what would fewer data do? Smaller shares are parts of larger ones, and validation and test
            cases stay as they are.
        split_seed: Draws the split; independent of the training seed.
        num_folds: Cross-validation: the subjects are divided into so many folds by ``split_seed``, and those of ``fold`` are the test split instead of a share of
            ``test_fraction``. Every case is tested on in exactly one fold. ``None`` for a single split.
        fold: The fold to test on, counted from 0. ``-m data.num_folds=5 data.fold=0,1,2,3,4`` trains all five.
        held_out_fold: A fold that is in no split at all, so that methods can be chosen on the others without anybody having looked at it. It is tested on, once, with
            ``fold`` at its number and this at ``None``.
        splits: Case ids of ``train``, ``val`` and ``test``; where given, nothing is drawn.
        orientation: Axis codes such as ``"RAS"`` to turn every volume to, or ``None`` to keep its axes. Volumes only.
        spacing: Voxel size to resample to, in mm per axis, or ``None`` to keep it. Volumes only.
        normalisation: ``"zscore"`` over all pixels, ``"zscore_nonzero"`` over the voxels other than 0, ``"percentile"`` (clip to the 0.5 and 99.5
            percentiles, then z-score), ``"imagenet"`` (the mean and standard deviation of ImageNet's colours, as pre-trained encoders expect) or ``"none"`` (images:
            scaled to [0, 1]); per channel, on the file as stored.
        patch_size: Pixels per axis that the network is trained on, after resampling: two numbers, rows and columns, make the set one of images, three one of volumes.
        samples_per_case: Patches drawn from each case in an epoch.
        foreground_fraction: Share of the patches centred on a foreground voxel, the others anywhere; ``None`` crops or pads the whole volume about its centre,
            with nothing random. Of images the pipeline says where patches lie.
        augment: Whether training patches are augmented.
        augmentation: How strongly. Volumes only.
        pipeline: Augmentation of images: albumentations transforms by name, in order, each with its arguments. What is not given is chosen to suit: the size of a crop is
            ``patch_size``, images are filled with their mean and labels with "no class", labels are resized to the nearest. The result must have the patch size.
            Empty: ``STANDARD_PIPELINE``. Without ``augment`` patches are cropped at random and nothing else. Images only.
        batch_size: Patches per step and process.
        num_workers: Loader processes; the batches do not depend on it.
        cache: Keep the loaded cases in memory (4 bytes per voxel and channel of volumes, as many as in the file for images, and 1 per label).
        epochs: Training length that suits the set.
        foreground_radius: The near-structure region of the metrics reaches this many pixels from the foreground.
        download: Fetch the set where its folder is missing (Decathlon tasks).
        decathlon_task: Task to download, "Task04_Hippocampus" for example.
        prepare: Built-in maker of the set from an installed package: "mni152".
        licence: Licence of the data.
        citation: What to cite.
        url: Home page of the set.
        how_to_get: What the user does to get it.
        notes: Sentences that the report prints beside the results.

    Raises:
        ValueError: If a value is outside its range, with the key and the repair.
    """

    name: str
    classes: list[str]
    aliases: list[str] = field(default_factory=list)
    description: str = ""
    folder: str = ""
    root: str | None = None
    test_root: str | None = None
    layout: str = "paired"
    image_files: str = "images/{id}.*"
    label_files: list[str] = field(default_factory=lambda: list(_LABEL_FILES))
    rater_files: list[str] = field(default_factory=list)
    raters: list[str] = field(default_factory=list)
    rater_fusion: str = "mean"
    missing_raters: bool = False
    case_lists: str | None = None
    split_names: dict[str, list[str]] = field(default_factory=dict)
    exclude: list[str] = field(default_factory=list)
    regions: dict[str, list[Any]] = field(default_factory=dict)
    background: int | None = 0
    ignore_index: int = DEFAULT_IGNORE_INDEX
    palette: list[list[int]] = field(default_factory=list)
    label_encoding: str = "index"
    label_values: list[Any] = field(default_factory=list)
    ignore_values: list[Any] = field(default_factory=list)
    ignore_colors: list[list[int]] = field(default_factory=list)
    color_tolerance: int = 0
    soft_labels: bool = False
    image_channels: int = 1
    exif: str = "apply"
    modality: str = ""
    subject_pattern: str | None = None
    subject_size: int = 1
    val_fraction: float = 0.15
    test_fraction: float = 0.25
    train_fraction: float = 1.0
    split_seed: int = 0
    num_folds: int | None = None
    fold: int | None = None
    held_out_fold: int | None = None
    splits: dict[str, list[str]] = field(default_factory=dict)
    orientation: str | None = None
    spacing: list[float] | None = None
    normalisation: str = "zscore"
    patch_size: list[int] = field(default_factory=lambda: [96, 96, 96])
    samples_per_case: int = 1
    foreground_fraction: float | None = 0.5
    augment: bool = True
    augmentation: Augmentation = field(default_factory=Augmentation)
    pipeline: dict[str, dict[str, Any]] = field(default_factory=dict)
    batch_size: int = 2
    num_workers: int = 2
    cache: bool = True
    epochs: int = 100
    foreground_radius: int = 3
    download: bool = False
    decathlon_task: str | None = None
    prepare: str | None = None
    licence: str = ""
    citation: list[str] = field(default_factory=list)
    url: str = ""
    how_to_get: str = ""
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("prepare", self.prepare, (*PREPARERS, None))
        check_choice("label_encoding", self.label_encoding, LABEL_ENCODINGS)
        check_choice("exif", self.exif, ("apply", "ignore"))
        check_choice("rater_fusion", self.rater_fusion, RATER_FUSIONS)
        for name in ("palette", "ignore_colors"):
            colors = getattr(self, name)
            if any(len(color) != 3 or not all(0 <= value <= 255 for value in color) for color in colors):
                raise ValueError(f"Expected each colour of `{name}` to be [red, green, blue] of 0 to 255, but got {colors}.")
        self.class_schema  # noqa: B018  (checks classes, background, ignore_index and palette)
        self._check_regions()
        dims = self.spatial_dims
        if dims not in (2, 3):
            raise ValueError(
                f"Expected `patch_size` to have 2 numbers for images or 3 for volumes, one per spatial axis, but got {list(self.patch_size)}."
            )
        check_choice("normalisation", self.normalisation, NORMALISATIONS[dims])
        self._check_raters()
        self._check_medium()
        for name in ("patch_size", "spacing"):
            values = getattr(self, name)
            if values is not None and (len(values) != dims or min(values) <= 0):
                raise ValueError(f"Expected `{name}` to have {dims} positive numbers, one per spatial axis, but got {list(values)}.")
        for axis in self.augmentation.flip_axes:
            check_choice("augmentation.flip_axes", axis, range(dims))
        for name in ("image_channels", "samples_per_case", "subject_size", "batch_size", "epochs"):
            check_positive(name, getattr(self, name))
        for name in ("num_workers", "foreground_radius", "val_fraction", "test_fraction", "color_tolerance"):
            check_non_negative(name, getattr(self, name))
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"Expected `train_fraction` in (0, 1], but got {self.train_fraction}.")
        self._check_folds()
        if self.num_folds is None and self.val_fraction + self.test_fraction >= 1:
            raise ValueError(f"Expected `val_fraction` + `test_fraction` below 1, but got {self.val_fraction} + {self.test_fraction}.")
        if self.foreground_fraction is not None and not 0 <= self.foreground_fraction <= 1:
            raise ValueError(f"Expected `foreground_fraction` in [0, 1] or null, but got {self.foreground_fraction}.")
        if self.orientation is not None and not re.fullmatch(r"(?=.*[LR])(?=.*[AP])(?=.*[IS])[LRAPIS]{3}", self.orientation):
            raise ValueError(f"Expected `orientation` to name each axis once, 'RAS' for example, but got {self.orientation!r}.")
        self._check_splits()
        if self.subject_pattern is not None:
            _check_pattern(self.subject_pattern)
        elif self.subject_size != 1:
            raise ValueError("`subject_size` needs `subject_pattern`: a regular expression whose first group is the number in the case id.")

    def _check_folds(self) -> None:
        given = [name for name in ("fold", "held_out_fold") if getattr(self, name) is not None]
        if self.num_folds is None and not given:
            return
        if self.num_folds is None or self.fold is None:
            needs, needed = ("num_folds", "fold") if self.num_folds is not None else (given[0], "num_folds")
            raise ValueError(f"`{needs}` needs `{needed}`: num_folds=5 fold=0 tests on the first of five folds.")
        if self.num_folds < 2:
            raise ValueError(f"Expected `num_folds` to be 2 or more, or null for a single split, but got {self.num_folds}.")
        for name in given:
            if not 0 <= (value := getattr(self, name)) < self.num_folds:
                raise ValueError(f"Expected `{name}` in 0 to {self.num_folds - 1}, as `num_folds` is {self.num_folds}, but got {value}.")
        if self.fold == self.held_out_fold:
            raise ValueError(
                f"Expected `fold` and `held_out_fold` to differ, but both are {self.fold}. To test on that fold, set held_out_fold to null."
            )
        rest = 1 - (1 if self.held_out_fold is None else 2) / self.num_folds
        if self.val_fraction >= rest:
            raise ValueError(f"Expected `val_fraction` below {rest:.3g}, the share outside a fold, but got {self.val_fraction}.")
        for name, value in (("splits", self.splits), ("split_names.test", self.split_names.get("test")), ("test_root", self.test_root)):
            if value:
                raise ValueError(f"`fold` and `{name}` both say what is tested on. Leave out one of them.")

    def _check_splits(self) -> None:
        for name in ("splits", "split_names"):
            for split in getattr(self, name):
                check_choice(name, split, SPLITS)
        self.split_names = {name: parts for name, parts in self.split_names.items() if parts}
        if self.layout != "paired":
            for name in ("split_names", "case_lists"):
                if getattr(self, name):
                    raise ValueError(f"`{name}` needs `layout` paired, but got {self.layout!r}. Its cases are listed in `splits`.")
            return
        key = "rater_files" if self.rater_files else "label_files"
        patterns = [self.image_files, *self.label_patterns]
        for pattern in patterns or [""]:
            if "{id}" not in pattern:
                raise ValueError(f"Expected `image_files` and `{key}` to hold {{id}}, the name of the case, but got {pattern!r}.")
        if len({"{subject}" in pattern for pattern in patterns}) > 1:
            raise ValueError(f"Expected {{subject}} in `image_files` and in every pattern of `{key}`, or in none of them, but got {patterns}.")
        if not self.label_files:
            raise ValueError("Expected `label_files` to hold at least one pattern, but got none.")
        if self.case_lists is not None and "{split}" in self.case_lists and not self.split_names:
            raise ValueError(
                f"`case_lists` {self.case_lists!r} needs `split_names`: what {{split}} stands for, as in {{train: [train], test: [test]}}."
            )
        if not self.split_names:
            return
        if not self.split_names.get("train"):
            raise ValueError(
                f"Expected `split_names` to say what to train on, as in {{train: [train], val: [val]}}, but got {dict(self.split_names)}."
            )
        if self.splits:
            raise ValueError("Expected `splits` or `split_names`, but got both. The first lists cases, the second names the set's own splits.")
        if not any("{split}" in path for path in (*patterns, self.case_lists or "")):
            raise ValueError(f"`split_names` needs {{split}} in `image_files`, `{key}` or `case_lists`: nothing else tells the splits apart.")
        for other in ("val", "test"):
            if both := set(self.split_names["train"]) & set(self.split_names.get(other, [])):
                raise ValueError(f"`split_names` trains on {sorted(both)[0]!r} and uses it as {other}, too. Leave it out of one of them.")

    def _check_raters(self) -> None:
        """Of several raters: that nothing else says what the labels are, and nothing is said of raters where there are none."""
        if not self.rater_files:
            for name in ("raters", "missing_raters"):
                if getattr(self, name):
                    raise ValueError(f"`{name}` needs `rater_files`: where the label maps of several raters lie.")
            if self.rater_fusion != "mean":
                raise ValueError(f"`rater_fusion` {self.rater_fusion} needs `rater_files`: where the label maps of several raters lie.")
            return
        for pattern in self.rater_files:
            if "{rater}" not in pattern:
                raise ValueError(f"Expected `rater_files` to hold {{rater}}, the name of the rater, but got {pattern!r}.")
        if self.layout != "paired":
            raise ValueError(f"`rater_files` needs `layout` paired, but got {self.layout!r}.")
        if self.soft_labels:
            raise ValueError(
                "Expected `rater_files` or `soft_labels`, but got both. Raters' files are label maps; `rater_fusion` mean makes shares of them."
            )
        if self.label_files != _LABEL_FILES:
            raise ValueError("Expected `rater_files` or `label_files`, but got both. `rater_fusion` says what becomes of several raters' labels.")

    def _check_medium(self) -> None:
        """Refuse what has no effect on a set of this kind, and fill in what depends on it."""
        images = self.spatial_dims == 2
        for spec in fields(self):
            default = spec.default_factory() if callable(spec.default_factory) else spec.default
            if spec.name in (_VOLUMES_ONLY if images else _IMAGES_ONLY) and getattr(self, spec.name) != default:
                kinds = ("volumes", "images") if images else ("images", "volumes")
                raise ValueError(
                    f"`{spec.name}` is for {kinds[0]}, but `patch_size` {list(self.patch_size)} says that these are {kinds[1]}. Leave one of them out."
                )
        if not images:
            return
        if self.image_channels not in (1, 3):
            raise ValueError(f"Expected `image_channels` to be 1 or 3 for images, but got {self.image_channels}.")
        if self.normalisation == "imagenet" and self.image_channels != 3:
            raise ValueError(
                "`normalisation` imagenet is for images of three channels. Choose zscore or none, or image_channels=3 to read grey images as colour."
            )
        if self.layout != "paired":
            raise ValueError(f"Expected `layout` to be 'paired' for images, but got {self.layout!r}.")
        self._check_label_files()
        if not self.pipeline:
            self.pipeline = copy.deepcopy(STANDARD_PIPELINE)

    def _check_label_files(self) -> None:
        """Of images: that every number or colour has one meaning."""
        numbers, colors = ("label_values", "ignore_values"), ("ignore_colors", "color_tolerance")
        form = "`soft_labels`" if self.soft_labels else f"`label_encoding` {self.label_encoding}"
        for name in (*numbers, *colors) if self.soft_labels else numbers if self.label_encoding == "color" else colors:
            if getattr(self, name):
                raise ValueError(f"`{name}` has no effect with {form}. Leave one of them out.")
        if self.soft_labels and self.label_encoding == "color":
            raise ValueError("Expected `soft_labels` or `label_encoding` color, but got both.")
        if self.label_values and len(self.label_values) != len(self.classes):
            raise ValueError(
                f"Expected `label_values` to have one entry for each of the {len(self.classes)} classes, but got {len(self.label_values)}."
            )
        self.class_of_number()
        if self.label_encoding == "color":
            if not self.palette:
                raise ValueError("`label_encoding` color needs `palette`: the colour of each class in the label files.")
            meanings = [(tuple(color), name) for color, name in zip(self.palette, self.classes, strict=True)]
            meanings += [(tuple(color), "no class") for color in self.ignore_colors]
            for (first, one), (second, other) in itertools.combinations(meanings, 2):
                distance = max(abs(a - b) for a, b in zip(first, second, strict=True))
                if distance <= 2 * self.color_tolerance and one != other:
                    raise ValueError(
                        f"The colours {first} of {one} and {second} of {other} are {distance} apart, so `color_tolerance` {self.color_tolerance} "
                        "cannot tell them apart. Give every class a colour of its own, and less than half their distance as the tolerance."
                    )

    def class_of_number(self) -> dict[int, int]:
        """What the numbers in label files stand for: a class, or -1 for none.

        Example:
            >>> DataCard("pets", ["background", "pet"], label_values=[2, 1], ignore_values=[3], patch_size=[64, 64]).class_of_number()
            {-100: -1, 3: -1, 2: 0, 1: 1}
        """
        meaning = {self.ignore_index: -1} | {number: -1 for entry in self.ignore_values for number in _numbers(entry)}
        for c, entry in enumerate(self.label_values or range(len(self.classes))):
            for number in _numbers(entry):
                if meaning.setdefault(number, c) != c:
                    names = [self.classes[i] if i >= 0 else "no class (`ignore_index` or `ignore_values`)" for i in (meaning[number], c)]
                    raise ValueError(f"Expected every number to have one meaning, but {number} in label files stands for {names[1]} and {names[0]}.")
        return meaning

    def _check_regions(self) -> None:
        for name, classes in self.regions.items():
            if not classes:
                raise ValueError(f"Expected `regions.{name}` to hold at least one of the classes {list(self.classes)}, but got none.")
            for entry in classes:
                if isinstance(entry, bool) or entry not in (*self.classes, *range(len(self.classes))):
                    near = near_matches(str(entry), self.classes)
                    raise ValueError(f"`regions.{name}`: no class {entry!r}. {near} Or give a number of 0 to {len(self.classes) - 1}.")
        for name, members in zip(self.regions, self._members(), strict=True):
            if len(set(members)) < len(members):
                raise ValueError(f"Expected every class of `regions.{name}` once, but got {list(self.regions[name])}.")
            if len(members) == len(self.classes):
                raise ValueError(f"Expected `regions.{name}` to leave a class outside, but got all of them.")
        if reserved := [name for name in self.regions if name.lower() in ("background", "ignore")]:
            raise ValueError(f"Expected names of `regions` other than {reserved[0]!r}, which means what is in none of them or not labelled.")
        files = [name_in_file(name) for name in self.regions]
        if len(set(files)) < len(files):
            raise ValueError(f"Expected names of `regions` that make different file names, but got {list(self.regions)}.")

    def _members(self) -> tuple[tuple[int, ...], ...]:
        """The classes of each region, by number."""
        return tuple(
            tuple(self.classes.index(entry) if isinstance(entry, str) else int(entry) for entry in classes) for classes in self.regions.values()
        )

    @property
    def label_patterns(self) -> list[str]:
        """Where labels lie: ``label_files``, or ``rater_files`` where there are several raters."""
        return self.rater_files or self.label_files

    @property
    def soft(self) -> bool:
        """Whether labels are shares once they are loaded."""
        return self.soft_labels or bool(self.rater_files and self.rater_fusion == "mean")

    def as_reference(self) -> DataCard:
        """The card by which labels are read as references to validate and test by: of several raters always the mean.

        Example:
            >>> card = DataCard("kidney", ["background", "kidney"], rater_files=["masks/{rater}/{id}.png"], rater_fusion="random", patch_size=[64, 64])
            >>> card.soft, card.as_reference().soft
            (False, True)
        """
        return replace(self, rater_fusion="mean") if self.rater_files else self

    @property
    def schema(self) -> LabelSchema:
        """Names, numbers and colours of what a network tells apart: the classes or, where there are such, the regions."""
        if not self.regions:
            return self.class_schema
        return LabelSchema(tuple(self.regions), self.ignore_index, None, activation="sigmoid", regions=self._members())

    @property
    def class_schema(self) -> LabelSchema:
        """Names, numbers and colours of the classes in label files, whatever is trained on."""
        return LabelSchema(tuple(self.classes), self.ignore_index, self.background, tuple((c[0], c[1], c[2]) for c in self.palette))

    @property
    def told_apart(self) -> str:
        """What a network tells apart, in words; the same for two data sets whose networks can stand in for each other.

        Example:
            >>> DataCard("mri", ["rest", "core", "oedema"], regions={"core": [1], "whole": ["core", "oedema"]}, patch_size=[64, 64]).told_apart
            "the regions {'core': ['core'], 'whole': ['core', 'oedema']}"
        """
        if not self.regions:
            return f"the classes {list(self.classes)}"
        return f"the regions {self.region_classes}"

    @property
    def region_classes(self) -> dict[str, list[str]]:
        """The names of the classes that make up each region; empty where there are none."""
        return {name: [self.classes[c] for c in members] for name, members in zip(self.regions, self._members(), strict=True)}

    @property
    def structure(self) -> tuple[int, ...]:
        """Classes that make up the structure before the background: all but that or, where there are regions, those in any of them."""
        return tuple(sorted({c for members in self._members() for c in members})) if self.regions else self.class_schema.foreground

    def region_counts(self, counts: Sequence[float] | NDArray[Any]) -> list[float]:
        """Numbers by class as numbers by what a network tells apart: of a region, the sum over its classes.

        Example:
            >>> card = DataCard("mri", ["rest", "core", "oedema"], regions={"core": [1], "whole": ["core", "oedema"]}, patch_size=[64, 64])
            >>> card.region_counts([90, 4, 6])
            [4.0, 10.0]
        """
        values = [float(count) for count in counts]
        return [sum(values[c] for c in members) for members in self._members()] if self.regions else values

    @property
    def spatial_dims(self) -> int:
        return len(self.patch_size)


def list_cards() -> list[str]:
    """Names of the cards that densecal brings, sorted.

    Example:
        >>> list_cards()
        ['camvid', 'cityscapes', 'deepglobe', 'duts', 'mni152', 'oxford_pets', 'pascal_voc', 'pascal_voc_aug', 'qubiq', 'salient_objects', 'task04_hippocampus']
    """
    return sorted(path.stem for path in cards_dir().glob("*.yaml"))


def card_names() -> list[str]:
    """What ``data=`` accepts: the names of the cards and their aliases, sorted."""
    return sorted({*list_cards(), *_aliases()})


def load_card(name: str | Path) -> DataCard:
    """A card by name, by alias, or from a YAML file of one's own.

    Args:
        name: A name that :func:`card_names` lists, or a path that ends in ``.yaml`` or ``.yml``.

    Raises:
        ValueError: Unknown name (naming the nearest), or a key, type or value in the file that a card cannot have.
        FileNotFoundError: If the path does not exist.

    Example:
        >>> load_card("hippocampus").name
        'task04_hippocampus'
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        names = {card: card for card in list_cards()} | _aliases()
        if str(name) not in names:
            raise ValueError(
                f"No data set card {str(name)!r}. {near_matches(str(name), names)} A card of your own is given as the path of its YAML file."
            )
        path = cards_dir() / f"{names[str(name)]}.yaml"
    elif not path.is_file():
        raise FileNotFoundError(f"No data set card {path}. datasets/README.md says how to write one.")
    content = _read_yaml(path)
    content.setdefault("name", path.stem)
    return _build(OmegaConf.structured(DataCard), content, f"{path}: ")


def override_card(card: DataCard, overrides: Mapping[str, Any] | Sequence[str]) -> DataCard:
    """A copy of a card with other values.

    Args:
        card: The card to start from; it is not changed.
        overrides: Nested mapping, or ``key=value`` strings as on the command line.

    Raises:
        ValueError: If a key does not exist (naming the nearest), or a value has the wrong type or range.

    Example:
        >>> override_card(load_card("hippocampus"), ["batch_size=8", "augmentation.rotate=30"]).augmentation.rotate
        30.0
    """
    content = OmegaConf.from_dotlist(list(overrides)) if isinstance(overrides, Sequence) else dict(overrides)
    return _build(OmegaConf.structured(card), content, "data.")


def resolve_root(card: DataCard) -> Path:
    """The folder of the data set: ``card.root``, else ``$DENSECAL_DATA/<folder>``.

    A card that densecal prepares itself falls back to ``$XDG_CACHE_HOME/densecal/<folder>`` (``~/.cache`` where that is unset). Where the folder is missing,
    such a card is prepared, and a card with ``download`` is downloaded.

    Raises:
        FileNotFoundError: If there is no such folder, with the ways to give it.
    """
    data = os.environ.get("DENSECAL_DATA")
    folder = card.folder or card.name
    below = Path(data).expanduser() / folder if data else None
    if card.root is not None:
        root = Path(card.root).expanduser()
    elif below is not None and (below.is_dir() or card.prepare is None):
        root = below
    elif card.prepare is not None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "densecal" / folder
    else:
        raise FileNotFoundError(f"Where is the data set {card.name}? {_ways(card)}")
    if root.is_dir():
        return root
    if card.prepare is not None:
        from densecal.data.prepare import prepare

        prepare(card.prepare, root)
    elif card.download:
        from densecal.data.download import download

        download(card, root)
    else:
        raise FileNotFoundError(f"No folder {root} for the data set {card.name}. {_ways(card)}")
    return root


def _ways(card: DataCard) -> str:
    ways = "Give its folder as data.root=DIR, or set DENSECAL_DATA to the folder that holds " + (card.folder or card.name)
    ways += ", or let data.download=true fetch it." if card.decathlon_task else "."
    return f"{ways} {card.how_to_get}".rstrip()


def _numbers(entry: Any) -> Iterator[int]:
    """A number, a range as ``"128-255"``, or a list of such."""
    if isinstance(entry, (list, tuple)):
        for one in entry:
            yield from _numbers(one)
    elif isinstance(entry, str) and (match := re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", entry)) and int(match[1]) <= int(match[2]):
        yield from range(int(match[1]), int(match[2]) + 1)
    elif isinstance(entry, int) and not isinstance(entry, bool):
        yield entry
    else:
        raise ValueError(
            f"Expected an entry of `label_values` or `ignore_values` to be a number, a range such as '128-255', or a list of them, but got {entry!r}."
        )


def _check_pattern(pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"`subject_pattern` {pattern!r} is not a regular expression: {error}.") from None
    if groups < 1:
        raise ValueError(f"Expected `subject_pattern` to have a group in parentheses that names the subject, but got {pattern!r}.")


def _aliases() -> dict[str, str]:
    return {str(alias): path.stem for path in sorted(cards_dir().glob("*.yaml")) for alias in _read_yaml(path).get("aliases") or []}


@cache
def _parsed(path: Path, changed: int) -> Any:
    """Content of a YAML file; read once as long as it is not ``changed``."""
    return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = copy.deepcopy(_parsed(path, path.stat().st_mtime_ns))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected the keys of a data set card, but got {type(content).__name__}.")
    return content


def _build(base: Any, content: Any, prefix: str) -> DataCard:
    """Merge values into a structured config; what the merge or the card refuses becomes one line."""
    try:
        card = OmegaConf.to_object(OmegaConf.merge(base, content))
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        parent, _, last = key.rpartition(".")
        raise ValueError(f"{prefix}{key} is not a key of a data set card. {near_matches(last, _keys(parent))}") from None
    except MissingMandatoryValue as error:
        raise ValueError(f"{prefix}{error.full_key} is missing.") from None
    except OmegaConfBaseException as error:
        reason = str(error.msg if getattr(error, "msg", None) else error).splitlines()[0]
        raise ValueError(f"{prefix}{error.full_key}: expected {_type_of(str(error.full_key))}. {reason}.") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{prefix.removesuffix('data.')}{error}") from None
    assert isinstance(card, DataCard)
    return card


def _keys(parent: str) -> list[str]:
    owner = Augmentation if parent == "augmentation" else DataCard
    return [f.name for f in fields(owner)]


def _type_of(key: str) -> str:
    parent, _, last = re.sub(r"\[.*", "", key).rpartition(".")
    owner = Augmentation if parent == "augmentation" else DataCard
    assert is_dataclass(owner)
    types = {f.name: str(f.type) for f in fields(owner)}
    return types.get(last) or types.get(parent) or "another value"
