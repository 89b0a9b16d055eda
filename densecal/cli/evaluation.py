"""Test a trained run on whole files, on the files' own grid, and write its predictions and its report."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from densecal.cli.facts import minutes, reference, target_name, training_facts
from densecal.data import DataCard, PredictedCase, SegmentationData
from densecal.data.validate import CaseFacts
from densecal.inference import Predictor, RunCases, write_description, write_prediction
from densecal.metrics import ClassPriorBaseline, Evaluation, SegmentationEvaluation, class_prior_baseline
from densecal.report import Example, write_report
from densecal.runs import read_record
from densecal.tasks import History, SegmentationTask

__all__ = ["add_case", "class_shares", "evaluate_run", "print_scores", "telling_examples"]

BOUNDARY_WIDTH = 3.0
"""Of the region along boundaries in a run's report, in voxels."""
SURFACE_TOLERANCE = 1.0
"""Up to this distance a surface counts as found in a run's report, in mm; only where there is a background for a structure to have a surface to."""


def evaluate_run(folder: Path, data: SegmentationData, config: DictConfig, *, task: SegmentationTask, trainer: L.Trainer, history: History) -> None:
    """Predict every test case from its file, score it against the labels as stored, and have rank 0 write the report.

    Each rank takes its share of the cases; predictions are in single precision whatever the training used.
    """
    split = "test" if data.splits["test"] else "val" if data.splits["val"] else None
    if split is None:
        print("Nothing to test on: the card leaves no cases for testing or validation.")
        return
    checkpoint = config.evaluate if data.splits["val"] else "last"
    cases = RunCases(Predictor.from_run(folder, checkpoint, trainer.strategy.root_device, trust_config=True), data.splits[split], data.card)
    evaluation = SegmentationEvaluation(
        data.schema,
        num_bins=config.num_bins,
        foreground_radius=data.card.foreground_radius,
        boundary_width=BOUNDARY_WIDTH,
        surface_tolerance=SURFACE_TOLERANCE if data.schema.has_structure else None,
        detail=True,
        replicates=1000,
        groups=[case.subject for case in cases.cases],
    ).to(cases.predictor.device)
    mine = range(trainer.global_rank, len(cases), trainer.world_size)
    for index in tqdm(mine, desc="Testing", unit="case", leave=False, disable=not (trainer.is_global_zero and sys.stderr.isatty())):
        prediction = cases.predict(index)
        write_prediction(prediction, folder / "predictions", cases.case_ids[index], config.predictions)
        add_case(evaluation, cases.beside_label(index, prediction), index)
    result = evaluation.compute()
    if trainer.is_global_zero:
        if "probs" in config.predictions:
            write_description(folder / "predictions", data.card)
        notes = _notes(data.card, split)
        facts = _facts(folder, data, config, split, checkpoint, task, trainer, history)
        shares = class_shares(data.facts("train"), data.card)
        baseline = None if shares is None else class_prior_baseline(result, shares)
        page = write_report(
            folder,
            result,
            data.schema,
            facts,
            telling_examples(result, cases, notes),
            history.rows,
            notes,
            case_ids=cases.case_ids,
            baseline=baseline,
            case_levels=task.loss.case_levels() if hasattr(task.loss, "case_levels") else None,  # type: ignore[operator]
        )
        print_scores(result, split, baseline)
        print(f"report  {page.resolve()}", flush=True)
    trainer.strategy.barrier()


def add_case(evaluation: SegmentationEvaluation, case: PredictedCase, index: int) -> None:
    """Score one case, whole."""
    device = evaluation.device
    spacing = None if case.spacing is None else torch.tensor(case.spacing, device=device)
    evaluation.update(case.probs.unsqueeze(0).to(device), case.label.unsqueeze(0).to(device), torch.tensor([index], device=device), spacing=spacing)


def class_shares(facts: Iterable[CaseFacts], card: DataCard) -> list[float] | None:
    """Share of each class or region among the labelled voxels of cases; None where there are none."""
    voxels = np.zeros(len(card.classes))
    for fact in facts:
        if fact.label_voxels.size:
            voxels += fact.label_voxels
    return card.region_counts(voxels / voxels.sum()) if voxels.sum() else None


def telling_examples(result: Evaluation, cases: Any, notes: list[str], case_ids: Sequence[str] | None = None) -> list[Example]:
    """The worst, the median and the best case by overlap, to be shown.

    Args:
        result: The results.
        cases: Gives cases by their names, and their images.
        notes: What cannot be shown is added to them.
        case_ids: Name of each case, by ``case_index``. By default those of ``cases``.
    """
    case_ids = cases.case_ids if case_ids is None else case_ids
    key = result.leading[1]
    ranked = sorted((row for row in result.cases if row[key] == row[key]), key=lambda row: row[key])  # NaN is not equal to itself
    picked = [ranked[0], ranked[(len(ranked) - 1) // 2], ranked[-1]] if ranked else result.cases[:1]
    examples = []
    for index in dict.fromkeys(row["case_index"] for row in picked):
        case, image = cases[case_ids[index]], None
        try:
            image = cases.image(case.case_id)
        except ValueError as error:
            notes.append(f"Shown without its image: {error}")
        examples.append(Example(case.case_id, image, case.label, case.probs, spacing=case.spacing or (), axis_names=case.axis_names))
    return examples


def _notes(card: DataCard, split: str) -> list[str]:
    notes = list(card.notes)
    if split == "val":
        notes.append("There is no test split: these are the validation cases, by which the best checkpoint was chosen. The scores flatter the model.")
    return notes


def _facts(
    folder: Path,
    data: SegmentationData,
    config: DictConfig,
    split: str,
    checkpoint: str,
    task: SegmentationTask,
    trainer: L.Trainer,
    history: History,
) -> dict[str, Any]:
    card, record = data.card, read_record(folder)
    sizes = {name: len(cases) for name, cases in data.splits.items()}
    which = f"{sizes[split]} {'test' if split == 'test' else 'validation'} case{'s' if sizes[split] != 1 else ''}"
    if split == "test" and card.test_root is not None:
        which = f"all {sizes[split]} cases of {Path(card.test_root).name}, a second data set"
    if split == "test" and card.fold is not None:
        which += f" of fold {card.fold} (counted from 0) of {card.num_folds}"
    epoch = max((row["epoch"] for row in history.rows), default=-1) + 1
    device = torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "title": f"{card.name}: {target_name(config.loss)}",
        "split": which,
        "data set": f"{card.name}" + (f" ({card.modality})" if card.modality else ""),
        "regions": {name: " + ".join(classes) for name, classes in card.region_classes.items()} or None,
        "reference": reference(card),
        "cases": {"training": sizes["train"], "validation": sizes["val"], "test": sizes["test"]},
        "licence": card.licence or None,
        "citation": list(card.citation),
        **training_facts(config, task.model),
        "batch": f"{card.batch_size} per process, {trainer.world_size} process{'es' if trainer.world_size != 1 else ''}",
        "epochs": epoch,
        "tested checkpoint": f"{checkpoint}" + (f" by {config.monitor}" if checkpoint == "best" else ""),
        "precision": str(config.trainer.get("precision", "32-true")) + " in training, 32-bit in the test",
        "training time": minutes(sum(row["seconds"] for row in history.rows)),
        "device": device,
        "commit": record["commit"],
        "versions": record["versions"],
        "started": record["started"],
    }


def print_scores(result: Evaluation, name: str, baseline: ClassPriorBaseline | None = None) -> None:
    """The few numbers that a terminal has room for, with their 95 % intervals over cases; below them those of a model that knows the class shares alone.

    Dice comes first where there is a structure before a background, soft Dice and QUBIQ Dice beside it where the reference is soft; mean IoU over the data set (D), per image (I) and per class (C) where every class counts.
    """
    scalars = result.scalars()
    if result.leading[0] == "dice":
        overlap = {"dice": "Dice", "soft_dice": "soft Dice", "qubiq_dice": "QUBIQ Dice"}
    else:
        one = result.settings.element.removesuffix("s")
        overlap = {"iou_dataset": "mIoU D", "iou_image": "I", "iou_class": "C", "accuracy": f"{one} accuracy"}
    shown = {**overlap, "ece": "ECE", "ece_foreground": "near the structure", "ece_boundary": "along boundaries", "nll": "NLL"}
    numbers = [f"{word} {_with_interval(scalars[key], result.intervals.get(key))}" for key, word in shown.items() if key in scalars]
    start = f"{name:<7} " if name else ""
    print(f"{start}{len(result.cases)} case{'s' if len(result.cases) != 1 else ''}: {', '.join(numbers)}")
    if baseline is not None:
        numbers = [f"{word} {baseline.scores[key]:.4f}" for key, word in shown.items() if key in baseline.scores and key != "ece_boundary"]
        print(f"{' ' * len(start)}class shares alone: {', '.join(numbers)}")


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.4f}" + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval and interval[0] == interval[0] else "")
