"""Metrics of this package in a Lightning module of one's own."""

import json
import os
import subprocess
import sys

import lightning as L
import pytest
import torch
from cases import make_case
from conftest import ROOT
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from densecal.integrations.lightning import CalibrationCallback
from densecal.metrics import (
    DiceScore,
    ExpectedCalibrationError,
    FineGrainedOverlap,
    NegativeLogLikelihood,
    dice_score,
    expected_calibration_error,
    negative_log_likelihood,
)


class Module(L.LightningModule):
    """Somebody's module: logits are the image times a weight that moves a little each epoch."""

    def __init__(self, returns_probs=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.returns_probs = returns_probs

    def forward(self, image):
        return self.weight * image

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return {"probs": self(batch[0]).softmax(1)} if self.returns_probs else None

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def images(number=5, seed=0):
    case = make_case((4, 5), batch=number, seed=seed, dtype=torch.float32)
    return list(zip(case.logits, case.label_map, strict=True))


def together(data, weight=1.0):
    images, labels = (torch.stack(part) for part in zip(*data, strict=True))
    return (weight * images).softmax(1), labels


def trainer(*callbacks, **options):
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "accelerator": "cpu"}
    return L.Trainer(callbacks=list(callbacks), **(silent | options))


@pytest.mark.parametrize("source", ["module", "outputs"])
def test_callback_logs_the_value_of_the_epoch(source):
    data = images()
    from_outputs = source == "outputs"
    callback = CalibrationCallback(
        {"ece": ExpectedCalibrationError(num_bins=10), "dice": DiceScore(3, average="none"), "overlap": FineGrainedOverlap(3)},
        output_transform=(lambda outputs, batch: (outputs["probs"], batch[1])) if from_outputs else None,
        from_logits=not from_outputs,
        prefix="calibration/",
    )
    found = trainer(callback).validate(Module(from_outputs), DataLoader(data, batch_size=2), verbose=False)[0]
    probs, label = together(data)
    assert found["calibration/ece"] == pytest.approx(expected_calibration_error(probs, label, num_bins=10).item(), rel=1e-6)
    for c, value in enumerate(dice_score(probs, label).nanmean(0).tolist()):
        assert found[f"calibration/dice_{c}"] == pytest.approx(value, rel=1e-6)
    assert 0 < found["calibration/overlap_iou_image"] < 1
    assert len(found) == 1 + 3 + 22


def test_callback_starts_anew_each_epoch_and_leaves_the_sanity_check_out(tmp_path):
    data, seen = images(), []

    class Weights(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                seen.append((pl_module.weight.item(), trainer.callback_metrics["val/nll"].item()))

    class Sanity(L.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            assert "val/nll" not in trainer.callback_metrics
            self.ran = True

    callback, sanity = CalibrationCallback({"nll": NegativeLogLikelihood()}, from_logits=True), Sanity()
    best = ModelCheckpoint(tmp_path, monitor="val/nll", save_top_k=1)
    run = trainer(callback, sanity, Weights(), best, max_epochs=3, num_sanity_val_steps=1, enable_checkpointing=True)
    run.fit(Module(), DataLoader(data, batch_size=5), DataLoader(data, batch_size=2))
    assert sanity.ran
    assert len({weight for weight, _ in seen}) == 3
    for weight, nll in seen:
        assert nll == pytest.approx(negative_log_likelihood(*together(data, weight)).item(), rel=1e-5)
    assert best.best_model_score.item() == pytest.approx(min(nll for _, nll in seen))


def test_callback_several_loaders_and_dicts_and_test():
    first, second = images(), images(3, seed=1)
    callback = CalibrationCallback({"nll": NegativeLogLikelihood()}, from_logits=True)
    run = trainer(callback)
    found = run.validate(Module(), [DataLoader(first, batch_size=2), DataLoader(second, batch_size=2)], verbose=False)
    named = {key: value for one in found for key, value in one.items()}
    expected = [negative_log_likelihood(*together(data)).item() for data in (first, second)]
    assert [named[f"val/nll/dataloader_idx_{i}"] for i in range(2)] == pytest.approx(expected, rel=1e-6)

    class OfDicts(Module):
        def test_step(self, batch, batch_idx):
            pass

    dicts = [{"image": image, "label": label} for image, label in second]
    assert run.test(OfDicts(), DataLoader(dicts, batch_size=2), verbose=False) == [{"test/nll": pytest.approx(expected[1], rel=1e-6)}]


def test_callback_hands_logits_to_a_metric_that_takes_them():
    data = images()
    callback = CalibrationCallback({"ece": ExpectedCalibrationError(from_logits=True)})
    found = trainer(callback).validate(Module(), DataLoader(data, batch_size=2), verbose=False)[0]
    assert found["val/ece"] == pytest.approx(expected_calibration_error(*together(data)).item(), abs=1e-6)


def test_callback_regions_and_errors():
    logits, regions = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0)), torch.ones(4, 2, 5, dtype=torch.long)
    data = list(zip(logits, regions, strict=True))
    callback = CalibrationCallback({"dice": DiceScore(2, activation="sigmoid")}, from_logits=True)
    found = trainer(callback).validate(Module(), DataLoader(data, batch_size=2), verbose=False)[0]
    assert found["val/dice"] == pytest.approx(dice_score(logits.sigmoid(), regions, activation="sigmoid").mean().item(), rel=1e-6)
    with pytest.raises(TypeError, match=r"Expected metrics\['ece'\] to be a torchmetrics.Metric, but got str"):
        CalibrationCallback({"ece": "ece"})
    with pytest.raises(ValueError, match=r"Expected metrics\['ece'\] to take probabilities, .* softmax would be applied twice"):
        CalibrationCallback({"ece": ExpectedCalibrationError(from_logits=True)}, from_logits=True)
    with pytest.raises(ValueError, match=r"Expected `probs` in \[0, 1\] that sum to 1"):
        trainer(CalibrationCallback({"ece": ExpectedCalibrationError()})).validate(Module(), DataLoader(images()), verbose=False)


TWO_PROCESSES = """
import json, sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from integrations.test_lightning import Module, callback, images, trainer

torch.set_num_threads(1)
run = trainer(callback(), devices=2, strategy="ddp", use_distributed_sampler=False)
# Rank 0 has four images, rank 1 has one.
data = Subset(images(), range(4) if run.global_rank == 0 else range(4, 5))
found = run.validate(Module(), DataLoader(data, batch_size=2), verbose=False)[0]
Path(sys.argv[1], f"{run.global_rank}.json").write_text(json.dumps(found))
"""


def callback():
    return CalibrationCallback({"ece": ExpectedCalibrationError(), "overlap": FineGrainedOverlap(3)}, from_logits=True)


@pytest.mark.slow
def test_callback_over_two_processes_gives_the_value_of_all(tmp_path):
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")} | {"PYTHONPATH": str(ROOT / "tests")}
    result = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert result.returncode == 0, result.stderr
    expected = trainer(callback()).validate(Module(), DataLoader(images()), verbose=False)[0]
    assert expected["val/ece"] == pytest.approx(expected_calibration_error(*together(images())).item(), rel=1e-6)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(expected, rel=1e-6)
