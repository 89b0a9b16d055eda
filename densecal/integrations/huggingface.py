"""Losses and metrics of this package in ``transformers.Trainer``, whose segmentation models give logits at a fraction of the labels' resolution.

transformers itself is not imported.

Example:
    >>> from types import SimpleNamespace
    >>> from densecal.losses import SVLSLoss
    >>> outputs, labels = SimpleNamespace(logits=torch.zeros(1, 2, 2, 2)), torch.zeros(1, 8, 8, dtype=torch.long)
    >>> TrainerLoss(SVLSLoss())(outputs, labels)
    tensor(0.6931)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from densecal.integrations.named_values import named_numbers
from densecal.ops.activation import probabilities

__all__ = ["TrainerLoss", "TrainerMetrics"]

_NOT_COUNTED = -100
"""Labels that ``Trainer`` leaves out when it counts those of a step, whatever the loss leaves out."""


class TrainerLoss:
    """A loss as ``Trainer(compute_loss_func=...)``: of logits brought to the resolution of the labels, right under gradient accumulation.

    ``Trainer`` does not divide what such a function returns by the number of batches that it accumulates. So a batch counts by its share of the step's labels:
    of a loss that is a mean over pixels comes out the mean over all pixels of the step, of any other the weighted mean of its batches.

    Args:
        loss: Any loss of logits ``(N, C, H, W)`` and labels ``(N, H, W)``. A module is moved to where the logits are. Nobody tells it of epochs: a loss
            with a schedule needs a ``TrainerCallback`` that calls its ``on_epoch``.

    Example:
        >>> from densecal.losses import JaccardMetricLoss
        >>> compute_loss_func = TrainerLoss(JaccardMetricLoss(ignore_index=255))
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.loss = loss
        self._device: torch.device | None = None

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            outputs: What the model returned: an object or a mapping with ``logits``, or a tuple that begins with them.
            labels: ``(N, H, W)``, or regions ``(N, C, H, W)``.
            num_items_in_batch: Number of labels of all batches of the step. None: the batch is alone.
        """
        logits = _at_resolution_of(labels, _logits_of(outputs))
        if isinstance(self.loss, nn.Module) and self._device != logits.device:
            self.loss.to(logits.device)
            self._device = logits.device
        value = self.loss(logits, labels)
        if num_items_in_batch is None:
            return value
        return value * (labels.ne(_NOT_COUNTED).sum() / torch.as_tensor(num_items_in_batch, device=labels.device).clamp(min=1))


class TrainerMetrics:
    """Metrics as ``Trainer(compute_metrics=...)``, of logits brought to the resolution of the labels.

    With ``TrainingArguments(batch_eval_metrics=True)`` they are fed batch by batch and keep a few numbers, where ``Trainer`` would otherwise keep the logits of the
    whole set. Over several processes ``Trainer`` hands all predictions to each.

    Args:
        metrics: Metrics by name. A metric with several named values gives each as ``<name>_<its name>``, one with a value per class as ``<name>_<class>``.

    Raises:
        TypeError: If one of ``metrics`` is not a ``torchmetrics.Metric``.

    Example:
        >>> from types import SimpleNamespace
        >>> from densecal.metrics import ExpectedCalibrationError
        >>> compute_metrics = TrainerMetrics({"ece": ExpectedCalibrationError()})
        >>> logits, labels = torch.zeros(1, 2, 2, 2), torch.tensor([[[0, 1], [1, 1]]])
        >>> compute_metrics(SimpleNamespace(predictions=logits, label_ids=labels), compute_result=False)
        {}
        >>> compute_metrics(SimpleNamespace(predictions=logits, label_ids=labels), compute_result=True)  # confidence 1/2, a quarter is right
        {'ece': 0.25}
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        for name, metric in metrics.items():
            if not isinstance(metric, Metric):
                raise TypeError(f"Expected metrics[{name!r}] to be a torchmetrics.Metric, but got {type(metric).__name__}.")
        self.metrics = {name: metric.clone() for name, metric in metrics.items()}
        for metric in self.metrics.values():
            metric.sync_on_compute = False

    @torch.no_grad()
    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        """Take in a batch and, with ``compute_result``, give the values of all batches since the last time.

        Args:
            prediction: ``EvalPrediction`` of tensors or arrays.
            compute_result: Whether this is the last batch.
        """
        labels = torch.as_tensor(prediction.label_ids)
        logits = _at_resolution_of(labels, torch.as_tensor(_logits_of(prediction.predictions)))
        numbers: dict[str, float] = {}
        for name, metric in self.metrics.items():
            metric.to(logits.device).update(probabilities(logits, getattr(metric, "activation", "softmax")), labels)
            if compute_result:
                numbers |= {key: value.item() for key, value in named_numbers(name, metric.compute()).items()}
                metric.reset()
        return numbers


def _logits_of(outputs: Any) -> Any:
    if isinstance(outputs, Mapping):
        return outputs["logits"]
    return outputs[0] if isinstance(outputs, tuple) else getattr(outputs, "logits", outputs)


def _at_resolution_of(labels: Tensor, logits: Tensor) -> Tensor:
    size = labels.shape[-2:]
    return logits if logits.shape[-2:] == size else F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
