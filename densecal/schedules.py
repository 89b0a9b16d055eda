"""A weight or a smoothing level as a function of epoch or step.

Wherever a schedule is accepted, a plain number is the constant one. In YAML: ``weight: {_target_: densecal.schedules.Linear, start: 0.1, end: 0.2}``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from densecal.checks import check_choice, check_positive

__all__ = ["Add", "Cosine", "Level", "Linear", "Multiply", "Schedule", "Steps", "TwoStage"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Base of all schedules: a small constant object; a subclass gives ``__call__``.

    Args:
        by: What a position counts: ``"epoch"``, or ``"step"`` of the optimizer.

    Raises:
        ValueError: If ``by`` is neither.
    """

    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        check_choice("by", self.by, ("epoch", "step"))

    def __call__(self, position: int, length: int) -> float:
        """The value at an epoch or step.

        Args:
            position: Epoch or step, counted from 0.
            length: Number of epochs or steps of the whole training; below 1 where nobody knows.

        Raises:
            ValueError: If the schedule depends on a length that nobody knows.
        """
        raise NotImplementedError

    def _at(self, point: int | float, length: int) -> float:
        """A point of the training as a position: a whole number is one, a fraction is a share of the length."""
        return point if isinstance(point, int) else point * self._known(length)

    def _known(self, length: int) -> int:
        if length < 1:
            raise ValueError(
                f"Expected the number of {self.by}s of the training, which {self!r} depends on, but it is open. "
                f"Set `trainer.max_epochs`, or give the schedule whole numbers of {self.by}s."
            )
        return length


@dataclass(frozen=True)
class _Ramp(Schedule):
    start: float
    end: float
    until: int | float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.until is not None:
            _check_point("until", self.until)

    def _share(self, position: int, length: int) -> float:
        """How much of the way from start to end is done, in [0, 1]."""
        last = max(self._known(length) - 1, 1) if self.until is None else self._at(self.until, length)
        return min(position / last, 1.0)


@dataclass(frozen=True)
class Linear(_Ramp):
    """In equal steps from one value to another, where it stays.

    Args:
        start: Value at position 0.
        end: Value at ``until``, and after it.
        until: Where the end is reached: None at the last epoch or step, epoch / (epochs - 1) of the way; a whole number at that position, for a warm-up; a
            fraction in (0, 1] at that share of the training. 1.0 is epoch / epochs of the way, which the last epoch does not quite finish.
        by: ``"epoch"`` or ``"step"``.

    Raises:
        ValueError: If ``until`` is out of its range.

    Example:
        >>> [round(Linear(0.1, 0.2)(epoch, 5), 3) for epoch in range(5)]
        [0.1, 0.125, 0.15, 0.175, 0.2]
        >>> [round(Linear(0.1, 0.2, until=1.0)(epoch, 5), 3) for epoch in range(5)]
        [0.1, 0.12, 0.14, 0.16, 0.18]
        >>> [Linear(0.0, 1.0, until=2)(epoch, 5) for epoch in range(5)]
        [0.0, 0.5, 1.0, 1.0, 1.0]
    """

    def __call__(self, position: int, length: int) -> float:
        share = self._share(position, length)
        return (1.0 - share) * self.start + share * self.end


@dataclass(frozen=True)
class Cosine(_Ramp):
    """Along half a cosine from one value to another: slowly at both ends.

    Args:
        start: Value at position 0.
        end: Value at ``until``, and after it.
        until: Where the end is reached, as in :class:`Linear`.
        by: ``"epoch"`` or ``"step"``.

    Raises:
        ValueError: If ``until`` is out of its range.

    Example:
        >>> [round(Cosine(0.0, 1.0)(epoch, 5), 3) for epoch in range(5)]
        [0.0, 0.146, 0.5, 0.854, 1.0]
    """

    def __call__(self, position: int, length: int) -> float:
        share = (1.0 - math.cos(math.pi * self._share(position, length))) / 2
        return (1.0 - share) * self.start + share * self.end


@dataclass(frozen=True)
class Steps(Schedule):
    """Constant between milestones.

    Args:
        values: One more than there are milestones.
        milestones: Where the next value begins, rising: whole numbers are positions, fractions in (0, 1) shares of the training.
        by: ``"epoch"`` or ``"step"``.

    Raises:
        ValueError: If the numbers of values and milestones do not fit, or the milestones do not rise.

    Example:
        >>> [Steps([0.1, 0.2, 0.4], [1, 3])(epoch, 5) for epoch in range(5)]
        [0.1, 0.2, 0.2, 0.4, 0.4]
    """

    values: Sequence[float]
    milestones: Sequence[int | float]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for point in self.milestones:
            _check_point("milestones", point)
        if len(self.values) != len(self.milestones) + 1:
            raise ValueError(f"Expected one value more than the {len(self.milestones)} milestones, but got {len(self.values)}.")
        if len({type(point) for point in self.milestones}) > 1 or list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"Expected `milestones` to rise, all of them positions or all shares, but got {self.milestones}.")

    def __call__(self, position: int, length: int) -> float:
        return self.values[sum(position >= self._at(point, length) for point in self.milestones)]


@dataclass(frozen=True)
class TwoStage(Schedule):
    """One value first, then another. With label smoothing from 0.1 to 0.0: two-stage label smoothing, TSLA.

    Args:
        first: Value before ``switch``.
        second: Value from there on.
        switch: A whole number is the first epoch or step of the second stage, a fraction in (0, 1] the share of the training that the first takes.
        by: ``"epoch"`` or ``"step"``.

    Raises:
        ValueError: If ``switch`` is out of its range.

    Reference:
        Xu et al., "Towards Understanding Label Smoothing", 2020, arXiv:2006.11653.

    Example:
        >>> [TwoStage(0.1, 0.0, switch=0.5)(epoch, 5) for epoch in range(5)]
        [0.1, 0.1, 0.1, 0.0, 0.0]
    """

    first: float
    second: float
    switch: int | float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_point("switch", self.switch)

    def __call__(self, position: int, length: int) -> float:
        return self.first if position < self._at(self.switch, length) else self.second


@dataclass(frozen=True)
class Multiply(Schedule):
    """Multiplied again and again, within bounds.

    Args:
        start: Value at position 0.
        factor: What it is multiplied by, > 0.
        every: After how many epochs or steps, each time.
        minimum: It never falls below this.
        maximum: It never rises above this.
        by: ``"epoch"`` or ``"step"``.

    Raises:
        ValueError: If ``factor`` or ``every`` is not positive.

    Reference:
        The weight schedules ``multiply`` and ``step`` of Liu et al., "The Devil is in the Margin", CVPR 2022, arXiv:2111.15430.

    Example:
        >>> [Multiply(0.1, 2.0, maximum=0.5)(epoch, 5) for epoch in range(5)]
        [0.1, 0.2, 0.4, 0.5, 0.5]
    """

    start: float
    factor: float
    every: int = 1
    minimum: float | None = None
    maximum: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("factor", self.factor)
        check_positive("every", self.every)

    def __call__(self, position: int, length: int) -> float:
        # The power of a large factor may exceed what a float holds, long after the bound was passed.
        exponent = math.log(self.factor) * (position // self.every)
        return _within(self.start * (self.factor ** (position // self.every) if exponent < 700 else math.inf), self.minimum, self.maximum)


@dataclass(frozen=True)
class Add(Schedule):
    """Raised or lowered by the same amount again and again, within bounds.

    Args:
        start: Value at position 0.
        amount: What is added, negative to lower.
        every: After how many epochs or steps, each time.
        minimum: It never falls below this.
        maximum: It never rises above this.
        by: ``"epoch"`` or ``"step"``.

    Raises:
        ValueError: If ``every`` is not positive.

    Reference:
        The weight schedule ``add`` of Liu et al., "The Devil is in the Margin", CVPR 2022, arXiv:2111.15430.

    Example:
        >>> [Add(1.0, 0.5, every=2, maximum=1.75)(epoch, 5) for epoch in range(5)]
        [1.0, 1.0, 1.5, 1.5, 1.75]
    """

    start: float
    amount: float
    every: int = 1
    minimum: float | None = None
    maximum: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("every", self.every)

    def __call__(self, position: int, length: int) -> float:
        return _within(self.start + self.amount * (position // self.every), self.minimum, self.maximum)


class Level(nn.Module):
    """A weight or smoothing level: a number that stays, or the current value of a schedule.

    ``value`` is a float where it stays. Where it follows a schedule it is a buffer, float32 and without dimensions: it is in checkpoints, moves with the
    module, and a compiled loss reads the new value without being compiled again. Until the first hook it is the value at position 0.

    Args:
        name: For error texts.
        value: A number or a schedule.
        maximum: Largest value allowed; the smallest is 0.

    Raises:
        TypeError: If ``value`` is neither a number nor a schedule.
        ValueError: If a value is out of range, here or when a schedule comes to it.

    Example:
        >>> level = Level("weight", Linear(0.0, 1.0))
        >>> level.on_epoch(2, max_epochs=5)
        >>> level.value
        tensor(0.5000)
    """

    value: float | Tensor

    def __init__(self, name: str, value: float | Schedule, *, maximum: float = math.inf) -> None:
        super().__init__()
        self.name = name
        self.maximum = maximum
        self.schedule = value if isinstance(value, Schedule) else None
        if isinstance(value, Schedule):
            self.register_buffer("value", torch.tensor(self._checked(value(0, 1)), dtype=torch.float32))
        else:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Expected `{name}` to be a number or a densecal.schedules.Schedule, but got {value!r}.")
            self.value = self._checked(float(value))

    def on_epoch(self, epoch: int, max_epochs: int) -> None:
        """Epoch ``epoch`` of ``max_epochs`` begins, counted from 0."""
        self._go("epoch", epoch, max_epochs)

    def on_step(self, step: int, max_steps: int) -> None:
        """Step ``step`` of ``max_steps`` begins, counted from 0."""
        self._go("step", step, max_steps)

    def _go(self, by: str, position: int, length: int) -> None:
        if self.schedule is not None and self.schedule.by == by:
            assert isinstance(self.value, Tensor)
            self.value.fill_(self._checked(self.schedule(position, length)))

    def _checked(self, value: float) -> float:
        if not 0 <= value <= self.maximum:
            expected = "to be 0 or greater" if self.maximum == math.inf else f"in [0, {self.maximum:g}]"
            raise ValueError(f"Expected `{self.name}` {expected}, but got {value}.")
        return value

    def extra_repr(self) -> str:
        return f"{self.value if self.schedule is None else self.schedule}"


def _check_point(name: str, point: int | float) -> None:
    if not (point >= 1 if isinstance(point, int) else 0 < point <= 1):
        raise ValueError(f"Expected `{name}` as a whole number of 1 or more, or as a share of the training in (0, 1], but got {point}.")


def _within(value: float, minimum: float | None, maximum: float | None) -> float:
    value = value if minimum is None else max(value, minimum)
    return value if maximum is None else min(value, maximum)
