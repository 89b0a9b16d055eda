"""Base of targets that start from another target's distribution of the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.targets.base import SoftTarget, Target
from densecal.targets.one_hot import OneHotTarget

__all__ = ["WrapperTarget"]


class WrapperTarget(Target):
    """Holds another target, and adds its side inputs to the own ones.

    Args:
        label_target: What the labels become by themselves; None is one-hot. It has the same activation, and takes over ``ignore_index``.
        needs: The own side inputs.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.

    Raises:
        TypeError: If ``label_target`` is not a target.
        ValueError: If it has another activation or ignores another label.
    """

    def __init__(
        self,
        label_target: Target | None,
        *,
        needs: tuple[str, ...],
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
    ) -> None:
        super().__init__(activation=activation, ignore_index=ignore_index)
        if label_target is None:
            label_target = OneHotTarget(activation=activation, ignore_index=ignore_index)
        if not isinstance(label_target, Target):
            raise TypeError(f"Expected `label_target` to be a densecal.targets.Target or None, but got {type(label_target).__name__}.")
        if label_target.activation != activation:
            raise ValueError(f"Expected `label_target` with activation={activation!r}, as the target around it, but got {label_target.activation!r}.")
        label_target.take_ignore_index(ignore_index, "`label_target`", "the target around it")
        self.label_target = label_target
        self.needs = tuple(dict.fromkeys((*needs, *label_target.needs)))

    def from_labels(
        self, label: Tensor, num_classes: int, *, spatial_dims: int | None, dtype: torch.dtype, context: Mapping[str, Any] | None
    ) -> SoftTarget:
        """What ``label_target`` makes of the labels."""
        made: SoftTarget = self.label_target(label, num_classes, spatial_dims=spatial_dims, dtype=dtype, context=context)
        return made

    def side_input(self, context: Mapping[str, Any] | None, name: str) -> Any:
        """A side input, or an error that names it."""
        if context is None or name not in context:
            raise ValueError(f"Expected the side input {name!r}, which {type(self).__name__} needs, but got none. Pass context={{{name!r}: ...}}.")
        return context[name]

    def on_epoch(self, epoch: int, max_epochs: int) -> None:
        """Forwarded to ``label_target``."""
        self.label_target.on_epoch(epoch, max_epochs)

    def on_step(self, step: int, max_steps: int) -> None:
        """Forwarded to ``label_target``."""
        self.label_target.on_step(step, max_steps)

    @property
    def wants_training_logits(self) -> bool:
        """Whether ``label_target`` does."""
        return self.label_target.wants_training_logits

    def on_batch(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> None:
        """Forwarded to ``label_target``."""
        self.label_target.on_batch(logits, target, context=context)

    def on_epoch_end(self) -> None:
        """Forwarded to ``label_target``."""
        self.label_target.on_epoch_end()

    def on_validation(self, stats: Mapping[str, Any]) -> None:
        """Forwarded to ``label_target``."""
        self.label_target.on_validation(stats)

    @property
    def needs_validation(self) -> bool:
        """Whether ``label_target`` does."""
        return self.label_target.needs_validation

    def numbers(self) -> dict[str, float]:
        """Those of ``label_target``."""
        return self.label_target.numbers()

    def case_levels(self) -> dict[str, dict[str, float]]:
        """Those of ``label_target``."""
        return self.label_target.case_levels()
