from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from densecal.data.card import DataCard, load_card, override_card
from densecal.data.layouts import Case, find_cases
from densecal.data.split import split_cases


def cases(count: int, per_subject: int = 2) -> list[Case]:
    return [Case(f"c{n:03}", (Path(f"c{n}.nii.gz"),), None, str(n // per_subject)) for n in range(count)]


def card(**changes: object) -> DataCard:
    return override_card(DataCard(name="x", classes=["a", "b"], val_fraction=0.2, test_fraction=0.3), changes)


def test_split_cases_keeps_subjects_whole() -> None:
    split = split_cases(cases(40), card())
    assert {name: len(side) for name, side in split.items()} == {"train": 20, "val": 8, "test": 12}
    people = [{case.subject for case in side} for side in split.values()]
    assert sum(map(len, people)) == len(set.union(*people)) == 20


def test_split_cases_ignores_order_and_follows_its_seed() -> None:
    shuffled = cases(40)
    random.Random(0).shuffle(shuffled)
    assert split_cases(shuffled, card()) == split_cases(cases(40), card())
    assert split_cases(cases(40), card(split_seed=1)) != split_cases(cases(40), card())


def test_split_cases_hardly_moves_when_cases_are_added() -> None:
    def sides(count: int) -> dict[str, str]:
        return {case.id: name for name, side in split_cases(cases(count), card()).items() for case in side}

    before, after = sides(200), sides(210)
    assert sum(before[c] != after[c] for c in before) <= 12


def test_split_cases_gives_each_side_a_subject() -> None:
    split = split_cases(cases(3, per_subject=1), card(val_fraction=0.01, test_fraction=0.01))
    assert [len(side) for side in split.values()] == [1, 1, 1]
    assert split_cases(cases(4), card(val_fraction=0.0, test_fraction=0.0))["val"] == []
    with pytest.raises(ValueError, match="Expected at least 3 subjects to split, but the data set x has 2"):
        split_cases(cases(4), card())


def test_split_cases_explicit() -> None:
    split = split_cases(cases(6), card(splits={"train": ["c000", "c001"], "test": ["c004"]}))
    assert {name: [case.id for case in side] for name, side in split.items()} == {"train": ["c000", "c001"], "val": [], "test": ["c004"]}


def named(**names: list[str]) -> dict[str, list[str]]:
    """20 cases of 10 subjects in the set's split A, 4 in B and 4 in C, divided as the card names them."""
    parts = [*(replace(case, part="A") for case in cases(20)), *(replace(case, id=f"b{case.id}", part="B") for case in cases(4))]
    parts += [replace(case, id=f"x{case.id}", part="C") for case in cases(4)]
    split = split_cases(parts, card(case_lists="{split}.txt", split_names=names))
    return {side: [case.part for case in found] for side, found in split.items()}


def test_split_cases_by_the_sets_own_names() -> None:
    assert named(train=["A"], val=["B"], test=["C"]) == {"train": ["A"] * 20, "val": ["B"] * 4, "test": ["C"] * 4}
    assert named(train=["A", "C"], val=["B"], test=["B"]) == {"train": ["A"] * 20 + ["C"] * 4, "val": ["B"] * 4, "test": ["B"] * 4}


def test_split_cases_draws_what_the_set_does_not_name() -> None:
    """val_fraction 0.2 and test_fraction 0.3 of the 10 subjects, with two cases each, that the set trains on."""
    assert named(train=["A"], test=["C"]) == {"train": ["A"] * 16, "val": ["A"] * 4, "test": ["C"] * 4}
    assert named(train=["A"], val=["B"]) == {"train": ["A"] * 14, "val": ["B"] * 4, "test": ["A"] * 6}
    assert named(train=["A"]) == {"train": ["A"] * 10, "val": ["A"] * 4, "test": ["A"] * 6}


@pytest.mark.parametrize("num_folds", [2, 3, 7])
def test_split_cases_tests_every_case_in_one_fold(num_folds: int) -> None:
    """40 cases of 20 subjects, val_fraction 0.2."""
    folds = [split_cases(cases(40), card(num_folds=num_folds, fold=fold)) for fold in range(num_folds)]
    assert sorted(case.id for split in folds for case in split["test"]) == [case.id for case in cases(40)]
    for split in folds:
        people = [{case.subject for case in side} for side in split.values()]
        assert sum(map(len, people)) == len(set.union(*people)) == 20
        assert len(people[1]) == 4
        assert len(people[2]) in (20 // num_folds, -(-20 // num_folds))


def test_split_cases_folds_are_the_same_whatever_the_order_and_begin_as_a_single_split() -> None:
    shuffled = cases(40)
    random.Random(0).shuffle(shuffled)
    folded = [split_cases(some, card(num_folds=5, fold=3)) for some in (shuffled, cases(40))]
    assert folded[0] == folded[1] != split_cases(cases(40), card(num_folds=5, fold=3, split_seed=1))
    assert split_cases(cases(40), card(num_folds=5, fold=0)) == split_cases(cases(40), card(test_fraction=0.2))


def test_split_cases_folds_of_the_sets_own_training_split() -> None:
    parts = [*(replace(case, part="A") for case in cases(20)), *(replace(case, id=f"b{case.id}", part="B") for case in cases(4))]
    folds = [
        split_cases(parts, card(case_lists="{split}.txt", split_names={"train": ["A"], "val": ["B"]}, num_folds=5, fold=fold)) for fold in range(5)
    ]
    assert sorted(case.id for split in folds for case in split["test"]) == [case.id for case in cases(20)]
    assert all([case.part for case in split["val"]] == ["B"] * 4 for split in folds)


def test_split_cases_leaves_the_held_out_fold_alone() -> None:
    """Whichever fold is tested on, nobody of fold 2 is on any side, and all others are as they were but for who validates."""
    untouched = {case.id for case in split_cases(cases(40), card(num_folds=5, fold=2))["test"]}
    for fold in (0, 1, 3, 4):
        split = split_cases(cases(40), card(num_folds=5, fold=fold, held_out_fold=2))
        assert {case.id for side in split.values() for case in side} == {case.id for case in cases(40)} - untouched
        assert split["test"] == split_cases(cases(40), card(num_folds=5, fold=fold))["test"]
        assert len({case.subject for case in split["val"]}) == 4


@pytest.mark.parametrize("options", [{}, {"num_folds": 5, "fold": 1}], ids=["single", "fold"])
def test_split_cases_trains_on_a_share_of_the_subjects(options) -> None:
    """A smaller share is part of a larger one, persons stay whole, and the other sides are as they were."""
    whole = split_cases(cases(40), card(**options))
    people = len({case.subject for case in whole["train"]})
    before: set[str] = set()
    for fraction in (0.1, 0.25, 0.5, 1.0):
        split = split_cases(cases(40), card(train_fraction=fraction, **options))
        ids = {case.id for case in split["train"]}
        assert before <= ids <= {case.id for case in whole["train"]}
        assert len({case.subject for case in split["train"]}) == max(1, round(fraction * people)) == len(ids) / 2
        assert (split["val"], split["test"]) == (whole["val"], whole["test"])
        before = ids


def test_split_cases_needs_a_subject_for_each_fold() -> None:
    with pytest.raises(ValueError, match="Expected at least 5 subjects for `num_folds`, but the data set x has 2"):
        split_cases(cases(4), card(num_folds=5, fold=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fold": 0}, "`fold` needs `num_folds`"),
        ({"num_folds": 5}, "`num_folds` needs `fold`"),
        ({"num_folds": 1, "fold": 0}, "Expected `num_folds` to be 2 or more"),
        ({"num_folds": 5, "fold": 5}, "Expected `fold` in 0 to 4"),
        ({"train_fraction": 0.0}, "Expected `train_fraction` in"),
        ({"held_out_fold": 1}, "`held_out_fold` needs `num_folds`"),
        ({"num_folds": 5, "fold": 0, "held_out_fold": 5}, "Expected `held_out_fold` in 0 to 4"),
        ({"num_folds": 5, "fold": 1, "held_out_fold": 1}, "Expected `fold` and `held_out_fold` to differ, but both are 1"),
        ({"num_folds": 5, "fold": 0, "held_out_fold": 1, "val_fraction": 0.6}, "Expected `val_fraction` below 0.6"),
        ({"num_folds": 2, "fold": 0, "val_fraction": 0.5}, "Expected `val_fraction` below 0.5"),
        ({"num_folds": 2, "fold": 0, "splits": {"train": ["a"]}}, "`fold` and `splits` both say"),
        ({"num_folds": 2, "fold": 0, "test_root": "elsewhere"}, "`fold` and `test_root` both say"),
        (
            {"num_folds": 2, "fold": 0, "split_names": {"train": ["A"], "test": ["B"]}, "case_lists": "{split}.txt"},
            "`fold` and `split_names.test` both",
        ),
    ],
)
def test_folds_of_a_card_that_make_no_sense(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        card(**changes)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": ["c00"]}, "names the case 'c00', which the data set does not have. Did you mean 'c00"),
        ({"train": ["c000"], "val": ["c000"]}, "'c000' is listed twice"),
        ({"train": ["c000"], "val": ["c001"]}, "Subject '0' is in `splits.train` and `splits.val`"),
        ({"test": ["c000"]}, "Expected `splits.train`"),
    ],
)
def test_split_cases_explicit_errors(splits: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_cases(cases(6), card(splits=splits))


def test_split_cases_hippocampus_is_what_results_refer_to(hippocampus: Path) -> None:
    split = split_cases(find_cases(hippocampus, load_card("hippocampus")), load_card("hippocampus"))
    assert {name: len(side) for name, side in split.items()} == {"train": 74, "val": 17, "test": 29}
    assert [case.id for case in split["test"]][:3] == ["hippocampus_011", "hippocampus_023", "hippocampus_024"]
