"""Cross-entropy with the mean prediction of a class for its target, learned from one epoch to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from densecal.ops.reduction import Reduction
from densecal.ops.soft_cross_entropy import soft_cross_entropy
from densecal.registry import TERMS
from densecal.targets.base import SoftTarget
from densecal.terms.base import PixelTerm

__all__ = ["OnlineLabelSmoothing"]


@TERMS.register("online_label_smoothing")
class OnlineLabelSmoothing(PixelTerm):
    r"""Cross-entropy with a soft label for each class: the mean prediction at pixels of that class that were predicted right in the last epoch.

    .. math:: -\sum_k S_{yk} \log p_k, \quad S_y \leftarrow \frac{\sum_x [y(x) = y = \arg\max p(x)]\, p(x)}{\sum_x [y(x) = y = \arg\max p(x)]}

    In the first epoch S is label smoothing over the other classes. Soft labels q take the target :math:`\sum_y q_y S_y`, and count as their largest class
    where predictions are collected. The paper adds plain cross-entropy with equal weight, as :class:`densecal.losses.OnlineLabelSmoothingLoss` does.

    Predictions are collected in training mode and averaged by :meth:`on_epoch`. The table and the running sums are in the checkpoint. Where
    ``DistributedDataParallel`` broadcasts buffers, those of rank 0 make the table of all.

    Args:
        num_classes: Number of classes C, at least 2.
        smoothing: Share of the first epoch's labels spread over the C - 1 others, in [0, 1].
        class_weights: One weight per class, or None; :class:`densecal.terms.CrossEntropy` says what the mean divides by.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``(N, *spatial)``.

    Raises:
        ValueError: If a number is out of range, ``reduction`` is unknown, the logits have another number of classes, or the target is of sigmoid.

    Reference:
        Zhang et al., "Delving Deep into Label Smoothing", IEEE TIP 2021, arXiv:2011.12562.
        Differs from code in use, which gives a class that was never predicted right a target of zeros: here it keeps its last one.

    Example:
        >>> from densecal.targets import one_hot_target
        >>> term = OnlineLabelSmoothing(2)
        >>> value = term(torch.tensor([[[0.75, 0.5], [0.25, 0.5]]]).log(), one_hot_target(torch.tensor([[0, 1]]), 2))
        >>> term.on_epoch(1, 10)
        >>> term.table
        tensor([[0.7500, 0.2500],
                [0.1000, 0.9000]])
    """

    can_sync_stats = False  # what it learns from batches is each rank's own

    table: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        smoothing: float = 0.1,
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weights=class_weights, reduction=reduction)
        if num_classes < 2:
            raise ValueError(f"Expected `num_classes` of at least 2, but got {num_classes}. A single region has no other class to smooth towards.")
        if not 0 <= smoothing <= 1:
            raise ValueError(f"Expected `smoothing` in [0, 1], but got {smoothing}.")
        self.smoothing = smoothing
        own = torch.eye(num_classes)
        self.register_buffer("table", (1.0 - smoothing) * own + smoothing / (num_classes - 1) * (1.0 - own))  # row y is the target of class y
        self.register_buffer("sums", torch.zeros(num_classes, num_classes))
        self.register_buffer("counts", torch.zeros(num_classes))

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        if target.activation != "softmax":
            raise ValueError(
                "Expected exclusive classes for online label smoothing, but got activation='sigmoid'. Regions have no class to smooth towards."
            )
        if logits.shape[1] != self.table.shape[0]:
            raise ValueError(f"Expected logits of {self.table.shape[0]} classes, as `num_classes` says, but got {logits.shape[1]}.")
        # Autocast would turn the products into half precision.
        with torch.autocast(logits.device.type, enabled=False):
            if self.training:
                self._collect(logits.detach(), target)
            probs = torch.einsum("nyx,yk->nkx", target.one_hot.to(logits.dtype).flatten(2), self.table.to(logits.dtype)).reshape(logits.shape)
        values = soft_cross_entropy(logits, probs, target.valid, class_weights=self.weights_for(logits))
        return self.reduced(values, target)

    def on_epoch(self, epoch: int, max_epochs: int) -> None:
        """Make the collected means the targets of the epoch that begins."""
        seen = (self.counts > 0).unsqueeze(1)
        self.table.copy_(torch.where(seen, self.sums / self.counts.clamp_min(1.0).unsqueeze(1), self.table))
        self.sums.zero_()
        self.counts.zero_()

    def _collect(self, logits: Tensor, target: SoftTarget) -> None:
        probs = logits.softmax(dim=1)
        label = target.one_hot.argmax(dim=1)
        right = target.valid & (probs.argmax(dim=1) == label)
        hits = torch.zeros_like(probs).scatter_(1, label.unsqueeze(1), right.unsqueeze(1).to(probs.dtype)).flatten(2)
        self.sums += torch.einsum("nyx,nkx->yk", hits, probs.flatten(2)).to(self.sums.dtype)
        self.counts += hits.sum(dim=(0, 2)).to(self.counts.dtype)

    def extra_repr(self) -> str:
        return f"num_classes={self.table.shape[0]}, smoothing={self.smoothing}, {super().extra_repr()}"
