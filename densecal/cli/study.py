"""A study: several training runs that belong together, from a YAML file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from densecal.registry import near_matches
from densecal.resources import configs_dir

__all__ = ["Member", "Study", "filled", "study_names"]

_REFERENCE = re.compile(r"\$\{runs\.([^}]+)\}")


@dataclass(frozen=True)
class Member:
    """Which method a run is one of, and which of its runs: ``{"seed": 0, "data.fold": 1}``."""

    method: str
    replicate: Mapping[str, int]


@dataclass(frozen=True)
class Study:
    """Runs to put side by side.

    Args:
        name: Of the study.
        runs: Name -> settings of its own; the others are compared with the first.
        settings: Of every run.
        evaluate: Settings of ``densecal-evaluate``.
        calibrate: Settings of ``densecal-calibrate``.
        seeds: Each run is one for each of them, ``<name>_seed<seed>``, and refers to those of its own seed; empty: one of each, with the seed of the settings.
        folds: The same of ``data.fold``, ``<name>_seed<seed>_fold<fold>``.
        pair: The first seed goes with the first fold, the second with the second; else each seed with each fold.
        posthoc: Calibrators to repair each run with, fitted on its validation cases; results are shown with and without.
        held_out: Settings of the data set, ``data.KEY=VALUE``, that make cases which no run has seen those to be tested, once the choice is made.
        members: Run -> what it is of; empty until replicates are spelled out.

    Raises:
        ValueError: If there are no runs, one refers to a run that does not come before it, or seeds and folds cannot be paired.
    """

    name: str
    runs: Mapping[str, Sequence[str]]
    settings: Sequence[str] = ()
    evaluate: Sequence[str] = ()
    calibrate: Sequence[str] = ()
    seeds: Sequence[int] = ()
    folds: Sequence[int] = ()
    pair: bool = False
    posthoc: Sequence[str] = ()
    held_out: Sequence[str] = ()
    members: Mapping[str, Member] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(f"study {self.name}: expected `runs`, {{name: [key=value, ...]}}, but there are none.")
        before: list[str] = []
        for run, own in self.runs.items():
            if not re.fullmatch(r"\w[\w=+-]*", run):
                raise ValueError(f"study {self.name}: names of runs become folders, so expected letters, digits and any of '=+-_', but got {run!r}.")
            for name in _REFERENCE.findall(" ".join(own)):
                if name not in before:
                    raise ValueError(
                        f"study {self.name}: {run} refers to the run {name!r}, which does not come before it. {near_matches(name, before)}"
                    )
            before.append(run)
        if self.pair and len(self.seeds) != len(self.folds):
            raise ValueError(f"study {self.name}: `pair` needs as many seeds as folds, but got {len(self.seeds)} and {len(self.folds)}.")
        if bad := [line for line in self.held_out if not line.startswith("data.") or "=" not in line]:
            raise ValueError(f"study {self.name}: expected `held_out` to be settings of the data set such as data.fold=4, but got {bad[0]!r}.")

    @classmethod
    def load(cls, name: str) -> Study:
        """A study by its name, or from a file.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is no study.
        """
        path = Path(name) if name.endswith((".yaml", ".yml")) else configs_dir() / "study" / f"{name}.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"No study {name!r}. {near_matches(name, study_names())}")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]}).") from None
        allowed = [one.name for one in fields(cls) if one.name not in ("name", "members")]
        if not isinstance(content, dict) or not isinstance(content.get("runs", {}), dict):
            raise ValueError(f"{path}: expected a mapping with {', '.join(allowed)}, of which `runs` is one of names to lists.")
        if unknown := [key for key in content if key not in allowed]:
            raise ValueError(f"{path}: {near_matches(str(unknown[0]), allowed)} It has {unknown[0]!r}.")
        given: dict[str, Any] = {key: value for key, value in content.items() if value is not None}
        for key, value in {
            **{key: given.get(key, []) for key in ("settings", "evaluate", "calibrate", "posthoc", "held_out")},
            **given.get("runs", {}),
        }.items():
            if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
                raise ValueError(f"{path}: expected {key!r} to be a list of texts such as loss=svls, but got {value!r}.")
        for key in ("seeds", "folds"):
            _check_whole_numbers(path, key, given.get(key, []))
        if not isinstance(given.get("pair", False), bool):
            raise ValueError(f"{path}: expected 'pair' to be true or false, but got {given['pair']!r}.")
        return cls(name=path.stem, **{"runs": {}, **given})

    def of_methods(self, names: Sequence[str]) -> Study:
        """The study with some of its runs; a name that is none of them is that of a loss, ``loss=<name>``.

        The runs that these refer to stay.
        """
        runs = {**self.runs, **{name: [f"loss={name}"] for name in names if name not in self.runs}}
        wanted = set(names)
        for name in reversed(list(runs)):
            if name in wanted:
                wanted |= set(_REFERENCE.findall(" ".join(runs[name])))
        return replace(self, runs={name: own for name, own in runs.items() if name in wanted})

    def of_each_replicate(self) -> Study:
        """The study with the runs of every seed and fold spelled out, and ``members`` to tell what each is."""
        if not (self.seeds or self.folds):
            return self
        numbers = {"seed": self.seeds, "data.fold": self.folds}
        axes = {key: values for key, values in numbers.items() if values}
        combinations = zip(*axes.values(), strict=True) if self.pair else itertools.product(*axes.values())
        runs, members = {}, {}
        for replicate in (dict(zip(axes, values, strict=True)) for values in combinations):
            suffix = "".join(f"_{key.rpartition('.')[2]}{value}" for key, value in replicate.items())
            for name, own in self.runs.items():
                members[f"{name}{suffix}"] = Member(name, replicate)
                lines = [_REFERENCE.sub(lambda match, suffix=suffix: f"${{runs.{match[1]}{suffix}}}", line) for line in own]  # type: ignore[misc]
                runs[f"{name}{suffix}"] = [*lines, *(f"{key}={value}" for key, value in replicate.items())]
        return replace(self, runs=runs, seeds=(), folds=(), pair=False, members=members)

    def needs(self, run: str) -> set[str]:
        """The runs that a run refers to."""
        return set(_REFERENCE.findall(" ".join(self.runs[run])))

    def lines(self, run: str, more: Sequence[str], folders: Mapping[str, str]) -> list[str]:
        """The settings of a run, with the folders of the earlier ones."""
        return [filled(line, folders) for line in [*self.settings, *self.runs[run], *more]]


def filled(line: str, folders: Mapping[str, str]) -> str:
    """A setting with the folders of the runs that it refers to."""
    return _REFERENCE.sub(lambda match: folders[match[1]], line)


def study_names() -> list[str]:
    """The studies of ``configs/study``."""
    return sorted(path.stem for path in (configs_dir() / "study").glob("*.yaml"))


def _check_whole_numbers(path: Path, key: str, values: object) -> None:
    if (
        not isinstance(values, list)
        or not all(isinstance(one, int) and not isinstance(one, bool) for one in values)
        or len(set(values)) < len(values)
    ):
        raise ValueError(f"{path}: expected {key!r} to be a list of different whole numbers such as [0, 1, 2], but got {values!r}.")
