"""A loss as nnU-Net's trainers call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from densecal.labels import LabelSchema
from densecal.losses import DeepSupervisionLoss

__all__ = ["NNUNetLoss"]


class NNUNetLoss(nn.Module):
    """Any loss for what nnU-Net hands to one: an output or several, the labels at as many resolutions, regions with a last channel for voxels to ignore.

    The target is made anew at each resolution, from the labels at the full one (:class:`densecal.losses.DeepSupervisionLoss`). Outputs of weight 0 are left alone. In
    ``eval()`` mode a loss that learns from validations is shown each batch; :meth:`on_validation` ends one.

    Args:
        loss: Any loss of logits and labels.
        schema: The classes, or regions.
        spatial_dims: 2 or 3.
        weights: One per output, full resolution first, where the network has several.
        ignore_channel: Whether the last channel of the labels of regions says where there are none.

    Example:
        >>> from densecal.losses import CrossEntropyLoss
        >>> loss = NNUNetLoss(CrossEntropyLoss(), LabelSchema(("background", "a")), spatial_dims=2, weights=[1.0, 0.0])
        >>> output, target = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)], [torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2)]
        >>> loss(output, target)
        tensor(0.6931)
    """

    def __init__(
        self, loss: nn.Module, schema: LabelSchema, *, spatial_dims: int, weights: Sequence[float] | None = None, ignore_channel: bool = False
    ) -> None:
        super().__init__()
        self.used = None if weights is None else tuple(i for i, weight in enumerate(weights) if weight != 0)
        kept = None if weights is None or self.used is None else [float(weights[i]) for i in self.used]
        self.loss = DeepSupervisionLoss(loss, weights=kept, spatial_dims=spatial_dims)
        self.schema = schema
        self.ignore_channel = ignore_channel
        self.context: dict[str, Any] | None = None
        """Side inputs of the next batch."""
        self._right_and_all: Tensor | None = None

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """The loss.

        Args:
            output: Logits ``(N, C, *spatial)``, or a sequence of them, full resolution first.
            target: Labels of the same resolutions: a label map ``(N, 1, *spatial)`` or regions ``(N, C, *spatial)``, of which the first are read.

        Returns:
            A scalar.
        """
        label = self._label(target if isinstance(target, Tensor) else target[0])
        outputs = output if isinstance(output, Tensor) or self.used is None else [output[i] for i in self.used]
        if not self.training:
            self._observe(outputs if isinstance(outputs, Tensor) else outputs[0], label)
        value: Tensor = self.loss(outputs, label, context=self.context or None)
        return value

    def on_validation(self, stats: Mapping[str, Any]) -> None:
        """End a validation.

        Args:
            stats: Its numbers. The share of labelled voxels that were right, of all ranks, is added as ``accuracy`` where the loss follows it.
        """
        numbers = dict(stats)
        if getattr(self.loss.loss, "needs_validation", False):
            device = next((buffer.device for buffer in self.loss.buffers()), torch.device("cpu"))
            sums = torch.zeros(2, dtype=torch.float64, device=device) if self._right_and_all is None else self._right_and_all
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(sums)
            numbers["accuracy"] = (sums[0] / sums[1]).item()
        self._right_and_all = None
        self.loss.on_validation(numbers)

    @torch.no_grad()
    def _observe(self, logits: Tensor, label: Tensor) -> None:
        self.loss.on_validation_batch(logits, label, context=self.context)
        if not getattr(self.loss.loss, "needs_validation", False):
            return
        predicted = (logits > 0).to(label.dtype) if self.schema.activation == "sigmoid" else logits.argmax(dim=1, keepdim=True)
        valid = label != self.schema.ignore_index
        counts = torch.stack([((predicted == label) & valid).sum(), valid.sum()]).double()
        self._right_and_all = counts if self._right_and_all is None else self._right_and_all + counts

    def _label(self, target: Tensor) -> Tensor:
        if self.schema.activation == "softmax":
            return target
        if not self.ignore_channel:
            return target.to(torch.int16)
        return target[:, :-1].to(torch.int16).masked_fill(target[:, -1:].bool(), self.schema.ignore_index)
