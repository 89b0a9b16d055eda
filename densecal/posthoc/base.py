"""What every post-hoc calibrator has in common: how it is fed, what its input is, how it is applied."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from densecal.checks import check_choice, check_logits, plain
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation, logits_from_probabilities
from densecal.targets.base import SoftTarget
from densecal.targets.one_hot import align_label, one_hot_target

__all__ = ["FLOOR", "Calibrator", "normalised_logits", "without_zeros"]

FLOOR: dict[str, float] = {"softmax": 1e-30, "sigmoid": 2.0**-24}
"""Smaller probabilities count as this one. Single precision tells far smaller ones than 2^-24 from 0 but none between 1 - 2^-24 and 1, to which a region may come as near: so
under sigmoid larger ones count as 1 - 2^-24. A floor of 1e-12 for classes would bend the temperature of a network that is eight times too sure."""

_BLOCK = 1 << 21
"""Entries that are calibrated at a time, so that what is computed on the way stays small beside the image."""


def normalised_logits(values: Tensor, activation: Activation = "softmax", *, from_probs: bool = False) -> Tensor:
    """What calibrators are fitted on and applied to: log p of exclusive classes, log p - log(1 - p) of regions, the same from a network's logits and from the
    probabilities that were saved of them.

    Args:
        values: Logits ``(N, C, *spatial)`` or, with ``from_probs``, probabilities.
        activation: ``"softmax"`` or ``"sigmoid"``.
        from_probs: Whether ``values`` are probabilities.

    Returns:
        ``(N, C, *spatial)``, float64 of float64 values, else float32. Probabilities below :data:`FLOOR` count as that.

    Example:
        >>> logits = torch.tensor([[[3.0], [1.0]]])
        >>> same = normalised_logits(logits), normalised_logits(logits.softmax(1), from_probs=True)
        >>> [z.flatten() for z in same]
        [tensor([-0.1269, -2.1269]), tensor([-0.1269, -2.1269])]
    """
    check_choice("activation", activation, ("softmax", "sigmoid"))
    floor = FLOOR[activation]
    values = plain(values)
    values = values if values.dtype == torch.float64 else values.float()
    if from_probs:
        values = logits_from_probabilities(values, activation, floor=floor)
    if activation == "softmax":
        return values.log_softmax(1).clamp_min(math.log(floor))
    most = math.log1p(-floor) - math.log(floor)
    return values.clamp(-most, most)


_COARSEST = 0.5 / 255
"""Half a step of probabilities in 8 bits, the coarsest that anybody stores."""


def without_zeros(probs: Tensor, activation: Activation = "softmax") -> Tensor:
    """Stored probabilities of exactly 0, which only says less than the file's step, as half the smallest that is not 0: a certain mistake would be held against a temperature
    without end. Of regions those of exactly 1 likewise.

    Args:
        probs: Probabilities of one case, any shape.
        activation: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        The same, or a copy without them. Under softmax the sum over classes is off by as much.

    Example:
        >>> without_zeros(torch.tensor([0.0, 0.001, 0.5])).tolist()
        [0.0005000000237487257, 0.0010000000474974513, 0.5]
    """
    above = probs[probs > 0]
    if len(above) < probs.numel():
        probs = probs.clamp_min(min(float(above.min()) / 2 if len(above) else 1.0, _COARSEST))
    if activation == "sigmoid" and bool((probs >= 1).any()):
        below = 1 - probs[probs < 1]
        probs = probs.clamp_max(1 - min(float(below.min()) / 2 if len(below) else 1.0, _COARSEST))
    return probs


class Calibrator(nn.Module, ABC):
    """A function from a network's logits to better probabilities, fitted on labelled cases that the network was not trained on.

    Feed it with :meth:`fit`, or with :meth:`update` case by case and :meth:`finish`; then call it. What it keeps between cases is bounded, whatever their number and
    size. What it has learnt are buffers, so that ``state_dict`` holds it and ``to`` moves it.

    Args:
        num_classes: Number of classes C, or of regions.
        activation: ``"softmax"`` for exclusive classes, ``"sigmoid"`` for regions.
        ignore_index: Label of pixels to leave out.

    Raises:
        ValueError: If an option is out of its range, or the method cannot act on regions.
    """

    activations: ClassVar[tuple[str, ...]] = ("softmax", "sigmoid")
    """What it can act on."""

    pointwise: ClassVar[bool] = True
    """Whether a pixel's result depends on that pixel alone."""

    keeps_labels: ClassVar[bool] = False
    """Whether the most probable class stays what it was."""

    num_pixels: Tensor

    def __init__(self, num_classes: int, *, activation: Activation = "softmax", ignore_index: int = DEFAULT_IGNORE_INDEX) -> None:
        super().__init__()
        check_choice("activation", activation, ("softmax", "sigmoid"))
        least = 2 if activation == "softmax" else 1
        if num_classes < least:
            raise ValueError(f"Expected `num_classes` of at least {least} under {activation}, but got {num_classes}.")
        if activation not in self.activations:
            raise ValueError(
                f"{type(self).__name__} needs classes that exclude each other and cannot act on regions (sigmoid). "
                "Choose temperature, vector, isotonic, histogram or local_temperature."
            )
        self.num_classes = num_classes
        self.activation: Activation = activation
        self.ignore_index = ignore_index
        self.register_buffer("num_pixels", torch.zeros((), dtype=torch.int64))
        self._updates = 0
        self._seen = 0

    def fit(self, batches: Iterable[Sequence[Tensor]], *, from_probs: bool = False) -> Self:
        """Fit to labelled batches, in one pass.

        Args:
            batches: Pairs of logits ``(N, C, *spatial)`` and labels, or triples with a mask, as :meth:`update` takes them.
            from_probs: Whether the batches hold probabilities in place of logits.

        Returns:
            Itself.

        Raises:
            ValueError: If there is no pixel to fit on, or shapes do not fit.
        """
        self.reset()
        for logits, label, *mask in batches:
            self.update(logits, label, mask=mask[0] if mask else None, from_probs=from_probs)
        self.finish()
        return self

    @torch.no_grad()
    def update(
        self, logits: Tensor, label: Tensor, *, mask: Tensor | None = None, case_ids: Sequence[str] | None = None, from_probs: bool = False
    ) -> None:
        """Look at labelled images.

        Args:
            logits: ``(N, C, *spatial)``, floating; with ``from_probs`` probabilities.
            label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)``, or soft labels ``(N, C, *spatial)``; of regions 0 and 1, or shares, ``(N, C, *spatial)``.
            mask: True where a pixel is to be fitted on, ``(N, *spatial)``, bool. By default all that are not ignored.
            case_ids: Name of each image, ``(N,)``: which pixels of it are drawn depends on it. By default a running number.
            from_probs: Whether ``logits`` are probabilities.

        Raises:
            TypeError: If ``mask`` is not bool.
            ValueError: If shapes or values do not fit.
        """
        logits = plain(logits)
        self._check_channels(logits)
        label = align_label(label, logits)
        target = one_hot_target(label, self.num_classes, activation=self.activation, ignore_index=self.ignore_index, spatial_dims=logits.ndim - 2)
        counted = target.valid
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != counted.shape:
                raise TypeError(f"Expected `mask` of dtype bool and shape {tuple(counted.shape)}, but got {mask.dtype} of {tuple(mask.shape)}.")
            counted = counted & plain(mask).to(counted.device)
        if case_ids is None:
            case_ids = [str(self._updates + n) for n in range(len(logits))]
        elif len(case_ids) != len(logits):
            raise ValueError(f"Expected one of `case_ids` for each of {len(logits)} images, but got {len(case_ids)}.")
        self._updates += len(logits)
        self._seen += int(counted.sum())
        z = normalised_logits(logits, self.activation, from_probs=from_probs)
        if not bool(torch.isfinite(z).all()):
            raise ValueError("Expected finite `logits`, but got NaN or infinity. Look for them in the model's output.")
        self._observe(z, target, counted, list(case_ids))

    def finish(self) -> None:
        """Fit to what was seen, and forget it.

        Raises:
            ValueError: If no pixel was seen.
        """
        if not self._seen:
            raise ValueError("Expected labelled pixels to fit on, but got none. Look at `ignore_index` and the mask.")
        seen = self._seen
        with torch.no_grad():
            self._solve()
        self.reset()
        self.num_pixels.fill_(seen)

    def reset(self) -> None:
        """Forget what was seen since the last fit."""
        self._updates = self._seen = 0
        self._forget()

    @torch.no_grad()
    def forward(self, logits: Tensor, *, from_probs: bool = False) -> Tensor:
        """Calibrated probabilities.

        Args:
            logits: ``(N, C, *spatial)``, floating; with ``from_probs`` probabilities.
            from_probs: Whether ``logits`` are probabilities.

        Returns:
            ``(N, C, *spatial)`` in [0, 1], under softmax summing to 1 over C; float64 of float64 logits, else float32.

        Raises:
            ValueError: If it was not fitted, or the channels are not as many.
        """
        if not int(self.num_pixels):
            raise ValueError(f"Expected a fitted {type(self).__name__}. Call `fit` first.")
        logits = plain(logits)
        self._check_channels(logits)
        if not self.pointwise:
            return self._calibrate(normalised_logits(logits, self.activation, from_probs=from_probs))
        flat = logits.flatten(2)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        result = torch.empty(flat.shape, dtype=dtype, device=flat.device)
        width = max(1, _BLOCK // max(1, flat.shape[0] * flat.shape[1]))
        for start in range(0, flat.shape[2], width):
            block = normalised_logits(flat[..., start : start + width], self.activation, from_probs=from_probs)
            result[..., start : start + width] = self._calibrate(block)
        return result.view(logits.shape)

    def summary(self) -> dict[str, Any]:
        """What was found, as plain numbers and lists, for people and JSON."""
        return {}

    def _check_channels(self, logits: Tensor) -> None:
        check_logits(logits)
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"Expected `logits` (N, C, *spatial) with C = {self.num_classes} channels, but got {tuple(logits.shape)}.")

    @abstractmethod
    def _observe(self, z: Tensor, target: SoftTarget, counted: Tensor, case_ids: list[str]) -> None:
        """Keep what is needed of :func:`normalised_logits` ``(N, C, *spatial)`` and their labels where ``counted`` ``(N, *spatial)``."""

    @abstractmethod
    def _solve(self) -> None:
        """Set the buffers from what was kept."""

    @abstractmethod
    def _calibrate(self, z: Tensor) -> Tensor:
        """Probabilities of :func:`normalised_logits`, same shape; spatial axes are one, ``(N, C, P)``, where the method is ``pointwise``."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop what was kept."""
