"""Deep supervision as a wrapper around any loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densecal.checks import check_non_negative, plain
from densecal.registry import LOSSES

__all__ = ["DeepSupervisionLoss", "downsample_nearest"]


def downsample_nearest(label: Tensor, size: Sequence[int]) -> Tensor:
    """Pick the label nearest to each centre of a coarser grid; nothing is mixed, so class numbers and ignore marks stay what they are.

    Args:
        label: ``(..., *spatial)``, any type.
        size: New spatial shape.

    Returns:
        ``(..., *size)``.

    Example:
        >>> downsample_nearest(torch.tensor([[0, 1, 2, 3, 4, 5]]), (2,))
        tensor([[1, 4]])
    """
    for axis, new in zip(range(label.ndim - len(size), label.ndim), size, strict=True):
        old = label.shape[axis]
        if new != old:
            index = torch.arange(new, device=label.device)
            label = label.index_select(axis, torch.div((2 * index + 1) * old, 2 * new, rounding_mode="floor"))
    return label


@LOSSES.register("deep_supervision")
class DeepSupervisionLoss(nn.Module):
    r"""Weighted sum of a loss over outputs of several resolutions.

    The labels are downsampled first (nearest, soft labels too, so that ignored pixels stay whole) and the target is made at each resolution: a window
    of three pixels is three pixels of that level. The side input ``image`` is averaged to the resolution, ``spacing`` grows with it, and what lies on
    the labels' grid (``rater_labels``, ``label_stack``, ``teacher_logits``) is downsampled like them. From the second output on, a loss with side inputs is told
    the output's number as ``output``: what it learns from logits while training, it learns from the first.

    Args:
        loss: Any loss ``(logits, target, *, context) -> Tensor``.
        weights: One per output, the full resolution first, >= 0. They are used as given; None is :math:`1/2^i` divided by their sum.
        spatial_dims: 1, 2 or 3: tells a stack of outputs ``(N, K, C, H, W)`` (MONAI's DynUNet) from one volume where the target's shape does not.

    Raises:
        ValueError: If a weight is negative, the number of outputs differs from that of the weights, or the shapes leave it open what they are.

    Example:
        >>> from densecal.losses import CrossEntropyLoss
        >>> loss = DeepSupervisionLoss(CrossEntropyLoss())
        >>> loss([torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)], torch.zeros(1, 8, 8, dtype=torch.long))
        tensor(0.6931)
    """

    def __init__(self, loss: nn.Module, *, weights: Sequence[float] | None = None, spatial_dims: int | None = None) -> None:
        super().__init__()
        for weight in weights or ():
            check_non_negative("weights", weight)
        self.loss = loss
        self.weights = None if weights is None else tuple(float(w) for w in weights)
        self.spatial_dims = spatial_dims
        self.needs: tuple[str, ...] = tuple(getattr(loss, "needs", ()))

    def terms(self, logits: Tensor | Sequence[Tensor], target: Tensor, *, context: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """Each term's unweighted value, summed over the levels with their weights; arguments as :meth:`forward`."""
        total: dict[str, Tensor] = {}
        for weight, level, label, side in self._levels(logits, target, context):
            for name, value in self.loss.terms(level, label, context=side).items():  # type: ignore[operator]
                total[name] = total[name] + weight * value if name in total else weight * value
        return total

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor, *, context: Mapping[str, Any] | None = None) -> Tensor:
        """The loss.

        Args:
            logits: One output ``(N, C, *spatial)``, a sequence of them, the full resolution first, or a stack ``(N, K, C, *spatial)``.
            target: Labels at full resolution, as the wrapped loss takes them.
            context: Side inputs, as the wrapped loss takes them.

        Returns:
            A scalar.
        """
        total: Tensor | None = None
        for weight, level, label, side in self._levels(logits, target, context):
            value = self.loss(level, label, context=side) if side is not None else self.loss(level, label)
            total = weight * value if total is None else total + weight * value
        assert total is not None
        return total

    def on_epoch(self, epoch: int, max_epochs: int) -> None:
        """Forwarded to the loss."""
        if hasattr(self.loss, "on_epoch"):
            self.loss.on_epoch(epoch, max_epochs)  # type: ignore[operator]

    def on_epoch_end(self) -> None:
        """Forwarded to the loss."""
        if hasattr(self.loss, "on_epoch_end"):
            self.loss.on_epoch_end()  # type: ignore[operator]

    def on_step(self, step: int, max_steps: int) -> None:
        """Forwarded to the loss."""
        if hasattr(self.loss, "on_step"):
            self.loss.on_step(step, max_steps)  # type: ignore[operator]

    @property
    def wants_validation_logits(self) -> bool:
        """Whether the loss learns from :meth:`on_validation_batch`."""
        return bool(getattr(self.loss, "wants_validation_logits", False))

    def on_validation_batch(self, logits: Tensor, target: Tensor, *, context: Mapping[str, Any] | None = None) -> None:
        """Forwarded to the loss: validation has one resolution."""
        if self.wants_validation_logits:
            self.loss.on_validation_batch(logits, target, context=context)  # type: ignore[operator]

    def on_validation(self, stats: Mapping[str, Any]) -> None:
        """Forwarded to the loss."""
        if hasattr(self.loss, "on_validation"):
            self.loss.on_validation(stats)  # type: ignore[operator]

    def _levels(
        self, logits: Tensor | Sequence[Tensor], target: Tensor, context: Mapping[str, Any] | None
    ) -> list[tuple[float, Tensor, Tensor, dict[str, Any] | None]]:
        target = plain(target)
        if isinstance(logits, Tensor):
            logits = plain(logits)
            if not self._is_stack(logits, target):
                return [(1.0, logits, target, None if context is None else dict(context))]
            logits = logits.unbind(1)
        outputs = [plain(level) for level in logits]
        if not outputs:
            raise ValueError("Expected at least one output, but got an empty sequence.")
        if self.weights is not None and len(self.weights) != len(outputs):
            raise ValueError(f"Expected {len(self.weights)} outputs, one per weight, but got {len(outputs)}.")
        weights = self.weights or tuple(2.0**-i / (2.0 - 2.0 ** (1 - len(outputs))) for i in range(len(outputs)))
        full = target.shape[-(outputs[0].ndim - 2) :]
        levels = []
        for number, (weight, level) in enumerate(zip(weights, outputs, strict=True)):
            side = _resampled(context, full, level.shape[2:])
            if number and hasattr(self.loss, "needs"):
                side = {**(side or {}), "output": number}
            levels.append((weight, level, downsample_nearest(target, level.shape[2:]), side))
        return levels

    def _is_stack(self, logits: Tensor, target: Tensor) -> bool:
        if self.spatial_dims is not None:
            return logits.ndim == self.spatial_dims + 3
        n, *rest = logits.shape
        if logits.ndim == 6:  # one axis more than a volume has
            return True
        as_stack = logits.ndim > 3 and _fits(target, [n, *rest[1:]])
        as_plain = _fits(target, [n, *rest])
        if as_stack and as_plain:
            raise ValueError(
                f"Cannot tell whether logits {tuple(logits.shape)} with a target {tuple(target.shape)} are a stack of outputs (N, K, C, *spatial). "
                "Set `spatial_dims`, or pass a list of outputs."
            )
        return as_stack


def _fits(target: Tensor, logits_shape: list[int]) -> bool:
    """Whether a target could belong to logits of this shape. Integers with channels, which are regions, are left to ``spatial_dims``."""
    n, c, *spatial = logits_shape
    if list(target.shape) == [n, *spatial]:
        return not target.is_floating_point()
    channels = (1, c) if target.is_floating_point() else (1,)
    return target.ndim == len(logits_shape) and [target.shape[0], *target.shape[2:]] == [n, *spatial] and target.shape[1] in channels


def _resampled(context: Mapping[str, Any] | None, full: Sequence[int], size: Sequence[int]) -> dict[str, Any] | None:
    if context is None or tuple(full) == tuple(size):
        return None if context is None else dict(context)
    side = dict(context)
    if "image" in side:
        side["image"] = F.interpolate(plain(side["image"]), size=tuple(size), mode="area")
    for name in ("rater_labels", "label_stack", "teacher_logits"):
        if name in side:
            side[name] = downsample_nearest(plain(side[name]), size)
    if "spacing" in side:
        spacing = torch.as_tensor(side["spacing"])
        side["spacing"] = spacing * spacing.new_tensor([old / new for old, new in zip(full, size, strict=True)])
    return side
