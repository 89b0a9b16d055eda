"""Thresholds that keep the share of a region that is missed under a level, beside the calibrators of ``densecal-calibrate``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densecal.cli.configuration import CommandError

if TYPE_CHECKING:
    from densecal.data import PredictedCase
    from densecal.labels import LabelSchema
    from densecal.posthoc import FalseNegativeControl

__all__ = ["Controls"]


class Controls:
    """A threshold for each of some regions, chosen on the cases that calibrators are fitted on and looked at on those that they are looked at on.

    Thresholds are for the probabilities as they are predicted or saved, before any calibrator.

    Args:
        levels: Class or region -> share of it that may be missed; empty for nothing to do.
        schema: The classes or regions.
        folds: Fold of each case, where cases are held out by cross-fitting.

    Raises:
        CommandError: If there is no such region, or a share is not in (0, 1).
    """

    def __init__(self, levels: Mapping[str, float], schema: LabelSchema, folds: Mapping[str, int]) -> None:
        self.levels, self.schema, self.folds = dict(levels), schema, folds
        self.num_folds = max(folds.values(), default=-1) + 1
        self.chosen = self._made()
        self._by_fold = [self._made() for _ in range(self.num_folds)]
        self._found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in self.levels}

    def update(self, case: PredictedCase) -> None:
        """Fit on a case."""
        fed = [self.chosen, *(some for fold, some in enumerate(self._by_fold) if fold != self.folds[case.case_id])]
        for control in (one for some in fed for one in some.values()):
            control.update(case.probs.unsqueeze(0), case.label.unsqueeze(0))

    def finish(self) -> None:
        """Choose the thresholds."""
        for name, control in ((name, one) for some in (self.chosen, *self._by_fold) for name, one in some.items()):
            try:
                control.finish()
            except ValueError as error:
                raise CommandError(f"control.{name}: {error}") from None

    def look(self, case: PredictedCase) -> None:
        """Measure what the thresholds do to a case that they were not chosen on."""
        for name, control in (self._by_fold[self.folds[case.case_id]] if self.folds else self.chosen).items():
            probs, label = case.probs.unsqueeze(0), case.label.unsqueeze(0)
            rate, ratio = float(control.false_negative_rate(probs, label)), float(control.size_ratio(probs, label))
            if rate == rate:  # NaN where the case does not have the region
                self._found[name][case.case_id] = {"false_negative_rate": rate, "size_ratio": ratio}

    def write(self, folder: Path, facts: Mapping[str, Any], split: str | None) -> Path:
        """``control.json``; ``docs/summary.md`` describes every key."""
        import densecal
        from densecal.files import write_atomically
        from densecal.report.summary import jsonable, to_json

        regions = {
            name: {
                "alpha": control.alpha,
                "threshold": control.threshold,
                "num_cases": control.num_cases,
                **{key: self._mean(name, key) for key in ("false_negative_rate", "size_ratio")},
                "cases": self._found[name],
            }
            for name, control in self.chosen.items()
        }
        head = {
            "schema_version": 1,
            "densecal_version": densecal.__version__,
            "regions": regions,
            "split": split,
            "num_folds": self.num_folds or None,
        }
        return write_atomically(folder / "control.json", to_json(jsonable(head | dict(facts))))

    def lines(self) -> list[str]:
        """What was found, in words."""
        lines = []
        for name, control in self.chosen.items():
            text = f"{name}: probability >= {control.threshold:.4g} misses at most {control.alpha:g} of it on average"
            if self._found[name]:
                rate, ratio = self._mean(name, "false_negative_rate"), self._mean(name, "size_ratio")
                text += f"; on {len(self._found[name])} cases held out {rate:.4f}, in a mask {ratio:.3g} times as large as the region"
            lines.append(text)
        return lines

    def _mean(self, name: str, key: str) -> float | None:
        values = [found[key] for found in self._found[name].values()]
        return sum(values) / len(values) if values else None

    def _made(self) -> dict[str, FalseNegativeControl]:
        from densecal.posthoc import FalseNegativeControl
        from densecal.registry import near_matches

        made = {}
        for name, alpha in self.levels.items():
            if name not in self.schema.names:
                raise CommandError(f"control: no class or region {name!r}. {near_matches(name, self.schema.names)}")
            try:
                made[name] = FalseNegativeControl(
                    self.schema.names.index(name), alpha=alpha, activation=self.schema.activation, ignore_index=self.schema.ignore_index
                )
            except ValueError as error:
                raise CommandError(f"control.{name}: {error}") from None
        return made
