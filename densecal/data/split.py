"""Who is trained on and who is tested on: by subject, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from densecal.data.card import SPLITS, DataCard
from densecal.data.layouts import Case
from densecal.registry import near_matches
from densecal.seeds import derive_seed

__all__ = ["split_cases"]


def split_cases(cases: Sequence[Case], card: DataCard) -> dict[str, list[Case]]:
    """Divide cases into ``train``, ``val`` and ``test``; nobody's volumes are on two sides.

    Subjects are ordered by a hash of ``(split_seed, subject)`` and cut at the card's fractions. The split therefore depends on neither the training seed nor the
    order of the files, and a subject that is added later moves at most a few others across a cut. A fraction above 0 gives at least one subject. Folds are pieces of the
    same order, as equal as they can be: ``fold`` is tested on, the subjects after it, going round, are those of validation, and ``held_out_fold`` is passed over.

    Args:
        cases: All cases of the set.
        card: Fractions (or ``num_folds`` and ``fold``; ``train_fraction``) and ``split_seed``, or explicit case ids in ``splits``, or names of the set's own splits in ``split_names``.

    Returns:
        The three lists, each sorted by case id.

    Raises:
        ValueError: If there are too few subjects, or an explicit split names an unknown case, repeats one or cuts through a subject.
    """
    split = _explicit(cases, card) if card.splits else _named(cases, card) if card.split_names else _drawn(cases, card)
    if card.train_fraction < 1:
        subjects = _in_order({case.subject for case in split["train"]}, card)
        kept = set(subjects[: max(1, round(card.train_fraction * len(subjects)))])
        split["train"] = [case for case in split["train"] if case.subject in kept]
    return {name: sorted(split[name], key=lambda case: case.id) for name in SPLITS}


def _in_order(subjects: Iterable[str], card: DataCard) -> list[str]:
    """By a hash that depends on nothing but ``split_seed`` and the subject."""
    return sorted(subjects, key=lambda subject: (derive_seed(card.split_seed, "split", subject), subject))


def _named(cases: Sequence[Case], card: DataCard) -> dict[str, list[Case]]:
    """The set's own splits; a side without a name is drawn from the training subjects."""
    split = {name: [case for case in cases if case.part in parts] for name, parts in card.split_names.items()}
    fractions = {f"{name}_fraction": 0.0 for name in ("val", "test") if name in split}
    return {**_drawn(split["train"], replace(card, **fractions)), **{name: side for name, side in split.items() if name != "train"}}  # type: ignore[arg-type]


def _drawn(cases: Sequence[Case], card: DataCard) -> dict[str, list[Case]]:
    subjects = _in_order({case.subject for case in cases}, card)
    sizes = {
        name: max(1, round(fraction * len(subjects))) if fraction else 0
        for name, fraction in (("test", card.test_fraction), ("val", card.val_fraction))
    }
    if card.num_folds is not None and card.fold is not None:
        if len(subjects) < card.num_folds:
            raise ValueError(f"Expected at least {card.num_folds} subjects for `num_folds`, but the data set {card.name} has {len(subjects)}.")
        bounds = [len(subjects) * fold // card.num_folds for fold in range(card.num_folds + 1)]
        folds = [subjects[start:end] for start, end in pairwise(bounds)]
        sizes["test"] = len(folds[card.fold])
        order = [*range(card.fold, card.num_folds), *range(card.fold)]
        subjects = [subject for fold in order if fold != card.held_out_fold for subject in folds[fold]]
    if sum(sizes.values()) >= len(subjects):
        raise ValueError(f"Expected at least {sum(sizes.values()) + 1} subjects to split, but the data set {card.name} has {len(subjects)}.")
    chosen = {subject: "test" if rank < sizes["test"] else "val" if rank < sum(sizes.values()) else "train" for rank, subject in enumerate(subjects)}
    return {name: [case for case in cases if chosen.get(case.subject) == name] for name in SPLITS}


def _explicit(cases: Sequence[Case], card: DataCard) -> dict[str, list[Case]]:
    known = {case.id: case for case in cases}
    side: dict[str, str] = {}
    subject_side: dict[str, str] = {}
    for name, ids in card.splits.items():
        for case_id in ids:
            if case_id not in known:
                raise ValueError(
                    f"`splits.{name}` of the card {card.name} names the case {case_id!r}, which the data set does not have. {near_matches(case_id, known)}"
                )
            if case_id in side:
                raise ValueError(f"The case {case_id!r} is listed twice, in `splits.{side[case_id]}` and `splits.{name}` of the card {card.name}.")
            subject = known[case_id].subject
            if subject_side.setdefault(subject, name) != name:
                raise ValueError(f"Subject {subject!r} is in `splits.{subject_side[subject]}` and `splits.{name}` of the card {card.name}.")
            side[case_id] = name
    if "train" not in side.values():
        raise ValueError(f"Expected `splits.train` of the card {card.name} to list at least one case.")
    return {name: [case for case in cases if side.get(case.id) == name] for name in SPLITS}
