"""Levels of each image in training: images and volumes, several outputs, accumulated batches, validation now and then, training in steps."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from densecal.inference import WholeImage
from densecal.labels import LabelSchema
from densecal.losses import ASLPLoss, CompoundLoss
from densecal.perturbation import AdaptivePerturbation, LossRule
from densecal.targets import SVLSTarget
from densecal.tasks import SegmentationTask
from densecal.terms import CrossEntropy, DiceSemimetric

SCHEMA = LabelSchema(["background", "left", "right"])
IDS = ["a", "b", "c"]
SIDES = {"2d": (8, 8), "3d": (8, 8, 8)}


class Network(nn.Module):
    """One convolution; while training also an output of half the size."""

    def __init__(self, dims, deep):
        super().__init__()
        self.conv = (nn.Conv2d if dims == 2 else nn.Conv3d)(1, 3, 3, padding=1)
        self.deep = deep

    def forward(self, image):
        logits = self.conv(image)
        if not (self.training and self.deep):
            return logits
        return [logits, logits[(..., *[slice(None, None, 2)] * (image.ndim - 2))]]


def make_batch(ids, sides, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(len(ids), 1, *sides, generator=generator),
        "label": torch.randint(0, 3, (len(ids), 1, *sides), generator=generator),
        "case_index": torch.arange(len(ids)),
        "case_id": ids,
    }


class Batches(torch.utils.data.Dataset):
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def loader(*batches):
    return DataLoader(Batches(batches), batch_size=None, num_workers=0)


def make_loss():
    loss = ASLPLoss(case_ids=IDS, warmup=1, eta=0.02, accuracy_weight=2.0)
    loss.target.alpha.fill_(0.15)
    return loss


class Replay(L.Callback):
    """A second loss, told of everything by hand: logits of a forward pass before each step, accuracies as they were logged."""

    def __init__(self):
        self.loss, self.logged, self.validations = make_loss(), [], 0

    def on_train_epoch_start(self, trainer, task):
        self.loss.on_epoch(trainer.current_epoch, trainer.max_epochs)

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        with torch.no_grad():
            self.loss(task.model.conv(batch["image"]), batch["label"], context=batch)

    def on_validation_end(self, trainer, task):
        self.validations += 1
        self.loss.on_validation({"accuracy": trainer.callback_metrics["val/accuracy"].item()})

    def on_train_epoch_end(self, trainer, task):
        self.loss.on_epoch_end()
        self.logged.append(trainer.callback_metrics["train/perturbation_mean"].item())


OPTIONS = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "now-and-then": {"check_val_every_n_epoch": 2},
    "within-the-epoch": {"val_check_interval": 2},
}


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES.keys())
@pytest.mark.parametrize("deep", [False, True], ids=["one-output", "two-outputs"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_training_sets_the_levels(sides, deep, options):
    torch.manual_seed(0)
    task = SegmentationTask(Network(len(sides), deep), make_loss(), SCHEMA, WholeImage(len(sides)), optimizer=partial(torch.optim.SGD, lr=0.1))
    replay = Replay()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 1}
    trainer = L.Trainer(accelerator="cpu", max_epochs=4, callbacks=[replay], **quiet, **options)
    replay.validations = 0
    batches = [make_batch(["a", "b"], sides), make_batch(["a", "a"], sides, 2), make_batch(["b", "a"], sides, 3)]
    trainer.fit(task, loader(*batches), loader(make_batch(["of the validation"], sides, 4)))
    levels = task.loss.target.alpha
    torch.testing.assert_close(levels, replay.loss.target.alpha)
    assert levels[2] == torch.tensor(0.15)
    assert (levels[:2] != torch.tensor(0.15)).all()
    assert replay.logged[:2] == pytest.approx([0.15, 0.15])
    assert replay.logged[3] != replay.logged[2] or "check_val_every_n_epoch" in options


def test_training_of_so_many_steps_updates_after_its_cut_epoch():
    """Three batches an epoch, four steps: the second epoch has one batch, and its levels are set by it."""
    torch.manual_seed(0)
    sides = SIDES["2d"]
    perturbation = AdaptivePerturbation(case_ids=IDS, rule=LossRule(), beta=1.0, warmup=1, label_target=SVLSTarget())
    loss = CompoundLoss(perturbation, {"ce": {"weight": 0.5, "term": CrossEntropy()}, "dml": {"weight": 0.5, "term": DiceSemimetric()}})
    task = SegmentationTask(Network(2, False), loss, SCHEMA, WholeImage(2), max_steps=4)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(task, loader(make_batch(["a", "b"], sides), make_batch(["a", "c"], sides, 2), make_batch(["c", "a"], sides, 3)))
    assert trainer.current_epoch == 2
    assert (perturbation.alpha[:2] > 0.05).all()
    assert perturbation.alpha[2] == 0
