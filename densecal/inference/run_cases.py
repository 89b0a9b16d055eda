"""The cases of a data set as a trained run predicts them, one at a time, in the form that saved predictions are read in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from densecal.data.card import SPLITS, DataCard, override_card, resolve_root
from densecal.data.dataset import CaseDataset
from densecal.data.layouts import Case, find_cases
from densecal.data.medium import medium_of
from densecal.data.predictions import PredictedCase
from densecal.data.split import split_cases
from densecal.data.validate import Problem, find_problems
from densecal.inference.ensemble import Ensemble
from densecal.inference.predictor import Prediction, Predictor
from densecal.ops.region_maps import region_maps

__all__ = ["RunCases", "cases_of_split"]


class RunCases:
    """Predictions of a trained run, or of an ensemble, on whole files, on the files' own grid, beside the labels as stored.

    Args:
        predictor: The trained network, or several.
        cases: The cases.
        card: How their labels are read.

    Example:
        >>> cases = RunCases(predictor, cases, card)  # doctest: +SKIP
        >>> cases["hippocampus_003"].probs.shape  # doctest: +SKIP
        torch.Size([3, 35, 51, 35])
    """

    def __init__(self, predictor: Predictor | Ensemble, cases: Sequence[Case], card: DataCard) -> None:
        self.predictor = predictor
        self.cases = list(cases)
        self.card = card
        self.case_ids = tuple(case.id for case in cases)
        self._place = {case.id: place for place, case in enumerate(cases)}
        self._references = CaseDataset(self.cases, override_card(card, {"spacing": None, "orientation": None}), train=False)

    def __len__(self) -> int:
        return len(self.cases)

    def problems(self) -> list[Problem]:
        """What is wrong with the files of images and labels; every one is read for it."""
        return find_problems(self.cases, self.card)

    def __getitem__(self, case: int | str) -> PredictedCase:
        """Predict one case, by its number or its name.

        Raises:
            ValueError: If a file cannot be read; the text names it.
        """
        place = self._place[case] if isinstance(case, str) else case
        return self.beside_label(place, self.predict(place))

    def predict(self, place: int) -> Prediction:
        """The prediction of a case, by its number."""
        return self.predictor(self.cases[place].image)

    def beside_label(self, place: int, prediction: Prediction) -> PredictedCase:
        """A prediction with the label of its case as stored."""
        label = self._references[place]["label"]
        label = label if label.is_floating_point() else label.long()
        schema, source = self.card.schema, prediction.source
        if schema.regions:
            label = region_maps(label.unsqueeze(0), schema)[0]
        elif label.shape[0] == 1:
            label = label[0]
        return PredictedCase(self.case_ids[place], prediction.probs, label, source.spacing or None, source.axis_names)

    def image(self, case_id: str) -> NDArray[Any]:
        """The image of a case as shown: grey values of its first channel, ``(*spatial)``, or colours ``(rows, columns, 3)``."""
        return medium_of(self.card).picture(self.cases[self._place[case_id]].image, self.card)


def cases_of_split(card: DataCard, split: str | None, others: Sequence[DataCard] = ()) -> tuple[str, list[Case]]:
    """The cases of a card's data set to evaluate on.

    Args:
        card: The data set.
        split: ``"train"``, ``"val"``, ``"test"`` or ``"all"``. By default the test cases, where there are none those of validation.
        others: The same data set as the other members of an ensemble divide it: a case is in a split where it is in that split of all.

    Returns:
        Name of the split, and its cases.

    Raises:
        FileNotFoundError: If the data set is not there.
        ValueError: If there are no such cases.
    """
    if split not in (None, "all", *SPLITS):
        raise ValueError(f"split: expected one of {(*SPLITS, 'all')}, but got {split!r}.")
    if card.test_root is not None and split in (None, "test"):
        root = Path(resolve_root(override_card(card, {"root": card.test_root, "download": False, "prepare": None})))
        return "test", find_cases(root, card)
    root = resolve_root(card)
    cases = find_cases(root, card)
    splits = {"all": cases} if split == "all" else _common_splits(cases, (card, *others))
    name = split or next((name for name in ("test", "val") if splits[name]), "test")
    if not splits[name] and others:
        raise ValueError(
            f"split: no {name} case of {card.name} in {root} is one of all {len(others) + 1} members of the ensemble: of folds, each has been trained on the others'. "
            "Evaluate it on cases that no member has seen, data=CARD data.root=DIR."
        )
    if not splits[name]:
        raise ValueError(
            f"split: {card.name} in {root} has no cases {'in ' + name if name != 'all' else 'at all'}. Choose another split, or split=all."
        )
    return name, splits[name]


def _common_splits(cases: Sequence[Case], cards: Sequence[DataCard]) -> dict[str, list[Case]]:
    """The splits of the first card, less the cases that are elsewhere in that of another."""
    first, *others = (split_cases(cases, card) for card in cards)
    kept = {name: [{case.id for case in split[name]} for split in others] for name in SPLITS}
    return {name: [case for case in first[name] if all(case.id in ids for ids in kept[name])] for name in SPLITS}
