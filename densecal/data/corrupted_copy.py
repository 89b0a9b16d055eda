"""A copy of a data set in which some label maps have known errors."""

from __future__ import annotations

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tqdm import tqdm

from densecal.data.card import DataCard
from densecal.data.label_noise import check_severity, corrupt_label, structure_dice
from densecal.data.layouts import Case
from densecal.data.medium import medium_of
from densecal.files import write_atomically
from densecal.seeds import derive_seed

__all__ = ["RECORD", "KnownError", "read_known_errors", "write_corrupted_copy"]

RECORD = "corruptions.csv"
_ATTEMPTS = 20
"""Where chance may leave a label map as it is, so many draws are tried."""


@dataclass(frozen=True)
class KnownError:
    """What was done to the label map of a case.

    Args:
        case_id: The case.
        kind: Kind of error, see :data:`densecal.data.label_noise.KINDS`.
        severity: How bad it is.
        seed: Of the draws.
        changed: Pixels or voxels with another class than before.
        dice: Mean Dice of the structures, after against before.
    """

    case_id: str
    kind: str
    severity: float
    seed: int
    changed: int
    dice: float


def write_corrupted_copy(
    root: Path,
    card: DataCard,
    cases: Sequence[Case],
    output: Path,
    *,
    errors: Sequence[tuple[str, float]],
    count: int,
    seed: int,
    among: Sequence[str] | None = None,
    transition: Sequence[Sequence[float]] | None = None,
    link: bool = True,
    progress: bool = False,
) -> list[KnownError]:
    """Write a data set that the same card reads, with errors in ``count`` of its label maps, and ``corruptions.csv``, which says where they are.

    Everything is written beside ``output`` and moved there at the end, so that no half of a set is ever seen.

    Args:
        root: Folder of the set.
        card: Its card.
        cases: Its cases.
        output: Where the copy goes: no folder yet, or an empty one.
        errors: Kinds and severities, dealt out to the cases in turn.
        count: How many label maps get an error.
        seed: Which they are, and every draw. The choice depends on the seed and the names of the cases alone.
        among: Names of the cases to choose from. By default all.
        transition: See :func:`densecal.data.label_noise.corrupt_label`.
        link: Link to the files that stay as they are instead of copying them.
        progress: Show a progress bar.

    Returns:
        What was done, sorted by case.

    Raises:
        ValueError: If an option is out of its range, ``output`` is not empty or lies in the set, labels are shares, a file lies outside of ``root``, or not so many cases
            have a structure that such errors change.
    """
    for kind, severity in errors:
        check_severity(kind, severity)
    if card.soft_labels:
        raise ValueError(
            f"The labels of {card.name} are shares of classes; errors are made in label maps only. Use a set with one class per {medium_of(card).element}."
        )
    source, target = root.resolve(), output.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise ValueError(f"output: {output} and the data set in {root} lie in one another. Choose another folder.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output: {output} is not empty. Remove it, or choose another folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as place:
        folder = Path(place) / output.name
        folder.mkdir()
        names = {case.id for case in cases} if among is None else set(among)
        chosen = sorted((case for case in cases if case.id in names), key=lambda case: (derive_seed(seed, "corrupted", case.id), case.id))
        done: list[KnownError] = []
        with tqdm(total=count, desc="Corrupting labels", unit="case", disable=not progress, leave=False) as bar:
            for case in chosen:
                if len(done) == count:
                    break
                known = _corrupt(case, card, source, folder, *errors[len(done) % len(errors)], seed, transition)
                if known is not None:
                    done.append(known)
                    bar.update()
        if len(done) < count:
            kinds = ", ".join(f"{kind} {severity:g}" for kind, severity in errors)
            raise ValueError(
                f"Expected {count} label maps that such errors change ({kinds}), but found {len(done)} among {len(chosen)}. Raise the severity, or lower the share."
            )
        for case in tqdm(cases, desc="Copying", unit="case", disable=not progress, leave=False):
            for path in case.files:
                _copy(path, source, folder, link)
        for listing in _listings(root, card):
            _copy(listing, source, folder, link=False)
        done.sort(key=lambda known: known.case_id)
        write_atomically(folder / RECORD, _record(done))
        os.replace(folder, output)
    return done


def _corrupt(
    case: Case, card: DataCard, root: Path, folder: Path, kind: str, severity: float, seed: int, transition: Sequence[Sequence[float]] | None
) -> KnownError | None:
    """Write the label of a case with an error in it; nothing where no draw changes it."""
    if case.label is None:
        return None
    medium, schema = medium_of(card), card.class_schema
    try:
        label_map, spacing = medium.read_label(case.label, card)
    except Exception as error:
        raise ValueError(f"{case.label}: cannot be read ({str(error).splitlines()[0].rstrip('.')}). densecal-check looks at every file.") from error
    for attempt in range(_ATTEMPTS):
        drawn = derive_seed(seed, "corruption", case.id, attempt)
        result = corrupt_label(
            label_map,
            kind,
            severity,
            num_classes=schema.num_classes,
            seed=drawn,
            background=schema.background,
            spacing=spacing or None,
            ignore_index=schema.ignore_index,
            transition=transition,
        )
        if changed := int((result != label_map).sum()):
            medium.rewrite_label(case.label, folder / _relative(case.label, root), result, card)
            return KnownError(case.id, kind, float(severity), drawn, changed, structure_dice(label_map, result, schema.foreground))
    return None


def _relative(path: Path, root: Path) -> Path:
    """Where a file goes in the copy. Links inside of the set are followed to its folder only, not to what they point to."""
    place = path.parent.resolve() / path.name
    if not place.is_relative_to(root):
        raise ValueError(
            f"{path}: lies outside of the folder of the data set {root}, so a copy would not be read. Put the set into one folder first."
        )
    return place.relative_to(root)


def _copy(path: Path, root: Path, folder: Path, link: bool) -> None:
    target = folder / _relative(path, root)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        target.symlink_to(path.resolve())
    else:
        shutil.copyfile(path, target)


def _listings(root: Path, card: DataCard) -> list[Path]:
    """The files that name the cases."""
    if card.layout == "decathlon":
        return [path for path in (root / "dataset.json",) if path.is_file()]
    if card.case_lists is None:
        return []
    parts = {part for parts in card.split_names.values() for part in parts} or {""}
    return [root / card.case_lists.replace("{split}", part) for part in sorted(parts)]


def _record(errors: Sequence[KnownError]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(KnownError)])
    for known in errors:
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in asdict(known).values()])
    return text.getvalue()


def read_known_errors(path: Path) -> dict[str, KnownError]:
    """The content of a ``corruptions.csv``, by case.

    Raises:
        ValueError: If it is none, in one line that names it.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        known = [
            KnownError(row["case_id"], row["kind"], float(row["severity"]), int(row["seed"]), int(row["changed"]), float(row["dice"])) for row in rows
        ]
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no {RECORD} of densecal-corrupt ({type(error).__name__}: {error}).") from None
    return {one.case_id: one for one in known}
