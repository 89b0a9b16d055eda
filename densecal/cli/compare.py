"""``densecal-compare``: several runs, one after another, and one report of all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from densecal.cli.configuration import CommandError, prepare_arguments
from densecal.cli.settings import register_settings
from densecal.files import write_atomically
from densecal.registry import near_matches
from densecal.resources import configs_dir
from densecal.runs import RECORD, find_checkpoint

__all__ = ["Study", "compare", "main"]

_HELP = """\
Train several runs one after another, test them on the same cases and put them side by side. What is done already is not done again, and what was stopped goes on.

  densecal-compare study=distill_hippocampus data.root=DIR                      a study of configs/study, or a file of your own: study=my_study.yaml
  densecal-compare study=distill_hippocampus data.epochs=10 output=runs/quick   settings of densecal-train, for every run
  densecal-compare study=distill_hippocampus runs.teacher=runs/EXPERIMENT/TIME  a run that is there already

Studies: {studies}.

Settings:
  study=NAME       what to run, a name or a YAML file with
                     settings: [KEY=VALUE, ...]          of densecal-train, for every run
                     runs: {{NAME: [KEY=VALUE, ...]}}      what each has of its own; ${{runs.NAME}} stands for the folder of an earlier one; the others are compared
                                                         with the first
                     evaluate: [KEY=VALUE, ...]          of densecal-evaluate
  output=DIR       where the runs and the report go; by default runs/studies/NAME
  runs.NAME=DIR    a run directory or checkpoint file instead of training NAME
  anything else    is a setting of densecal-train, for every run that is trained
"""

_REFERENCE = re.compile(r"\$\{runs\.([^}]+)\}")
_OURS = {
    "output_dir": "output=DIR says where the runs go",
    "experiment_name": "the study names its runs",
    "resume": "what was stopped goes on by itself",
}


@dataclass(frozen=True)
class Study:
    """Runs to put side by side.

    Args:
        name: Of the study.
        runs: Name -> settings of its own; the others are compared with the first.
        settings: Of every run.
        evaluate: Settings of ``densecal-evaluate``.

    Raises:
        ValueError: If there are no runs, or one refers to a run that does not come before it.
    """

    name: str
    runs: Mapping[str, Sequence[str]]
    settings: Sequence[str] = ()
    evaluate: Sequence[str] = field(default_factory=list)

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
            raise FileNotFoundError(f"No study {name!r}. {near_matches(name, _names())}")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]}).") from None
        allowed = ("runs", "settings", "evaluate")
        if not isinstance(content, dict) or not isinstance(content.get("runs", {}), dict):
            raise ValueError(f"{path}: expected a mapping with {', '.join(allowed)}, of which `runs` is one of names to lists.")
        if unknown := [key for key in content if key not in allowed]:
            raise ValueError(f"{path}: {near_matches(str(unknown[0]), allowed)} It has {unknown[0]!r}.")
        lists = {"settings": content.get("settings") or [], "evaluate": content.get("evaluate") or [], **(content.get("runs") or {})}
        for key, value in lists.items():
            if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
                raise ValueError(f"{path}: expected {key!r} to be a list of texts such as loss=svls, but got {value!r}.")
        return cls(path.stem, content.get("runs") or {}, lists["settings"], lists["evaluate"])

    def lines(self, run: str, more: Sequence[str], folders: Mapping[str, str]) -> list[str]:
        """The settings of a run, with the folders of the earlier ones."""
        return [_REFERENCE.sub(lambda match: folders[match[1]], line) for line in [*self.settings, *self.runs[run], *more]]


def main() -> None:
    """Compare; see ``densecal-compare --help``."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(_HELP.format(studies=", ".join(_names())), end="")
        return
    try:
        compare(sys.argv[1:])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nStopped. The same command goes on from there.") from None


def compare(arguments: Sequence[str]) -> Path:
    """Train what is left to train of a study, evaluate, and write the comparison.

    Nothing is started before every setting of every run has been checked.

    Returns:
        The folder of the comparison.

    Raises:
        CommandError: What the user can mend.
    """
    given, more = _parsed(arguments)
    if "study" not in given:
        raise CommandError(f"Missing: study. Give it as study=NAME. {near_matches('', _names())}")
    study = Study.load(given.pop("study"))
    folder = Path(given.pop("output", f"runs/studies/{study.name}"))
    there = {key.removeprefix("runs."): str(Path(value).resolve()) for key, value in given.items()}
    if unknown := [name for name in there if name not in study.runs]:
        raise CommandError(f"runs.{unknown[0]}: {near_matches(unknown[0], study.runs)}")
    for path in there.values():
        _checkpoint(path)
    _check(study, more)

    trained = dict(there)
    begun = _begun(study, folder, there, more)
    for name in study.runs:
        if name not in there:
            trained[name] = str(_train(name, study.lines(name, more, trained), folder, begun).resolve())
    models = ",".join(f"{name}:'{trained[name]}'" for name in study.runs)
    page = folder / "comparison"
    _call("evaluate", "the comparison", [f"run={{{models}}}", f"output={page}", *study.evaluate])
    return page


def _names() -> list[str]:
    return sorted(path.stem for path in (configs_dir() / "study").glob("*.yaml"))


def _parsed(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What is for the study itself, and the settings of its runs."""
    given: dict[str, str] = {}
    more: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith("-") or not equals:
            raise CommandError(f"Cannot read {argument!r}. Settings are written key=value, for example study=distill_hippocampus; --help lists them.")
        if key in _OURS:
            raise CommandError(f"{key} cannot be set: {_OURS[key]}.")
        if key in ("study", "output") or key.startswith("runs."):
            given[key] = value
        else:
            more.append(argument)
    return given, more


def _checkpoint(path: str) -> None:
    """That a run which is not to be trained has a checkpoint at all."""
    try:
        find_checkpoint(Path(path), "last")
    except FileNotFoundError:
        find_checkpoint(Path(path), "best")


def _check(study: Study, more: Sequence[str]) -> None:
    """Every setting of every run, and of the evaluation."""
    register_settings()
    places = dict.fromkeys(study.runs, "runs/of/another")
    for name in study.runs:
        try:
            prepare_arguments(study.lines(name, more, places), "train")
        except CommandError as error:
            raise CommandError(f"{name}: {error}") from None
    prepare_arguments(study.evaluate, "evaluate")


def _begun(study: Study, folder: Path, there: Mapping[str, str], more: Sequence[str]) -> dict[str, Path]:
    """The runs that were begun before, which must have been made with the same settings; note those of all."""
    begun = {name: runs[-1] for name in study.runs if name not in there and (runs := _runs(folder, name))}
    path = folder / "study.json"
    noted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    places = {name: there.get(name, f"${{runs.{name}}}") for name in study.runs}
    wanted = {name: study.lines(name, more, places) for name in study.runs if name not in there}
    for name in begun:
        was, now = noted.get(name, []), wanted[name]
        if different := [line for line in [*was, *now] if (line in was) != (line in now)]:
            raise CommandError(
                f"{begun[name]}: the run {name} was {'made' if different[0] in was else 'not made'} with {different[0]}. Choose another output=DIR, or remove {folder / name}."
            )
    write_atomically(path, json.dumps(wanted, indent=2) + "\n")
    return begun


def _runs(folder: Path, name: str) -> list[Path]:
    """The run directories of a name, the newest last."""
    return sorted(record.parent for record in (folder / name).glob(f"*/{RECORD}"))


def _train(name: str, settings: list[str], folder: Path, begun: Mapping[str, Path]) -> Path:
    """Train a run to its end, if it has not come to it before, and return its directory."""
    if name in begun and (begun[name] / "report.html").is_file():
        print(f"{name}: done, {begun[name]}", flush=True)
        return begun[name]
    if name in begun and (begun[name] / "checkpoints" / "last.ckpt").is_file():
        settings = [f"resume={begun[name]}"]
    else:
        settings = [*settings, f"output_dir={folder}", f"experiment_name={name}"]
    print(f"{name}: densecal-train {' '.join(settings)}", flush=True)
    _call("train", name, settings)
    return _runs(folder, name)[-1]


def _call(command: str, name: str, settings: Sequence[str]) -> None:
    """Each in a process of its own, as if typed: nothing of a run is left for the next one."""
    code = subprocess.call([sys.executable, "-m", f"densecal.cli.{command}", *settings])
    if code:
        raise CommandError(f"{name} stopped with exit status {code}; what it said is above. The same command goes on from there.")


if __name__ == "__main__":
    main()
