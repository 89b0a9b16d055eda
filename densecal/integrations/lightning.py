"""Metrics of this package in a Lightning module of one's own, without a change to it.

Example:
    >>> import lightning as L
    >>> from densecal.integrations.lightning import CalibrationCallback
    >>> from densecal.metrics import BrierScore, ExpectedCalibrationError
    >>> callback = CalibrationCallback({"ece": ExpectedCalibrationError(), "brier": BrierScore()}, from_logits=True)
    >>> trainer = L.Trainer(callbacks=[callback], logger=False, accelerator="cpu", enable_checkpointing=False)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
from torch import Tensor
from torchmetrics import Metric

from densecal.integrations.named_values import check_takes_probs, named_numbers
from densecal.ops.activation import Activation, probabilities

__all__ = ["CalibrationCallback"]


class CalibrationCallback(L.Callback):
    """Feeds metrics with what a module predicts in validation and test, and logs them at the end of each such epoch.

    The values are those of the whole epoch, over all processes; they can be monitored by ``ModelCheckpoint`` and ``EarlyStopping``. The sanity check before
    training is left out. With several data loaders each has values of its own, named ``<prefix><name>/dataloader_idx_<i>``, as Lightning does.

    Args:
        metrics: Metrics by name. A metric with several named values logs each as ``<name>_<its name>``, one with a value per class as ``<name>_<class>``.
        output_transform: Takes what the step returned and the batch, ``(outputs, batch)``, and returns what the metrics' ``update`` takes, in its order:
            predictions, labels, perhaps a mask. By default the module is run once more on the batch's image: ``(image, label)``, or a dict with ``"image"``
            and ``"label"``.
        from_logits: The predictions are logits, which become probabilities as each metric's ``activation`` says (softmax where it has none). False: they are
            probabilities.
        prefix: Before the names in validation.
        test_prefix: Before the names in a test.

    Raises:
        TypeError: If one of ``metrics`` is not a ``torchmetrics.Metric``.
        ValueError: If ``from_logits`` and one of them takes logits itself.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        *,
        output_transform: Callable[[Any, Any], Sequence[Any]] | None = None,
        from_logits: bool = False,
        prefix: str = "val/",
        test_prefix: str = "test/",
    ) -> None:
        for name, metric in metrics.items():
            if not isinstance(metric, Metric):
                raise TypeError(f"Expected metrics[{name!r}] to be a torchmetrics.Metric, but got {type(metric).__name__}.")
            if from_logits:
                check_takes_probs(f"metrics[{name!r}]", metric)
        self.metrics = dict(metrics)
        self.output_transform = output_transform
        self.from_logits, self.prefix, self.test_prefix = from_logits, prefix, test_prefix
        self._of_loader: list[dict[str, Metric]] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(pl_module, trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(pl_module, trainer.num_test_batches)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self._update(pl_module, outputs, batch, dataloader_idx)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._update(pl_module, outputs, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log(pl_module, self.prefix)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(pl_module, self.test_prefix)

    def _start(self, pl_module: L.LightningModule, batches: Sequence[Any]) -> None:
        # One set for each loader on every rank, batches or not: computing waits for all ranks.
        while len(self._of_loader) < len(batches):
            self._of_loader.append(self.metrics if not self._of_loader else {name: metric.clone() for name, metric in self.metrics.items()})
        del self._of_loader[len(batches) :]
        for metrics in self._of_loader:
            for metric in metrics.values():
                metric.reset()
                metric.to(pl_module.device)

    def _update(self, pl_module: L.LightningModule, outputs: Any, batch: Any, dataloader_idx: int) -> None:
        prediction, *rest = self.output_transform(outputs, batch) if self.output_transform is not None else self._predict(pl_module, batch)
        made: dict[Activation, Tensor] = {}
        for metric in self._of_loader[dataloader_idx].values():
            activation: Activation = getattr(metric, "activation", "softmax")
            if activation not in made:
                made[activation] = probabilities(prediction, activation) if self.from_logits else prediction
            metric.update(made[activation], *rest)

    def _predict(self, pl_module: L.LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
        image, label = (batch["image"], batch["label"]) if isinstance(batch, Mapping) else batch
        return pl_module(image), label

    def _log(self, pl_module: L.LightningModule, prefix: str) -> None:
        for i, metrics in enumerate(self._of_loader):
            suffix = f"/dataloader_idx_{i}" if len(self._of_loader) > 1 else ""
            for name, metric in metrics.items():
                for key, number in named_numbers(name, metric.compute()).items():
                    # Every rank has the value of all ranks, of which the mean is the same; Lightning would warn without.
                    pl_module.log(f"{prefix}{key}{suffix}", number.float(), sync_dist=True, add_dataloader_idx=False)
