"""What runs say of the cases that they have never seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from densecal.data.card import override_card, resolve_root
from densecal.data.layouts import Case, find_cases
from densecal.data.predictions import PredictedCase
from densecal.data.validate import Problem, find_problems
from densecal.inference.ensemble import Ensemble, check_one_data_set
from densecal.inference.predictor import Predictor
from densecal.inference.run_cases import RunCases
from densecal.runs import read_splits

__all__ = ["OutOfFoldCases", "tested_checkpoint"]


class OutOfFoldCases:
    """The cases of a data set, each predicted by the runs that neither trained on it nor chose their best checkpoint by it.

    Where several runs held a case out, their probabilities are averaged.

    Args:
        runs: Run directories, the folds of a cross-validation for example.
        checkpoint: ``"best"`` or ``"last"``. By default that which each run was tested with.
        device: Where to compute.
        root: Where the data set lies. By default where it lay in training.
        inference: How whole images are predicted, as ``configs/inference/`` has it. By default as in training.
        trust_config: As for :meth:`Predictor.from_run`.

    Attributes:
        card: The data set.
        case_ids: Cases that some run held out, sorted.
        uncovered: Cases that every run has seen.

    Raises:
        FileNotFoundError: If a run, its checkpoint or the data set is missing.
        ValueError: If the runs are not of one data set, or no case was held out.
    """

    def __init__(
        self,
        runs: Sequence[Path],
        *,
        checkpoint: str | None = None,
        device: torch.device | str = "cpu",
        root: str | None = None,
        inference: DictConfig | None = None,
        trust_config: bool = False,
    ) -> None:
        predictors = [Predictor.from_run(run, checkpoint or tested_checkpoint(run), device, inference, trust_config=trust_config) for run in runs]
        everyone = Ensemble(predictors)
        if root is None:
            check_one_data_set(predictors, runs)
        self.card = everyone.card if root is None else override_card(everyone.card, {"root": root})
        self.runs = list(runs)
        self.all_cases: list[Case] = find_cases(resolve_root(self.card), self.card)
        self._cases = RunCases(everyone, self.all_cases, self.card)
        splits = [read_splits(run) for run in runs]
        seen = [{*split.get("train", ()), *split.get("val", ())} for split in splits]
        self._unbiased = {case.id: [one for one, ids in zip(predictors, seen, strict=True) if case.id not in ids] for case in self.all_cases}
        self.case_ids = tuple(sorted(case_id for case_id, some in self._unbiased.items() if some))
        self.uncovered = tuple(sorted(case_id for case_id, some in self._unbiased.items() if not some))
        if not self.case_ids:
            raise ValueError(
                f"runs: no case of {self.card.name} in {self.card.root} was held out by any of the {len(self.runs)} run(s). "
                "Train with data.num_folds=5 data.fold=0,1,2,3,4, or with a test split."
            )

    def __len__(self) -> int:
        return len(self.case_ids)

    def problems(self) -> list[Problem]:
        """What is wrong with the files of images and labels; every one is read for it."""
        return find_problems([case for case in self.all_cases if case.id in self.case_ids], self.card)

    def __getitem__(self, case_id: str) -> PredictedCase:
        """Predict a case.

        Raises:
            ValueError: If a file cannot be read; the text names it.
        """
        unbiased = Ensemble(self._unbiased[case_id])
        place = self._cases.case_ids.index(case_id)
        prediction = unbiased(self.all_cases[place].image)
        return self._cases.beside_label(place, prediction)

    def image(self, case_id: str) -> NDArray[Any]:
        """The image of a case as shown: grey values of its first channel, ``(*spatial)``, or colours ``(rows, columns, 3)``."""
        return self._cases.image(case_id)


def tested_checkpoint(run: Path) -> str:
    """Which checkpoint the report of a run is about."""
    config = OmegaConf.load(run / "config.yaml")
    return str(config.evaluate) if read_splits(run).get("val") else "last"
