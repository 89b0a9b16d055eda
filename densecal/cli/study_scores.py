"""The scores of a study's runs: each network tested once, and its probabilities scored as they are and repaired."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from densecal.cli.evaluation import BOUNDARY_WIDTH, add_case
from densecal.cli.study import Study
from densecal.data import override_card
from densecal.data.layouts import subject_of
from densecal.inference import Predictor, RunCases, cases_of_split, resolve_device
from densecal.inference.calibration import FOLDER, Calibration, find_calibration
from densecal.inference.out_of_fold import tested_checkpoint
from densecal.metrics import SegmentationEvaluation
from densecal.report.study_scores import StudyScores, pair_of, read_scores
from densecal.runs import file_hash, find_checkpoint, read_record, read_splits

__all__ = ["missing_scores", "score_run"]

_HISTORY = (
    "val/dice",
    "val/iou_dataset",
    "val/ece",
    "val/ece_foreground",
    "val/ece_classwise",
    "val/ece_classwise_foreground",
    "val/nll",
    "val/nll_foreground",
)


def score_run(
    run: Path,
    method: str,
    replicate: Mapping[str, Any],
    settings: Sequence[str],
    *,
    posthoc: Sequence[str] = (),
    changes: Sequence[str] = (),
    device: str = "auto",
) -> list[StudyScores]:
    """Test a run on its test cases, or on others of its data set.

    Args:
        run: The run directory.
        method: What the study calls it.
        replicate: Which of the method's runs it is.
        settings: Of its own, in the study.
        posthoc: Names of calibrators that ``densecal-calibrate`` left in the run.
        changes: Of its card, ``key=value``, that make other cases those to be tested.
        device: Where to compute.

    Returns:
        The scores of the network as trained, then of each calibrator.

    Raises:
        ValueError: If a case was trained on, or cannot be read.
    """
    path = find_checkpoint(run, tested_checkpoint(run))
    predictor = Predictor.from_run(path, device=resolve_device(device), trust_config=True)  # the study trained it
    assert predictor.config is not None
    found: dict[str, Calibration | None] = {"": None}
    for name in posthoc:
        found[name] = find_calibration(name, {path: predictor.config.inference}, predictor.card)
    card = override_card(predictor.card, list(changes)) if changes else predictor.card
    _, chosen = cases_of_split(card, "test")
    splits = read_splits(run)
    seen = {case for name, side in splits.items() if name != "test" for case in side}
    if changes and (trained := [case.id for case in chosen if case.id in seen]):
        raise ValueError(
            f"held_out: {run} was trained on or chose by {len(trained)} of these cases ({trained[0]}, ...). They say nothing of new ones."
        )
    subjects = [subject_of(case.id, card) for case in chosen]
    cases = RunCases(predictor, chosen, card)
    evaluations = {
        name: SegmentationEvaluation(
            card.schema, num_bins=predictor.config.num_bins, foreground_radius=card.foreground_radius, boundary_width=BOUNDARY_WIDTH, detail=True
        ).to(predictor.device)
        for name in found
    }
    for index in tqdm(range(len(cases)), desc=f"Scoring {method}", unit="case", leave=False, disable=not sys.stderr.isatty()):
        case = cases[index]
        for name, calibration in found.items():
            probs = case.probs if calibration is None else calibration(case.probs, predictor.device)
            add_case(evaluations[name], replace(case, probs=probs), index)

    record = read_record(run)
    facts = {
        "settings": list(settings),
        "training_cases": len(splits["train"]),
        "epochs": predictor.config.data.epochs,
        "started": record.get("started"),
        "commit": record.get("commit"),
        "device": str(predictor.device),
        "torch": torch.__version__,
    }
    scores = []
    for name, calibration in found.items():
        repaired = {"found": calibration.calibrator.summary(), "fitted_on": len(calibration.facts["fitted_on"])} if calibration else {}
        scores.append(
            StudyScores.of(
                evaluations[name].compute(),
                method,
                posthoc=name,
                replicate=replicate,
                data=f"{card.name} ({', '.join(card.schema.names)})",
                case_ids=cases.case_ids,
                subjects=subjects,
                background=card.schema.background is not None,
                facts=facts | _made_of(run, name, changes) | repaired,
                history=() if name else _history(run),
            )
        )
    return scores


def missing_scores(runs: Mapping[str, Path], study: Study, folder: Path, changes: Sequence[str]) -> list[str]:
    """The runs of a study that a folder does not have the scores of, or has those of another checkpoint, calibrator or choice of cases."""
    try:
        there = read_scores(folder)
    except FileNotFoundError:
        there = []
    known = {(one.method, one.pair, one.posthoc): _origin(one.facts) for one in there}
    left = []
    for name, run in runs.items():
        member = study.members[name]
        wanted = {posthoc: _origin(_made_of(run, posthoc, changes)) for posthoc in ("", *study.posthoc)}
        pair = pair_of(member.replicate)
        if any(known.get((member.method, pair, posthoc)) != origin for posthoc, origin in wanted.items()):
            left.append(name)
    return left


def _made_of(run: Path, posthoc: str, changes: Sequence[str]) -> dict[str, Any]:
    """What scores come from: the files by their content, and what was changed of the card."""
    facts: dict[str, Any] = {"checkpoint": file_hash(find_checkpoint(run, tested_checkpoint(run))), "changes": list(changes)}
    return facts | ({"calibrator": file_hash(run / FOLDER / f"{posthoc}.safetensors")} if posthoc else {})


def _origin(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    return facts.get("checkpoint"), facts.get("calibrator"), tuple(facts.get("changes", ()))


def _history(run: Path) -> list[dict[str, float]]:
    """Validation numbers by epoch, counted from 1."""
    path = run / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for row in rows:
        numbers = {key: float(row[key]) for key in _HISTORY if row.get(key)}
        if numbers:
            found.append({"epoch": int(row["epoch"]) + 1, **numbers})
    return found
