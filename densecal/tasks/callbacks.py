"""Callbacks of a run: randomness without history, and a log that survives a restart."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from densecal.files import write_atomically
from densecal.seeds import derive_seed

__all__ = ["CompactProgressBar", "ConfigInCheckpoint", "EpochLines", "FirstCheckpoint", "History", "StatelessRandomness"]


class StatelessRandomness(L.Callback):
    """Seed torch's generators from (seed, epoch, batch, rank) before each training batch.

    Dropout and every other draw in the step then depend on where training is, not on how it got there, so a resumed run repeats the draws of an
    uninterrupted one. Lightning's checkpoints hold no generator state.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(derive_seed(self.seed, "step", trainer.current_epoch, batch_idx, trainer.global_rank))


class FirstCheckpoint(L.Callback):
    """Write a checkpoint before the first batch, from which a run that dies in its first epoch begins anew, to the same numbers.

    Args:
        path: Where to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            trainer.save_checkpoint(self.path)


class History(L.Callback):
    """One row an epoch of everything that was logged, in ``metrics.csv`` and in the checkpoint.

    The rows are part of the checkpoint's state: a resumed run continues the table exactly where its checkpoint left it, and the file is rewritten whole and
    atomically, so it never holds an epoch twice or half a line.

    Args:
        path: The CSV file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._started = 0.0
        self._validated = False

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started, self._validated = time.perf_counter(), False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        row: dict[str, float] = {"epoch": trainer.current_epoch, "step": trainer.global_step, "lr": optimizer.param_groups[0]["lr"]}
        row |= {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups[1:] if "name" in group}
        # Lightning keeps the scores of the last validation, however many epochs ago it was.
        row |= {name: float(value) for name, value in sorted(trainer.callback_metrics.items()) if self._validated or not name.startswith("val/")}
        row["seconds"] = round(time.perf_counter() - self._started, 3)
        self.rows.append(row)
        if trainer.is_global_zero:
            columns = list(dict.fromkeys(name for r in self.rows for name in r))
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            write_atomically(self.path, text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]


class CompactProgressBar(TQDMProgressBar):
    """Lightning's bar without the version number: loss and validation figures beside the count."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        items = dict(super().get_metrics(trainer, pl_module))
        items.pop("v_num", None)
        return items


class EpochLines(L.Callback):
    """One line per epoch, for logs and terminals that cannot redraw a bar."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first_epoch = 0
        self._validated = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started, self._first_epoch = time.perf_counter(), trainer.current_epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        done, total = trainer.current_epoch + 1, trainer.max_epochs or 0
        metrics = trainer.callback_metrics
        scene = "val/iou_dataset" in metrics and "val/ece_foreground" not in metrics  # as `Evaluation.leading`
        names = ("train/loss", "val/iou_dataset" if scene else "val/dice", "val/ece") if self._validated else ("train/loss",)
        shown = [(name, metrics.get(name)) for name in names]
        numbers = "  ".join(f"{name} {float(value):.4f}" for name, value in shown if value is not None)
        left = (time.perf_counter() - self._started) / (done - self._first_epoch) * (total - done)
        minutes, seconds = divmod(round(left), 60)
        print(f"epoch {done}/{total}  {numbers}  {minutes}:{seconds:02} left", flush=True)


class ConfigInCheckpoint(L.Callback):
    """Store the run's config in every checkpoint, so that a checkpoint alone is enough to build its network.

    Args:
        config: The resolved config, as plain Python containers.
        version: Version of densecal.
    """

    def __init__(self, config: dict[str, Any], version: str) -> None:
        self.content = {"version": version, "config": config}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["densecal"] = self.content
