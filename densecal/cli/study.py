"""A study: several training runs that belong together, from a YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from densecal.registry import near_matches
from densecal.resources import configs_dir

__all__ = ["Study", "study_names"]

_REFERENCE = re.compile(r"\$\{runs\.([^}]+)\}")


@dataclass(frozen=True)
class Study:
    """Runs to put side by side.

    Args:
        name: Of the study.
        runs: Name -> settings of its own; the others are compared with the first.
        settings: Of every run.
        evaluate: Settings of ``densecal-evaluate``.
        seeds: Each run is one for each of them, ``<name>_seed<seed>``, and refers to those of its own seed; empty: one of each, with the seed of the settings.
        methods: Run -> what it was called before its seeds were spelled out; empty where there are none.

    Raises:
        ValueError: If there are no runs, or one refers to a run that does not come before it.
    """

    name: str
    runs: Mapping[str, Sequence[str]]
    settings: Sequence[str] = ()
    evaluate: Sequence[str] = ()
    seeds: Sequence[int] = ()
    methods: Mapping[str, str] = field(default_factory=dict)

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
        allowed = ("runs", "settings", "evaluate", "seeds")
        if not isinstance(content, dict) or not isinstance(content.get("runs", {}), dict):
            raise ValueError(f"{path}: expected a mapping with {', '.join(allowed)}, of which `runs` is one of names to lists.")
        if unknown := [key for key in content if key not in allowed]:
            raise ValueError(f"{path}: {near_matches(str(unknown[0]), allowed)} It has {unknown[0]!r}.")
        lists = {"settings": content.get("settings") or [], "evaluate": content.get("evaluate") or [], **(content.get("runs") or {})}
        for key, value in lists.items():
            if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
                raise ValueError(f"{path}: expected {key!r} to be a list of texts such as loss=svls, but got {value!r}.")
        return cls(path.stem, content.get("runs") or {}, lists["settings"], lists["evaluate"], _whole_numbers(path, content.get("seeds") or []))

    def of_each_seed(self) -> Study:
        """The study with the runs of every seed spelled out, and ``methods`` to tell what each was."""
        if not self.seeds:
            return self
        runs, methods = {}, {}
        for name, own in self.runs.items():
            for seed in self.seeds:
                methods[f"{name}_seed{seed}"] = name
                lines = [_REFERENCE.sub(lambda match, seed=seed: f"${{runs.{match[1]}_seed{seed}}}", line) for line in own]  # type: ignore[misc]
                runs[f"{name}_seed{seed}"] = [*lines, f"seed={seed}"]
        return replace(self, runs=runs, seeds=(), methods=methods)

    def lines(self, run: str, more: Sequence[str], folders: Mapping[str, str]) -> list[str]:
        """The settings of a run, with the folders of the earlier ones."""
        return [_REFERENCE.sub(lambda match: folders[match[1]], line) for line in [*self.settings, *self.runs[run], *more]]


def study_names() -> list[str]:
    """The studies of ``configs/study``."""
    return sorted(path.stem for path in (configs_dir() / "study").glob("*.yaml"))


def _whole_numbers(path: Path, seeds: object) -> list[int]:
    if not isinstance(seeds, list) or not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: expected 'seeds' to be a list of different whole numbers such as [0, 1, 2], but got {seeds!r}.")
    return seeds
