"""Randomness without history, and a log that survives a restart."""

import csv
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from densecal.tasks import AtomicCheckpointIO, EpochLines, History, StatelessRandomness


class Draws(L.LightningModule):
    """Logs a random number per epoch, and remembers those of every step."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.drawn = {}

    def training_step(self, batch, batch_idx):
        draw = torch.rand(())
        self.drawn[self.current_epoch, batch_idx] = draw.item()
        self.log("train/loss", draw, on_step=False, on_epoch=True, batch_size=1)
        return self.layer(batch).sum() * draw

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, epochs: int, seed: int = 0, resume: Path | None = None, callbacks=()) -> tuple[Draws, History, L.Trainer]:
    model, history = Draws(), History(folder / "metrics.csv")
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[StatelessRandomness(seed), history, *callbacks],
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(torch.ones(3, 1)), ckpt_path=resume, weights_only=True if resume else None)
    return model, history, trainer


def read(path: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(path.open())]


def test_draws_depend_on_seed_epoch_and_step_alone(tmp_path):
    torch.manual_seed(1)
    first, _, _ = fit(tmp_path, 3)
    torch.manual_seed(2)
    torch.rand(100)
    again, _, _ = fit(tmp_path, 3)
    other, _, _ = fit(tmp_path, 3, seed=1)
    assert first.drawn == again.drawn
    assert len(set(first.drawn.values())) == 9
    assert not set(first.drawn.values()) & set(other.drawn.values())


def test_history_goes_on_where_the_checkpoint_left_it(tmp_path):
    fit(tmp_path, 4)
    whole = read(tmp_path / "metrics.csv")
    assert [row["epoch"] for row in whole] == ["0", "1", "2", "3"]
    assert [row["step"] for row in whole] == ["3", "6", "9", "12"]

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    # The file runs ahead of the checkpoint by an epoch, as after a kill.
    fit(tmp_path, 3, callbacks=[Save()])
    assert len(read(tmp_path / "metrics.csv")) == 3
    fit(tmp_path, 4, resume=tmp_path / "two.ckpt")
    assert read(tmp_path / "metrics.csv") == whole


def test_history_has_a_column_for_scores_that_come_later(tmp_path):
    class Late(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.callback_metrics["train/late"] = torch.tensor(0.5)

    model, history = Draws(), History(tmp_path / "metrics.csv")
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_epochs=2, accelerator="cpu", callbacks=[Late(), history], **options).fit(model, DataLoader(torch.ones(3, 1)))
    assert [row["train/late"] for row in read(tmp_path / "metrics.csv")] == ["", "0.5"]


def test_scores_are_those_of_the_epoch_itself(tmp_path, capsys):
    """Validated after every second epoch: nothing is said of the others."""

    class Validated(Draws):
        def validation_step(self, batch, batch_idx):
            self.log("val/dice", torch.tensor(float(self.current_epoch)), batch_size=1)

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    callbacks = [History(tmp_path / "metrics.csv"), EpochLines()]
    trainer = L.Trainer(max_epochs=5, check_val_every_n_epoch=2, accelerator="cpu", callbacks=callbacks, **options)
    trainer.fit(Validated(), DataLoader(torch.ones(3, 1)), DataLoader(torch.ones(1, 1)))
    assert [row["val/dice"] for row in read(tmp_path / "metrics.csv")] == ["", "1.0", "", "3.0", ""]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["val/dice" in line for line in lines] == [False, True, False, True, False]


def test_history_has_a_column_for_the_rate_of_each_named_group(tmp_path):
    class TwoGroups(Draws):
        def configure_optimizers(self):
            weight, bias = self.layer.parameters()
            return torch.optim.SGD([{"params": [weight], "name": "head"}, {"params": [bias], "name": "encoder", "lr": 0.02}], lr=0.1)

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[History(tmp_path / "metrics.csv")], **options).fit(
        TwoGroups(), DataLoader(torch.ones(3, 1))
    )
    (row,) = read(tmp_path / "metrics.csv")
    assert (row["lr"], row["lr_encoder"]) == ("0.1", "0.02")


def test_one_line_an_epoch(tmp_path, capsys):
    model, _, _ = fit(tmp_path, 2, callbacks=[EpochLines()])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    mean = sum(model.drawn[0, step] for step in range(3)) / 3
    assert lines[0].startswith(f"epoch 1/2  train/loss {mean:.4f}  ")
    assert lines[1].endswith("0:00 left")


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ({"dice": 0.5, "iou_dataset": 0.25, "ece_foreground": 0.1, "ece": 0.2}, "val/dice 0.5000  val/ece 0.2000"),
        ({"dice": 0.5, "iou_dataset": 0.25, "ece": 0.2}, "val/iou_dataset 0.2500  val/ece 0.2000"),
    ],
    ids=["structure", "scene"],
)
def test_one_line_an_epoch_shows_the_overlap_that_leads(scores, shown, tmp_path, capsys):
    lines = EpochLines()

    class Scores(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            lines.on_validation_end(trainer, pl_module)
            trainer.callback_metrics.update({f"val/{name}": torch.tensor(value) for name, value in scores.items()})

    fit(tmp_path, 1, callbacks=[Scores(), lines])
    assert f"  {shown}  0:00 left" in capsys.readouterr().out
