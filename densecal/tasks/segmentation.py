"""One network, one loss: a training run of a segmentation model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from densecal.checks import check_choice, check_positive
from densecal.inference import Inferer, full_resolution
from densecal.labels import LabelSchema
from densecal.losses import CompoundLoss, DeepSupervisionLoss
from densecal.metrics import Evaluation, SegmentationEvaluation
from densecal.targets.base import check_activation
from densecal.tasks.non_finite import NON_FINITE, NonFinite, NonFiniteLoss, describe_fault, finite_everywhere, weights_are_finite

__all__ = ["SegmentationTask"]

_TRAINING_LENGTH = ("total_iters", "T_max", "total_steps")
"""What torch's schedulers call the number of steps after which they are done."""

_RATES = ("max_lr", "base_lr")
"""What torch's schedulers call learning rates of their own that they take one by one for each group of parameters."""


class SegmentationTask(L.LightningModule):
    """Train a segmentation network with any loss; validate with calibration metrics on whole images.

    One task for classes that exclude each other, for one foreground and for regions that may overlap: the schema says which, and with it whether a softmax or a sigmoid
    makes probabilities of logits, how many channels there are, and what labels look like.

    Batches are those of :class:`densecal.data.SegmentationData`. What the loss declares in ``needs`` is taken from the batch and handed over as ``context``.
    Networks that return several outputs while training (deep supervision, an auxiliary head) have the loss applied to each of them, with the weights in the
    network's attribute ``output_weights`` if it has one, else those of :class:`densecal.losses.DeepSupervisionLoss`.
    The loss is told of epochs, steps and validations where it has the hooks ``on_epoch``, ``on_epoch_end``, ``on_step`` and ``on_validation``; one that
    ``wants_validation_logits`` is shown each validation batch, with its logits averaged over windows and views.

    Logged: ``train/loss`` and ``train/loss_<term>`` for each term of a compound loss; ``train/<name>`` for the loss's ``numbers()`` as an epoch begins; after each
    validation ``val/<score>`` for everything in
    ``Evaluation.scalars()``: ``val/dice``, ``val/ece``, ``val/ece_foreground``, ``val/nll``, ...

    Args:
        model: Network from ``(N, C_in, *patch)`` to logits ``(N, C, *patch)``.
        loss: densecal's losses, or any module that takes logits and labels ``(N, 1, *patch)`` (soft labels and regions ``(N, C, *patch)``) and returns a scalar.
        schema: The classes, or regions.
        window: Predicts whole images.
        optimizer: Makes the optimizer from the parameters of network and loss. Default: Adam.
        scheduler: Makes a learning-rate schedule from the optimizer; it is stepped after every batch, and where it has an argument for the number of steps
            (``total_iters``, ``T_max`` or ``total_steps``) that is not given, it is the whole training.
        encoder_lr_ratio: Learning rate of ``model.encoder`` as a share of the others', > 0; 0.1 is customary for encoders that were trained before. The rates that a
            schedule is given (``max_lr``, ``base_lr``) are multiplied, too.
        max_steps: Optimizer steps after which training ends, be it within an epoch, which is then validated like any other; ``None``: as many epochs as the trainer
            has. A trainer of ``max_epochs=-1`` is given the number of epochs that this takes. (Lightning's own ``max_steps`` skips that last validation, and a run
            that was resumed ends with fewer steps.)
        non_finite: What becomes of a batch whose loss is NaN or infinite: ``"stop"`` raises, naming its cases; ``"skip"`` leaves it out, with a line that names them: no
            step is taken, and neither what the loss keeps nor the network's running statistics see it. Of several ranks all do the same. Gradients that a scaler of
            16-bit training finds infinite are its own affair.
        max_skipped: Skipped batches in a row after which training stops all the same, > 0.
        num_bins: Bins of the calibration errors.
        foreground_radius: How far the near-structure region reaches, in voxels.

    Raises:
        ValueError: If a loss of densecal's has another activation than the schema, or returns one value per pixel; if ``encoder_lr_ratio`` is not above 0, or not 1 for
            a network without ``encoder``; if ``max_steps`` is not above 0, or ``non_finite`` unknown.
        NonFiniteLoss: In training, see ``non_finite``.

    Reference:
        Each loss names its own.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        schema: LabelSchema,
        window: Inferer,
        *,
        optimizer: Callable[..., Optimizer] = torch.optim.Adam,
        scheduler: Callable[..., LRScheduler] | None = None,
        encoder_lr_ratio: float = 1.0,
        max_steps: int | None = None,
        non_finite: NonFinite = "stop",
        max_skipped: int = 10,
        num_bins: int = 15,
        foreground_radius: int = 3,
    ) -> None:
        super().__init__()
        check_activation(loss, schema)
        check_positive("encoder_lr_ratio", encoder_lr_ratio)
        check_choice("non_finite", non_finite, NON_FINITE)
        check_positive("max_skipped", max_skipped)
        if max_steps is not None:
            check_positive("max_steps", max_steps)
        if encoder_lr_ratio != 1 and not isinstance(getattr(model, "encoder", None), nn.Module):
            raise ValueError(
                f"Expected a network with an `encoder` for `encoder_lr_ratio` {encoder_lr_ratio}, but {type(model).__name__} has none. Leave the ratio at 1, or "
                "take a network of segmentation-models-pytorch."
            )
        self.model = model
        self.loss = loss
        self.schema = schema
        self.window = window
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.encoder_lr_ratio = encoder_lr_ratio
        self.max_steps = max_steps
        self.non_finite = non_finite
        self.max_skipped = max_skipped
        self._skipped = 0  # in a row
        self._learned = False  # from a batch since the last step
        self.val_evaluation = SegmentationEvaluation(schema, num_bins=num_bins, foreground_radius=foreground_radius)
        self.spatial_dims = window.spatial_dims

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(N, C, *spatial)`` of images ``(N, C_in, *spatial)``."""
        return full_resolution(self.model(image), self.spatial_dims)

    def losses(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its unweighted terms by name where it has any.

        Raises:
            ValueError: If the loss is not a scalar, or needs something that the batch does not hold.
        """
        label = batch["label"]
        loss: nn.Module = self.loss
        if isinstance(outputs, (list, tuple)) or outputs.ndim > batch["image"].ndim:
            loss = DeepSupervisionLoss(loss, weights=getattr(self.model, "output_weights", None), spatial_dims=self.spatial_dims)
        context = self._context(batch)
        parts: dict[str, Tensor] = {}
        if isinstance(self.loss, CompoundLoss):
            parts = loss.terms(outputs, label, context=context)  # type: ignore[operator]
            total = self.loss.total(parts)
        else:
            total = loss(outputs, label, context=context) if hasattr(loss, "needs") else loss(outputs, label)
        if total.ndim:
            raise ValueError(f"Expected the loss to be one number, but got shape {tuple(total.shape)}. Set its reduction to mean.")
        return total, parts

    def _context(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: batch[name] for name in getattr(self.loss, "needs", ()) if name in batch}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        skipping = self.non_finite == "skip"
        statistics = [buffer.clone() for buffer in self.model.buffers()] if skipping else []
        outputs = self.model(batch["image"])
        outputs_of_all = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
        if skipping and not finite_everywhere(*outputs_of_all):  # before the loss sees them and keeps something
            return self._skip(outputs_of_all, batch, {}, statistics)
        total, parts = self.losses(outputs, batch)
        if not finite_everywhere(total):
            return self._skip(outputs_of_all, batch, parts, statistics)
        self._skipped, self._learned = 0, True
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(batch["image"]), "sync_dist": True}
        self.log("train/loss", total, prog_bar=True, **options)
        if len(parts) > 1:
            self.log_dict({f"train/loss_{name}": value.detach() for name, value in parts.items()}, **options)
        return total

    def _skip(self, outputs: list[Tensor], batch: dict[str, Any], parts: Mapping[str, Tensor], statistics: list[Tensor]) -> Tensor:
        """A loss without a gradient for a batch that is left out, after a line about it.

        Raises:
            NonFiniteLoss: If it is not to be left out.
        """
        finite = weights_are_finite([self.model, self.loss])
        fault = describe_fault(outputs, batch, parts, weights_finite=finite)
        if self.non_finite == "stop":
            raise NonFiniteLoss(fault + (" non_finite=skip leaves such batches out." if finite else ""))
        self._skipped += 1
        if not finite:
            raise NonFiniteLoss(fault)
        if self._skipped > self.max_skipped:
            raise NonFiniteLoss(f"{fault} So were the {self.max_skipped} batches before it, which were skipped.")
        if self.trainer.is_global_zero:
            print(f"skipped a batch of epoch {self.current_epoch + 1}: {fault}", flush=True)
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), statistics, strict=True):
                buffer.copy_(before)
        return torch.stack([parameter.sum() for parameter in self.parameters() if parameter.requires_grad]).sum() * 0.0

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if not self._learned:  # without gradients an optimizer leaves everything as it is; with zeros momentum and decay would go on
            optimizer.zero_grad(set_to_none=True)
        self._learned = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped"] = self._skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._skipped = checkpoint.get("skipped", 0)

    def on_train_start(self) -> None:
        if self.max_steps is not None and self.trainer.max_epochs == -1:
            steps = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
            left = self.max_steps - self.trainer.global_step
            self.trainer.fit_loop.max_epochs = self.current_epoch + math.ceil(left / steps)

    def on_train_epoch_start(self) -> None:
        if hasattr(self.loss, "on_epoch"):
            self.loss.on_epoch(self.current_epoch, self.trainer.max_epochs)  # type: ignore[operator]
        if hasattr(self.loss, "numbers"):
            self.log_dict({f"train/{name}": value for name, value in self.loss.numbers().items()}, sync_dist=True)  # type: ignore[operator]

    def on_train_epoch_end(self) -> None:
        # After the epoch's validation and before its checkpoint.
        if hasattr(self.loss, "on_epoch_end"):
            self.loss.on_epoch_end()  # type: ignore[operator]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if hasattr(self.loss, "on_step"):
            steps = self._training_steps()
            self.loss.on_step(self.trainer.global_step, int(steps) if math.isfinite(steps) else -1)  # type: ignore[operator]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.max_steps is not None and self.trainer.global_step >= self.max_steps:
            self.trainer.should_stop = True

    def _training_steps(self) -> float:
        steps = self.trainer.estimated_stepping_batches
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def on_validation_epoch_start(self) -> None:
        self.val_evaluation.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if getattr(self.loss, "wants_validation_logits", False) and not self.trainer.sanity_checking:
            probs, logits = self.window.with_logits(self.model, batch["image"], activation=self.schema.activation)
            self.loss.on_validation_batch(logits, batch["label"], context=self._context(batch))  # type: ignore[operator]
        else:
            probs = self.window(self.model, batch["image"], activation=self.schema.activation)
        self.val_evaluation.update(probs, batch["label"], batch["case_index"])

    def on_validation_epoch_end(self) -> None:
        result: Evaluation = self.val_evaluation.compute()
        scalars = result.scalars()
        # The states of all ranks are in `result` already, so every rank logs the same numbers; averaging those changes nothing.
        for name, value in scalars.items():
            self.log(f"val/{name}", value, prog_bar=name in (result.leading[0], "ece"), sync_dist=True)
        if hasattr(self.loss, "on_validation") and not self.trainer.sanity_checking:
            self.loss.on_validation(scalars)  # type: ignore[operator]

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer()
        if self.make_scheduler is None:
            return optimizer
        steps = int(self._training_steps())
        ratios = [1.0, self.encoder_lr_ratio] if len(optimizer.param_groups) == 2 else []
        # Stepped by batch: at the end of an epoch Lightning writes the checkpoint before it would step a schedule that counts epochs.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": _suited(self.make_scheduler, steps, ratios)(optimizer), "interval": "step"}}

    def _optimizer(self) -> Optimizer:
        """Of one group of parameters or, where the encoder learns at a rate of its own, of two: ``head``, which is everything else, and ``encoder``."""
        if self.encoder_lr_ratio == 1:
            return self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        assert isinstance(self.model.encoder, nn.Module)
        encoder = [p for p in self.model.encoder.parameters() if p.requires_grad]
        inside = set(map(id, encoder))
        head = [p for p in self.parameters() if p.requires_grad and id(p) not in inside]
        optimizer = self.make_optimizer([{"params": head, "name": "head"}, {"params": encoder, "name": "encoder"}])
        optimizer.param_groups[1]["lr"] = optimizer.param_groups[1]["lr"] * self.encoder_lr_ratio
        return optimizer


def _suited(make_scheduler: Callable[..., LRScheduler], steps: int, ratios: list[float]) -> Callable[..., LRScheduler]:
    """The schedule over the whole training, with its own learning rates for each group of parameters."""
    function, given = (make_scheduler.func, make_scheduler.keywords) if isinstance(make_scheduler, partial) else (make_scheduler, {})
    names = inspect.signature(function).parameters
    length = {name: steps for name in _TRAINING_LENGTH if name in names and name not in given}
    rates = {name: [given[name] * ratio for ratio in ratios] for name in _RATES if ratios and isinstance(given.get(name), (int, float))}
    return partial(make_scheduler, **length, **rates)
