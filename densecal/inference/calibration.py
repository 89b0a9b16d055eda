"""Calibrators beside the checkpoint that they were fitted for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from densecal.data.card import DataCard
from densecal.files import write_atomically
from densecal.posthoc import Calibrator, load_calibrator
from densecal.runs import file_hash

__all__ = ["FOLDER", "NOTE", "Calibration", "begin_calibrated", "facts_of", "find_calibration", "overlap_note", "read_calibration", "read_note"]

FOLDER = "calibration"
"""Of a run's folder, where ``densecal-calibrate`` leaves what it fits."""

NOTE = "calibration.json"
"""What lies beside calibrated probabilities: which calibrator made them, and which cases it was fitted on."""


@dataclass(frozen=True)
class Calibration:
    """A fitted calibrator and where it comes from.

    Args:
        name: Its method, ``"temperature"`` for example.
        calibrator: The calibrator.
        facts: What the file keeps beside it: ``classes``, ``fitted_on`` (names of cases), ``region``; of a run ``checkpoint`` (its hash) and ``inference``, of an ensemble
            ``members`` with these of each.
        path: The file.
    """

    name: str
    calibrator: Calibrator
    facts: Mapping[str, Any]
    path: Path

    def __call__(self, probs: Tensor, place: torch.device) -> Tensor:
        """Calibrate probabilities ``(C, *spatial)`` where there is room for them; the result is in main memory."""
        return self.calibrator.to(place)(probs.unsqueeze(0).to(place), from_probs=True)[0].cpu()

    @property
    def members(self) -> list[dict[str, Any]]:
        """The facts of each checkpoint that it was fitted for: one of a run, several of an ensemble, none of saved predictions."""
        return [member for member in self.facts.get("members", [self.facts]) if "checkpoint" in member]

    @property
    def words(self) -> str:
        """The calibrator in the words of a report."""
        found = ", ".join(f"{key} {value:.4g}" for key, value in self.calibrator.summary().items() if isinstance(value, float))
        cases = len(self.facts["fitted_on"])
        return f"{self.name}{f' ({found})' if found else ''}, fitted on {cases} case{'s' if cases != 1 else ''}"

    def overlap_note(self, case_ids: Iterable[str]) -> str | None:
        """A sentence that says how many of these cases it was fitted on; None where it has seen none of them."""
        return overlap_note(self.name, self.facts["fitted_on"], case_ids)


def overlap_note(name: str, fitted_on: Iterable[str], case_ids: Iterable[str]) -> str | None:
    """:meth:`Calibration.overlap_note`, from names alone."""
    seen, cases = set(fitted_on), list(case_ids)
    if not (repeated := [case_id for case_id in cases if case_id in seen]):
        return None
    return (
        f"{len(repeated)} of these {len(cases)} cases ({repeated[0]}{', ...' if len(repeated) > 1 else ''}) are those that {name} was fitted on: its calibration looks "
        "better here than it is on new cases."
    )


def read_calibration(path: Path) -> Calibration:
    """Read a calibrator's file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no calibrator of densecal's.
    """
    calibrator, facts = load_calibrator(path)
    lists = [facts.get("classes"), facts.get("fitted_on"), facts.get("members", [])]
    if not all(isinstance(one, list) for one in lists) or not all(isinstance(member, dict) for member in lists[-1]):
        raise ValueError(f"{path}: does not say what it was fitted on. Fit it again with densecal-calibrate.")
    return Calibration(path.name.removesuffix(".safetensors"), calibrator, facts, path)


def find_calibration(name: str, members: Mapping[Path, DictConfig], card: DataCard) -> Calibration:
    """The calibrator to use with a checkpoint, or with the mean of several.

    Args:
        name: One that ``densecal-calibrate`` left in the run of the only checkpoint, or a file.
        members: Checkpoint file -> how whole images are predicted with it.
        card: The data set card of the run.

    Raises:
        FileNotFoundError: If there is none; the text lists those that there are.
        ValueError: If it was fitted for other checkpoints, other classes or another way of predicting.
    """
    path = Path(name) if name.endswith(".safetensors") else _in_run(name, list(members))
    calibration = read_calibration(path)
    facts, schema = calibration.facts, card.schema
    if facts["classes"] != list(schema.names) or calibration.calibrator.activation != schema.activation:
        raise ValueError(f"{path}: was fitted for {facts['classes']}, but the network knows {list(schema.names)}.")
    fitted = calibration.members
    now = [facts_of("", checkpoint, inference) for checkpoint, inference in members.items()]
    if fitted and sorted(member["checkpoint"] for member in fitted) != sorted(member["checkpoint"] for member in now):
        if len(fitted) == len(now) == 1:
            raise ValueError(
                f"{path}: was fitted for another checkpoint than {next(iter(members))}, and says nothing about this one. Choose that one by checkpoint=best or last, or "
                "fit anew with densecal-calibrate."
            )
        raise ValueError(
            f"{path}: was fitted for {_mean_of(member.get('run') for member in fitted)}, and says nothing about {_mean_of(members)}. Give the same members, from the same "
            "checkpoints, or fit anew with densecal-calibrate."
        )
    then = {member["checkpoint"]: member.get("inference") for member in fitted}
    for member in now:
        if then.get(member["checkpoint"]) not in (None, member["inference"]):
            raise ValueError(
                f"{path}: was fitted for images predicted by {then[member['checkpoint']]}, not by {member['inference']}. Leave `inference` as it was, or fit anew with it."
            )
    return calibration


def facts_of(run: str, checkpoint: Path, inference: DictConfig) -> dict[str, Any]:
    """What a calibrator's file keeps of a checkpoint that it is fitted for: ``run`` (its folder), ``checkpoint_file``, ``checkpoint`` (its hash) and ``inference``."""
    return {
        "run": run,
        "checkpoint_file": checkpoint.name,
        "checkpoint": file_hash(checkpoint),
        "inference": OmegaConf.to_container(inference, resolve=True),
    }


def _in_run(name: str, checkpoints: Sequence[Path]) -> Path:
    """The file of a calibrator that is called by its name."""
    if len(checkpoints) > 1:
        raise ValueError(
            f"calibration: expected a file, calibration=DIR/{name}.safetensors, but got {name!r}: an ensemble has no folder of its own to look into. "
            f"densecal-calibrate ensemble=[RUN,RUN] posthoc=[{name}] fits one."
        )
    folder = checkpoints[0].resolve().parent.parent / FOLDER
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(p.name.removesuffix(".safetensors") for p in folder.glob("*.safetensors")))
        raise FileNotFoundError(
            f"calibration: no {path}. {f'There are: {there}.' if there else 'Fit one: densecal-calibrate run=DIR posthoc=[temperature].'}"
        )
    return path


def _mean_of(names: Iterable[object]) -> str:
    """Networks in words."""
    first, *others = map(str, names)
    return f"the mean of {', '.join([first, *others])}" if others else f"{first} alone"


def begin_calibrated(folder: Path, calibration: Calibration | None) -> bool:
    """Say in a folder of predictions which calibrator they have been through, before the first is written.

    Args:
        folder: Where predictions go.
        calibration: None for predictions as the network gives them.

    Returns:
        Whether the folder was begun before, with the same calibrator.

    Raises:
        ValueError: If it holds predictions of another calibrator, or of none where this is one.
    """
    path, held = folder / NOTE, read_note(folder)
    name = None if calibration is None else file_hash(calibration.path)
    if held is not None and held.get("calibrator") != name:
        raise ValueError(
            f"{folder}: holds predictions that {held.get('method')} has calibrated (see {NOTE} there). Choose an empty folder, or remove this one."
        )
    if calibration is None or held is not None:
        return held is not None
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty, and calibrated predictions must not mix with others. Choose an empty folder.")
    content = {
        "method": calibration.name,
        "calibrator": name,
        "found": calibration.calibrator.summary(),
        "classes": calibration.facts["classes"],
        "fitted_on": calibration.facts["fitted_on"],
    }
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return False


def read_note(folder: Path) -> dict[str, Any] | None:
    """What :func:`begin_calibrated` wrote; None where there is none.

    Raises:
        ValueError: If it is damaged.
    """
    path = folder / NOTE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content["fitted_on"], list) or not isinstance(content["method"], str):
            raise TypeError
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: does not say how these probabilities were calibrated. Mend it, or move it out of the folder.") from None
    return content
