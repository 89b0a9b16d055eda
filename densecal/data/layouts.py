"""Where the files of a data set lie: from a folder to its cases."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any

from densecal.data.card import DataCard
from densecal.data.medium import medium_of
from densecal.registry import near_matches

__all__ = ["Case", "Companion", "case_id_of", "decathlon", "find_cases", "nnunet", "paired"]


@dataclass(frozen=True)
class Companion:
    """Further maps of a case on the grid of its label, which are cropped, turned and resampled with it: other raters' labels, a teacher's probabilities.

    Args:
        name: What batches call it.
        files: The files: label maps, stacked as channels ``(R, *spatial)``, or one file of shares. ``None`` stands for a label map that the case lacks, ``ignore_index``
            everywhere.
        shares: Whether it is one file of shares ``(K, *spatial)`` in [0, 1], not label maps. Beyond the image, label maps are ``ignore_index`` like the label; shares mean
            nothing there.
    """

    name: str
    files: tuple[Path | None, ...]
    shares: bool = False


@dataclass(frozen=True)
class Case:
    """One volume or image of a data set.

    Args:
        id: Name of the case, from its file name.
        image: Image file; several are stacked as channels.
        label: Label file, or ``None`` where the set lists none. Of several raters the first one's.
        subject: Person (or phantom, or place) the case comes from; a subject is never on two sides of a split that is drawn.
        part: The set's own split that the case belongs to, where the card names such.
        listed: The place that names the case, "line 3 of train.txt" for example, where there is a list.
        companions: Further maps that batches hold beside the label.
        raters: Label files of those who rated the case, in the order of their names, where the set has several raters.
    """

    id: str
    image: tuple[Path, ...]
    label: Path | None
    subject: str
    part: str = ""
    listed: str = ""
    companions: tuple[Companion, ...] = ()
    raters: tuple[Path, ...] = ()

    @property
    def label_files(self) -> tuple[Path, ...]:
        """What the label is made of: one file, or those of several raters."""
        return self.raters or (() if self.label is None else (self.label,))

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that is read for the case."""
        further = (file for companion in self.companions for file in companion.files if file is not None)
        return tuple(dict.fromkeys((*self.image, *self.label_files, *further)))


def find_cases(root: Path, card: DataCard) -> list[Case]:
    """The cases below ``root`` in the card's layout, sorted by id, without those in ``card.exclude``. Files are not opened and need not exist."""
    cases = {"decathlon": decathlon, "nnunet": nnunet, "paired": paired}[card.layout](root, card)
    return [case for case in cases if case.id not in card.exclude]


def decathlon(root: Path, card: DataCard) -> list[Case]:
    """Cases in the layout of the Medical Segmentation Decathlon.

    ``dataset.json`` lists the training pairs relative to ``root``; without that file they are ``imagesTr/<id>.nii.gz`` and ``labelsTr/<id>.nii.gz``.

    Raises:
        ValueError: If ``dataset.json`` is not a list of such pairs.
    """
    listing = root / "dataset.json"
    if not listing.is_file():
        return paired(root, replace(card, image_files="imagesTr/{id}.*", label_files=["labelsTr/{id}.*"], layout="paired"))
    try:
        entries = json.loads(listing.read_text(encoding="utf-8"))["training"]
        cases = [_listed(root, entry, card) for entry in entries]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{listing}: expected "training" to be a list of {{"image": path, "label": path}} ({type(error).__name__}: {error}).'
        ) from None
    return sorted((case for case in cases if not case.image[0].name.startswith("._")), key=lambda case: case.id)


def nnunet(root: Path, card: DataCard) -> list[Case]:
    """Cases in nnU-Net's raw layout: ``imagesTr/<id>_0000.nii.gz`` and so on, a file for each of the card's ``image_channels``, and ``labelsTr/<id>.nii.gz``."""
    cases = paired(root, replace(card, image_files="imagesTr/{id}_0000.*", label_files=["labelsTr/{id}.*"], layout="paired"))
    return [replace(case, image=tuple(_channel(case, number) for number in range(card.image_channels))) for case in cases]


def _channel(case: Case, number: int) -> Path:
    ending = case.image[0].name.removeprefix(f"{case.id}_0000")
    return case.image[0].with_name(f"{case.id}_{number:04}{ending}")


def paired(root: Path, card: DataCard) -> list[Case]:
    """Cases by the card's patterns ``image_files`` and ``label_files`` (or ``rater_files``), of the splits in ``split_names``, or all of them.

    Where ``case_lists`` names the cases, these and no others; else every case that has an image or a label, so that a missing partner is noticed when the files are
    checked. Where folders tell the subject, its name comes before that of the case. A name that occurs in several of the set's splits is told apart by the split's
    name before it where the images of the splits lie apart. Several files of one name make as many cases, which the check of the files refuses.

    Raises:
        FileNotFoundError: If a list is missing.
        ValueError: If a rater that the card names has no file.
    """
    parts = list(dict.fromkeys(part for parts in card.split_names.values() for part in parts)) or [""]
    medium = medium_of(card)
    images = {part: _Files(root, card.image_files, part, medium.suffixes) for part in parts}
    raters = _raters(root, card, parts, medium.label_suffixes)
    labels = {
        part: [[_Files(root, pattern.replace("{rater}", rater), part, medium.label_suffixes) for pattern in card.label_patterns] for rater in raters]
        for part in parts
    }
    found = [(part, name, place) for part in parts for name, place in _names(root, card, part, images[part], list(chain(*labels[part]))).items()]
    apart = "{split}" in card.image_files
    repeated = {name for name, count in Counter(name for _, name, _ in found).items() if apart and count > 1}
    cases = []
    for part, name, places in found:
        subject, _, file = name.rpartition("/")
        case_id = "_".join(filter(None, (part if name in repeated else "", subject, file)))
        subject = subject_of(case_id, card) if card.subject_pattern or not subject else subject
        files = images[part].found.get(name) or [images[part].path(name)]
        of_label = list(product(*_label_files(name, labels[part], card)))
        cases += [
            Case(case_id, (image,), subject=subject, part=part, listed=place, **_labelled(label, card))
            for image in files
            for label in of_label
            for place in places
        ]
    return sorted(cases, key=lambda case: case.id)


def _raters(root: Path, card: DataCard, parts: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """Names of the raters, those with numbers in their order; one without a name where the set has none."""
    if not card.rater_files:
        return [""]
    found = {rater for part in parts for pattern in card.rater_files for rater in _Files(root, pattern, part, suffixes).raters}
    for rater in card.raters if found else []:
        patterns = [pattern.replace("{rater}", rater) for pattern in card.rater_files]
        if not any(_Files(root, pattern, part, suffixes).found for part in parts for pattern in patterns):
            raise ValueError(
                f"`raters` of the card {card.name} names {rater!r}, but there is no file {' or '.join(patterns)} in {root}. {near_matches(rater, found)}"
            )
    names = sorted(found, key=lambda name: [(int(word), "") if word.isdecimal() else (0, word) for word in re.split(r"(\d+)", name)])
    return list(card.raters) or names or ["*"]


def _label_files(name: str, labels: Sequence[Sequence[_Files]], card: DataCard) -> list[list[Path | None]]:
    """The label files of a case by each rater: usually one. ``None`` stands for one that may be missing; at least one rater has to be there."""
    found: list[list[Path | None]] = [list(next((files.found[name] for files in patterns if name in files.found), [])) for patterns in labels]
    optional = card.missing_raters and any(found)
    return [files or [None if optional else patterns[0].path(name)] for files, patterns in zip(found, labels, strict=True)]


def _labelled(files: tuple[Path | None, ...], card: DataCard) -> dict[str, Any]:
    """What a case holds of its label files, one per rater."""
    there = tuple(file for file in files if file is not None)
    if not card.rater_files:
        return {"label": there[0]}
    companions = (Companion("rater_labels", files),) if card.rater_fusion == "all" else ()
    return {"label": there[0], "raters": there, "companions": companions}


def _names(root: Path, card: DataCard, part: str, images: _Files, labels: Sequence[_Files]) -> dict[str, list[str]]:
    """Names of the cases of one of the set's splits, and every place in a list that names them."""
    if card.case_lists is None:
        patterns = [images, *labels]
        of_split = [files for files in patterns if files.by_split] or patterns  # the others hold the files of all splits
        return {name: [""] for name in sorted({name for files in of_split for name in files.found})}
    listing = root / card.case_lists.replace("{split}", part)
    if not listing.is_file():
        raise FileNotFoundError(
            f"No list of cases {listing}. Check data.root, and `case_lists` and `split_names` of the card {card.name}. {card.how_to_get}".rstrip()
        )
    names: dict[str, list[str]] = {}
    for number, line in enumerate(listing.read_text(encoding="utf-8-sig").splitlines(), start=1):
        word = re.split(r"[\s,;]", line.strip(), maxsplit=1)[0]
        if word and not word.startswith("#"):
            names.setdefault(images.name_of(word), []).append(f"line {number} of {listing}")
    return names


class _Files:
    """The files that fit a pattern, by the name of the case.

    Args:
        root: Folder that the pattern is relative to.
        pattern: Path with ``{id}``, maybe ``{subject}``, ``{rater}``, ``{split}``, ``*``, ``**`` and ``.*``.
        split: What ``{split}`` stands for; empty for any.
        suffixes: What ``.*`` stands for.
    """

    def __init__(self, root: Path, pattern: str, split: str, suffixes: Sequence[str]) -> None:
        self.root = root
        self.by_split = "{split}" in pattern
        self.pattern = pattern.replace("{split}", split or "*")
        self.suffixes = suffixes

    @cached_property
    def found(self) -> dict[str, list[Path]]:
        files: dict[str, list[Path]] = {}
        for match, file in self._matches:
            files.setdefault(_name(match), []).append(file)
        return files

    @property
    def raters(self) -> set[str]:
        """What ``{rater}`` stands for in the files that there are."""
        return {match["rater"] for match, _ in self._matches}

    @cached_property
    def _matches(self) -> list[tuple[re.Match[str], Path]]:
        path = Path(re.sub(r"\{(subject|id|rater)\}", "*", self.pattern))
        base = Path(path.anchor) if path.is_absolute() else self.root
        regex = re.compile(self._regex(self.pattern), re.IGNORECASE)
        files = sorted(base.glob(str(path.relative_to(path.anchor))))
        matches = ((regex.fullmatch((file if path.is_absolute() else file.relative_to(base)).as_posix()), file) for file in files)
        return [(match, file) for match, file in matches if match and not file.name.startswith(".")]

    def path(self, name: str) -> Path:
        """Where the file of a case should be."""
        subject, _, case = name.rpartition("/")
        pattern = self.pattern.replace("{subject}", subject or "*").replace("{id}", case)
        return self.root / (pattern.removesuffix(".*") + self.suffixes[0] if pattern.endswith(".*") else pattern)

    def name_of(self, word: str) -> str:
        """Name of the case that a list means by its name, its file or a path that ends as the pattern does."""
        word = word.replace("\\", "/")
        match = next(filter(None, (regex.search(word) for regex in self._endings)), None)
        if match:
            return _name(match)
        file = Path(word)
        subject = f"{file.parent.name}/" if "{subject}" in self.pattern and file.parent.name else ""
        return subject + case_id_of(file, self.suffixes)

    @cached_property
    def _endings(self) -> list[re.Pattern[str]]:
        folders, keys = self.pattern.split("/"), [key for key in ("{id}", "{subject}") if key in self.pattern]
        endings = ["/".join(folders[start:]) for start in range(len(folders))]
        return [re.compile(f"(?:^|/){self._regex(ending)}$", re.IGNORECASE) for ending in endings if all(key in ending for key in keys)]

    def _regex(self, pattern: str) -> str:
        regex = re.escape(pattern)
        if regex.endswith(r"\.\*"):
            regex = regex.removesuffix(r"\.\*") + f"(?:{'|'.join(map(re.escape, self.suffixes))})"
        regex = regex.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        for key in ("id", "subject", "rater"):
            regex = regex.replace(rf"\{{{key}\}}", f"(?P<{key}>[^/]+?)", 1).replace(rf"\{{{key}\}}", f"(?P={key})")
        return regex


def _name(match: re.Match[str]) -> str:
    """The case, after its subject and a slash where folders tell it."""
    found = match.groupdict()
    return f"{found['subject']}/{found['id']}" if "subject" in found else found["id"]


def _listed(root: Path, entry: Any, card: DataCard) -> Case:
    image = root / (entry if isinstance(entry, str) else entry["image"])
    label = None if isinstance(entry, str) else entry.get("label")
    case_id = case_id_of(image, medium_of(card).suffixes)
    return Case(case_id, (image,), root / label if label else None, subject_of(case_id, card))


def case_id_of(file: Path, suffixes: Sequence[str]) -> str:
    """Name of a file without its folder and its ending, if that is one of ``suffixes``."""
    return next((file.name[: -len(suffix)] for suffix in suffixes if file.name.lower().endswith(suffix)), file.name)


def subject_of(case_id: str, card: DataCard) -> str:
    """The subject of a case by the card's rule; without one, each case is its own.

    Raises:
        ValueError: If the id does not match the card's pattern.

    Example:
        >>> from densecal.data.card import load_card
        >>> [subject_of(f"hippocampus_{n}", load_card("hippocampus")) for n in ("003", "004", "005")]
        ['2', '2', '3']
    """
    if card.subject_pattern is None:
        return case_id
    match = re.search(card.subject_pattern, case_id)
    if match is None:
        raise ValueError(
            f"Case {case_id!r} does not match `subject_pattern` {card.subject_pattern!r} of the card {card.name}, so its subject is unknown."
        )
    subject = match.group(1)
    if card.subject_size == 1:
        return subject
    if not subject.isdecimal():
        raise ValueError(
            f"Expected `subject_pattern` to find a number in the case id {case_id!r}, as `subject_size` is {card.subject_size}, but got {subject!r}."
        )
    return str((int(subject) + card.subject_size - 1) // card.subject_size)
