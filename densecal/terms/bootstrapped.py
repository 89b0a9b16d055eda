"""Cross-entropy that trusts the prediction where the label is probably wrong, which the losses of the last epoch tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from densecal.checks import check_choice
from densecal.ops.activation import probabilities
from densecal.ops.beta_mixture import beta_mixture_posterior, fit_beta_mixture
from densecal.ops.reduction import Reduction
from densecal.ops.soft_cross_entropy import soft_cross_entropy
from densecal.registry import TERMS
from densecal.targets.base import SoftTarget
from densecal.terms.base import PixelTerm

__all__ = ["BootstrappedCrossEntropy"]

FEWEST = 100  # losses from which a mixture is fitted


@TERMS.register("bootstrapped")
class BootstrappedCrossEntropy(PixelTerm):
    r"""Dynamic bootstrapping: cross-entropy with the target

    .. math:: q' = (1 - w)\, q + w\, p \quad \text{(soft)} \qquad \text{or} \qquad q' = (1 - w)\, q + w\, \mathbf{1}[\arg\max p] \quad \text{(hard)}

    where w is the probability that the pixel's cross-entropy belongs to the component of large losses in a mixture of two betas. Neither w nor the p of
    the target carries a gradient, as in the paper's code. Under sigmoid each channel of a pixel has a loss and a w of its own.

    In training mode every call draws ``num_samples`` pixels (by PyTorch's global generator) and keeps a uniform sample of ``capacity`` losses of the whole
    epoch. :meth:`on_epoch` scales them by their 5th and 95th percentile, leaves out what lies beyond, and fits the mixture. Before the first fit the term
    is plain cross-entropy. Sample and mixture are in the checkpoint. Where ``DistributedDataParallel`` broadcasts buffers, rank 0's count for all.

    Args:
        form: ``"soft"`` or ``"hard"``.
        warm_up: Epochs of plain cross-entropy, at least 1.
        num_samples: Losses drawn at each call, at least 1; those of ignored pixels are dropped.
        capacity: Losses kept of an epoch, at least 100. With fewer than that many the last mixture stays.
        em_steps: Iterations of the fit, at least 1.
        class_weights: One weight per class, or None; :class:`densecal.terms.CrossEntropy` says what the mean divides by. The mixture does not see them.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``(N, *spatial)`` (summed over channels under sigmoid).

    Raises:
        ValueError: If an option is unknown, a number too small, or there is not one weight per class.

    Reference:
        Arazo et al., "Unsupervised Label Noise Modeling and Loss Correction", ICML 2019, arXiv:1904.11238, section 3.
        Differs from the code: losses of a sample of pixels during the epoch take the place of a pass over all images after it.

    Example:
        >>> from densecal.targets import one_hot_target
        >>> term = BootstrappedCrossEntropy()
        >>> term(torch.zeros(1, 2, 3), one_hot_target(torch.tensor([[0, 1, -100]]), 2))
        tensor(0.6931)
    """

    can_sync_stats = False  # what it learns from batches is each rank's own

    mixture: Tensor
    bounds: Tensor
    fitted: Tensor
    losses: Tensor
    keys: Tensor

    def __init__(
        self,
        *,
        form: Literal["soft", "hard"] = "soft",
        warm_up: int = 1,
        num_samples: int = 4096,
        capacity: int = 65536,
        em_steps: int = 10,
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weights=class_weights, reduction=reduction)
        check_choice("form", form, ("soft", "hard"))
        for name, value, least in (
            ("warm_up", warm_up, 1),
            ("num_samples", num_samples, 1),
            ("capacity", capacity, FEWEST),
            ("em_steps", em_steps, 1),
        ):
            if value < least:
                raise ValueError(f"Expected `{name}` of at least {least}, but got {value}.")
        self.form: Literal["soft", "hard"] = form
        self.warm_up, self.num_samples, self.em_steps = warm_up, num_samples, em_steps
        self.register_buffer("mixture", torch.tensor([[1.0, 2.0, 0.5], [2.0, 1.0, 0.5]]))  # alpha, beta, weight of small and of large losses
        self.register_buffer("bounds", torch.tensor([0.0, 1.0]))  # losses that become 0 and 1
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("losses", torch.zeros(capacity))
        # Each loss draws a key and the largest keys stay: a uniform sample of all that came, without counting. -1 is an empty place.
        self.register_buffer("keys", torch.full((capacity,), -1.0))

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        q = target.probs.to(logits.dtype)
        with torch.no_grad():
            losses = self._losses(logits, q, target)  # (N, 1 or C, *spatial)
            if self.training:
                self._collect(losses, target.valid)
            low, high = self.bounds.to(losses.dtype)
            noisy = torch.where(self.fitted, beta_mixture_posterior((losses - low) / (high - low), self.mixture), 0.0)
            mixed = (1.0 - noisy) * q + noisy * self._guess(logits, target)
        values = soft_cross_entropy(logits, mixed, target.valid, class_weights=self.weights_for(logits), activation=target.activation)
        return self.reduced(values, target)

    def on_epoch(self, epoch: int, max_epochs: int) -> None:
        """Fit the mixture to the losses of the epoch that ended, unless this one is still plain cross-entropy; then forget them."""
        losses = self.losses[self.keys >= 0].cpu().double()
        if epoch >= self.warm_up and len(losses) >= FEWEST:
            low, high = losses.quantile(losses.new_tensor([0.05, 0.95]))
            if high > low:
                inside = losses[(losses >= low) & (losses <= high)]
                self.mixture.copy_(fit_beta_mixture((inside - low) / (high - low), steps=self.em_steps))
                self.bounds.copy_(torch.stack([low, high]))
                self.fitted.fill_(True)
        self.keys.fill_(-1.0)

    def _losses(self, logits: Tensor, q: Tensor, target: SoftTarget) -> Tensor:
        if target.activation == "sigmoid":
            return F.binary_cross_entropy_with_logits(logits, q, reduction="none")
        return soft_cross_entropy(logits, q, target.valid).unsqueeze(1)

    def _guess(self, logits: Tensor, target: SoftTarget) -> Tensor:
        if self.form == "soft":
            return probabilities(logits, target.activation)
        if target.activation == "sigmoid":
            return (logits > 0).to(logits.dtype)
        return torch.zeros_like(logits).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)

    def _collect(self, losses: Tensor, valid: Tensor) -> None:
        counts = valid.unsqueeze(1).expand_as(losses).flatten()
        drawn = torch.randint(losses.numel(), (self.num_samples,), device=losses.device)
        keys = torch.where(counts[drawn], torch.rand(self.num_samples, device=losses.device), -1.0)
        all_keys = torch.cat([self.keys, keys.to(self.keys.dtype)])
        all_losses = torch.cat([self.losses, losses.flatten()[drawn].to(self.losses.dtype)])
        kept, place = all_keys.topk(len(self.keys))
        self.keys.copy_(kept)
        self.losses.copy_(all_losses[place])

    def extra_repr(self) -> str:
        return f"form={self.form!r}, warm_up={self.warm_up}, num_samples={self.num_samples}, capacity={len(self.keys)}, {super().extra_repr()}"
