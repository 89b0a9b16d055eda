"""Test a trained run on whole files, on the files' own grid, and write its predictions and its report."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import nibabel as nib
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from densecal.data import Case, DataCard, SegmentationData, override_card
from densecal.data.dataset import CaseDataset
from densecal.inference import Prediction, Predictor, write_prediction
from densecal.metrics import Evaluation, SegmentationEvaluation
from densecal.report import Example, write_report
from densecal.runs import read_record
from densecal.tasks import History, SegmentationTask

__all__ = ["evaluate_run"]

_PLANES = {"L": "sagittal", "R": "sagittal", "P": "coronal", "A": "coronal", "I": "axial", "S": "axial"}


def evaluate_run(folder: Path, data: SegmentationData, config: DictConfig, *, task: SegmentationTask, trainer: L.Trainer, history: History) -> None:
    """Predict every test case from its file, score it against the labels as stored, and have rank 0 write the report.

    Each rank takes its share of the cases; predictions are in single precision whatever the training used.
    """
    split = "test" if data.splits["test"] else "val" if data.splits["val"] else None
    if split is None:
        print("Nothing to test on: the card leaves no cases for testing or validation.")
        return
    checkpoint = config.evaluate if data.splits["val"] else "last"
    predictor = Predictor.from_run(folder, checkpoint, trainer.strategy.root_device)
    cases = data.splits[split]
    references = CaseDataset(cases, override_card(data.card, {"spacing": None, "orientation": None}), train=False)
    evaluation = SegmentationEvaluation(data.schema, num_bins=config.num_bins, foreground_radius=data.card.foreground_radius).to(predictor.device)
    mine = range(trainer.global_rank, len(cases), trainer.world_size)
    for index in tqdm(mine, desc="Testing", unit="case", leave=False, disable=not (trainer.is_global_zero and sys.stderr.isatty())):
        prediction = predictor(cases[index].image)
        write_prediction(prediction, folder / "predictions", cases[index].id, config.predictions)
        label = references[index]["label"].unsqueeze(0).to(predictor.device)
        evaluation.update(prediction.probs.unsqueeze(0).to(predictor.device), label, torch.tensor([index], device=predictor.device))
    result = evaluation.compute()
    if trainer.is_global_zero:
        examples = [_example(cases[i], predictor(cases[i].image), references[i]["label"]) for i in _worst_median_best(result)]
        facts = _facts(folder, data, config, split, checkpoint, task, trainer, history)
        page = write_report(
            folder, result, data.schema, facts, examples, history.rows, _notes(data.card, split), case_ids=[case.id for case in cases]
        )
        _print_scores(result, len(cases), split)
        print(f"report  {page.resolve()}", flush=True)
    trainer.strategy.barrier()


def _worst_median_best(result: Evaluation) -> list[int]:
    ranked = sorted((row for row in result.cases if row["dice"] == row["dice"]), key=lambda row: row["dice"])  # NaN is not equal to itself
    picked = [ranked[0], ranked[(len(ranked) - 1) // 2], ranked[-1]] if ranked else result.cases[:1]
    return list(dict.fromkeys(row["case_index"] for row in picked))


def _example(case: Case, prediction: Prediction, label: torch.Tensor) -> Example:
    volume = nib.load(case.image[0])
    image = torch.as_tensor(volume.get_fdata(dtype="float32"))  # type: ignore[attr-defined]
    planes = tuple(_PLANES[code] for code in nib.aff2axcodes(volume.affine))  # type: ignore[attr-defined]
    return Example(
        case.id,
        image.reshape(*image.shape[:3], -1)[..., 0].numpy(),
        (label[0] if label.shape[0] == 1 else label).numpy(),
        prediction.probs.numpy(),
        spacing=tuple(float(z) for z in volume.header.get_zooms()[:3]),  # type: ignore[attr-defined]
        axis_names=planes,
    )


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
    epoch = max((row["epoch"] for row in history.rows), default=-1) + 1
    device = torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "title": f"{card.name}: {_name(config.loss)}",
        "split": which,
        "data set": f"{card.name}" + (f" ({card.modality})" if card.modality else ""),
        "cases": {"training": sizes["train"], "validation": sizes["val"], "test": sizes["test"]},
        "licence": card.licence or None,
        "citation": list(card.citation),
        "model": f"{_name(config.model)}, {sum(p.numel() for p in task.model.parameters()) / 1e6:.2f} million parameters",
        "loss": _settings(config.loss),
        "optimizer": _settings(config.optimizer),
        "schedule": _settings(config.scheduler) if config.scheduler else "constant learning rate",
        "patch": " x ".join(str(n) for n in card.patch_size) + " voxels",
        "batch": f"{card.batch_size} per process, {trainer.world_size} process{'es' if trainer.world_size != 1 else ''}",
        "augmentation": card.augment,
        "epochs": epoch,
        "tested checkpoint": f"{checkpoint}" + (f" by {config.monitor}" if checkpoint == "best" else ""),
        "seed": config.seed,
        "precision": str(config.trainer.get("precision", "32-true")) + " in training, 32-bit in the test",
        "training time": _minutes(sum(row["seconds"] for row in history.rows)),
        "device": device,
        "commit": record["commit"],
        "versions": record["versions"],
        "started": record["started"],
    }


def _name(node: DictConfig) -> str:
    return str(node._target_).rpartition(".")[2]


def _items(node: DictConfig) -> list[tuple[str, Any]]:
    return [(str(key), value) for key, value in node.items()]


def _settings(node: DictConfig) -> str:
    """``Name (key value, ...)``, of nested objects too; terms by their names and weights."""
    words = [f"{key} {_spell(value)}" for key, value in _items(node) if not key.startswith("_") and value is not None]
    return _name(node) + (f" ({', '.join(words)})" if words else "")


def _spell(value: Any) -> str:
    if isinstance(value, DictConfig):
        if "_target_" in value:
            return _settings(value)
        return " + ".join(f"{_spell(item.weight)} {key}" if isinstance(item, DictConfig) and "weight" in item else key for key, item in _items(value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(list(value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _print_scores(result: Evaluation, num_cases: int, split: str) -> None:
    scalars = result.scalars()
    shown: Iterable[tuple[str, str]] = [
        ("dice", "Dice"),
        ("iou", "IoU"),
        ("ece", "ECE"),
        ("ece_foreground", "ECE near the structure"),
        ("nll", "NLL"),
    ]
    numbers = "  ".join(f"{name} {scalars[key]:.4f}" for key, name in shown if key in scalars)
    print(f"{split:<7} {num_cases} case{'s' if num_cases != 1 else ''}: {numbers}")
