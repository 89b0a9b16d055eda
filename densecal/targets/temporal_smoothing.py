"""Temporal label smoothing: how surely an event is ahead, from the time to the next one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from densecal.checks import check_choice, check_positive
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.registry import TARGETS
from densecal.targets.base import Recipe, SoftTarget, Target
from densecal.targets.one_hot import make_target

__all__ = ["TemporalForm", "TemporalSmoothing", "TemporalSmoothingTarget", "temporal_share", "temporal_smoothing_target", "time_to_next_event"]

TemporalForm: TypeAlias = Literal["exponential", "sigmoid", "linear", "step", "hard", "constant"]


def time_to_next_event(events: Tensor) -> Tensor:
    """Steps from each step to the next onset of an event, strictly after it.

    An event that lasts several steps has one onset, its first; an onset at the step itself does not count as the next one.

    Args:
        events: 1 where there is an event and 0 where not, ``(..., T)``, floating.

    Returns:
        ``(..., T)`` of the same dtype, at least 1; inf where no onset is ahead.

    Example:
        >>> time_to_next_event(torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]))
        tensor([2., 1., 3., 2., 1., inf, inf])
    """
    step = torch.arange(events.shape[-1], device=events.device, dtype=events.dtype)
    there = events > 0.5
    # The first step has none before it, and is nobody's next one.
    onset = there & ~torch.cat([there[..., :1], there[..., :-1]], dim=-1)
    at = torch.where(onset, step, math.inf)
    from_here_on = at.flip(-1).cummin(-1).values.flip(-1)
    after = torch.cat([from_here_on[..., 1:], torch.full_like(at[..., :1], math.inf)], dim=-1)
    return after - step


def temporal_share(
    time: Tensor,
    *,
    form: TemporalForm = "exponential",
    h_true: float = 12.0,
    h_min: float = 0.0,
    h_max: float = 24.0,
    gamma: float = 0.1,
    steps_per_hour: float = 1.0,
) -> Tensor:
    r"""How surely an event is ahead, given the time t to the next one: 1 up to ``h_min``, 0 beyond ``h_max``, falling between them.

    With :math:`k = \gamma \cdot` steps per hour and :math:`g = \gamma /` steps per hour:

    - ``"exponential"``: :math:`(e^{-g t} - e^{-g h_{max}}) / (e^{-g h_{min}} - e^{-g h_{max}})`;
    - ``"sigmoid"``: :math:`(s(t) - s(h_{max})) / (s(h_{min}) - s(h_{max}))`, :math:`s(t) = 1/(1 + e^{(t-d)/k})` and d such that it is 1/2 at ``h_true``;
    - ``"linear"``: :math:`(h_{max} - t) / (h_{max} - h_{min})`;
    - ``"step"``: stairs of width k, :math:`1 - \lfloor (t - h_{min})/k \rfloor\, k / (h_{max} - h_{min})`;
    - ``"hard"``: 1 where :math:`t < h_{true}`, else 0 (the plain label; h_min and h_max play no part);
    - ``"constant"``: :math:`1 - \gamma` where :math:`t \le h_{true}`, else :math:`\gamma` (label smoothing; h_min and h_max play no part).

    Args:
        time: Steps to the next event, any shape, floating; inf where there is none.
        form: One of the above.
        h_true: Horizon of the prediction, in steps.
        h_min: Up to here an event is certain, in steps, >= 0.
        h_max: Beyond it there is none, in steps, > ``h_min``.
        gamma: Strength, > 0: per hour for ``"exponential"``, in hours for ``"sigmoid"`` and ``"step"``, a share in [0, 1] for ``"constant"``.
        steps_per_hour: Steps in an hour, > 0.

    Returns:
        Shares in [0, 1] of the shape and dtype of ``time``.

    Raises:
        ValueError: If ``form`` is unknown, a number is out of range, or no d gives one half at ``h_true``.

    Reference:
        Yeche et al., "Temporal Label Smoothing for Early Event Prediction", ICML 2023, arXiv:2208.13764.
        Differs from the code: the sigmoid is computed without overflow, where the code falls back to ``"hard"``.

    Example:
        >>> temporal_share(torch.tensor([0.0, 6.0, 12.0, 24.0, float("inf")]), form="linear")
        tensor([1.0000, 0.7500, 0.5000, 0.0000, 0.0000])
    """
    check_horizons(form, h_true, h_min, h_max, gamma, steps_per_hour)
    if form == "hard":
        return (time < h_true).to(time.dtype)
    if form == "constant":
        return torch.where(time <= h_true, torch.full_like(time, 1.0 - gamma), gamma)
    t, span, k = time.clamp(h_min, h_max), h_max - h_min, gamma * steps_per_hour
    if form == "exponential":
        # e^{-g u} (1 - e^{-g (span - u)}) / (1 - e^{-g span}) with u = t - h_min neither overflows nor cancels.
        g = gamma / steps_per_hour
        share = torch.exp(-g * (t - h_min)) * torch.expm1(-g * (h_max - t)) / math.expm1(-g * span)
    elif form == "sigmoid":
        d = _middle(h_true, h_min, h_max, k)
        low, high = _sigmoid((d - h_max) / k), _sigmoid((d - h_min) / k)
        share = (torch.sigmoid((d - t) / k) - low) / (high - low)
    elif form == "linear":
        share = (h_max - t) / span
    else:
        share = 1.0 - torch.floor((t - h_min) / k) * k / span
    return torch.where(time <= h_min, 1.0, torch.where(time > h_max, 0.0, share.clamp(0.0, 1.0)))


@dataclass(frozen=True)
class TemporalSmoothing(Recipe):
    """:func:`temporal_share` of the time to the next event of each channel. Ignored steps hold no event."""

    form: TemporalForm = "exponential"
    h_true: float = 12.0
    h_min: float = 0.0
    h_max: float = 24.0
    gamma: float = 0.1
    steps_per_hour: float = 1.0

    def __call__(self, one_hot: Tensor, valid: Tensor, activation: Activation) -> Tensor:
        share = temporal_share(
            time_to_next_event(one_hot),
            form=self.form,
            h_true=self.h_true,
            h_min=self.h_min,
            h_max=self.h_max,
            gamma=self.gamma,
            steps_per_hour=self.steps_per_hour,
        )
        return torch.where(valid.unsqueeze(1), share, 0.0)


def temporal_smoothing_target(
    label: Tensor,
    num_classes: int = 1,
    *,
    form: TemporalForm = "exponential",
    h_true: float = 12.0,
    h_min: float = 0.0,
    h_max: float = 24.0,
    gamma: float = 0.1,
    steps_per_hour: float = 1.0,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    spatial_dims: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> SoftTarget:
    """From a sequence of events to how surely one is ahead of each step: the target of early prediction, under sigmoid.

    Args:
        label: Events, 0 or 1 or ``ignore_index``, ``(N, T)`` or ``(N, C, T)`` for C kinds of events, each by itself. An ignored step holds no event.
        num_classes: Number of kinds of events C.
        form: How the share falls with the time to the next event, see :func:`temporal_share`.
        h_true: Horizon of the prediction, in steps.
        h_min: Up to here an event is certain, in steps, >= 0.
        h_max: Beyond it there is none, in steps, > ``h_min``.
        gamma: Strength of the form, > 0.
        steps_per_hour: Steps in an hour, > 0.
        ignore_index: Label to leave out.
        spatial_dims: None or 1: sequences have one axis.
        dtype: Floating type of the shares.

    Returns:
        Target whose ``probs`` are ``(N, C, T)``.

    Raises:
        ValueError: If the labels have more than one spatial axis, or an option does not fit, see :func:`temporal_share`.

    Example:
        >>> temporal_smoothing_target(torch.tensor([[0, 0, 0, 1, 0]]), form="linear", h_max=4.0).probs
        tensor([[[0.2500, 0.5000, 0.7500, 0.0000, 0.0000]]])
    """
    check_horizons(form, h_true, h_min, h_max, gamma, steps_per_hour)
    if spatial_dims not in (None, 1):
        raise ValueError(f"Expected sequences, (N, T) or (N, {num_classes}, T), for temporal smoothing, but got {spatial_dims} spatial dimensions.")
    recipe = TemporalSmoothing(form, h_true, h_min, h_max, gamma, steps_per_hour)
    return make_target(label, num_classes, recipe, activation="sigmoid", ignore_index=ignore_index, spatial_dims=1, dtype=dtype)


@TARGETS.register("temporal_smoothing")
class TemporalSmoothingTarget(Target):
    """Module of :func:`temporal_smoothing_target`. Its activation is sigmoid.

    Args:
        form: ``"exponential"``, ``"sigmoid"``, ``"linear"``, ``"step"``, ``"hard"`` or ``"constant"``, see :func:`temporal_share`.
        h_true: Horizon of the prediction, in steps.
        h_min: Up to here an event is certain, in steps, >= 0.
        h_max: Beyond it there is none, in steps, > ``h_min``.
        gamma: Strength of the form, > 0.
        steps_per_hour: Steps in an hour, > 0.
        ignore_index: Label to leave out.

    Example:
        >>> TemporalSmoothingTarget(form="hard", h_true=3.0)(torch.tensor([[0, 0, 0, 1, 0]]), 1).probs
        tensor([[[0., 1., 1., 0., 0.]]])
    """

    def __init__(
        self,
        *,
        form: TemporalForm = "exponential",
        h_true: float = 12.0,
        h_min: float = 0.0,
        h_max: float = 24.0,
        gamma: float = 0.1,
        steps_per_hour: float = 1.0,
        ignore_index: int = DEFAULT_IGNORE_INDEX,
    ) -> None:
        super().__init__(activation="sigmoid", ignore_index=ignore_index)
        check_horizons(form, h_true, h_min, h_max, gamma, steps_per_hour)
        self.form: TemporalForm = form
        self.h_true, self.h_min, self.h_max = h_true, h_min, h_max
        self.gamma, self.steps_per_hour = gamma, steps_per_hour

    def forward(
        self,
        label: Tensor,
        num_classes: int,
        *,
        spatial_dims: int | None = None,
        dtype: torch.dtype = torch.float32,
        context: Mapping[str, Any] | None = None,
    ) -> SoftTarget:
        return temporal_smoothing_target(
            label,
            num_classes,
            form=self.form,
            h_true=self.h_true,
            h_min=self.h_min,
            h_max=self.h_max,
            gamma=self.gamma,
            steps_per_hour=self.steps_per_hour,
            ignore_index=self.ignore_index,
            spatial_dims=spatial_dims,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        return (
            f"form={self.form!r}, h_true={self.h_true}, h_min={self.h_min}, h_max={self.h_max}, gamma={self.gamma}, ignore_index={self.ignore_index}"
        )


def check_horizons(form: str, h_true: float, h_min: float, h_max: float, gamma: float, steps_per_hour: float) -> None:
    """Check the options when they are given, not at the first batch."""
    check_choice("form", form, get_args(TemporalForm))
    for name, value in (("h_true", h_true), ("gamma", gamma), ("steps_per_hour", steps_per_hour)):
        check_positive(name, value)
    if not 0 <= h_min < h_max:
        raise ValueError(f"Expected 0 <= `h_min` < `h_max`, but got {h_min} and {h_max}.")
    if form == "constant" and gamma > 1:
        raise ValueError(f"Expected `gamma` in (0, 1] for form='constant', but got {gamma}.")
    if form == "sigmoid":
        _middle(h_true, h_min, h_max, gamma * steps_per_hour)


def _middle(h_true: float, h_min: float, h_max: float, k: float) -> float:
    """The d of the sigmoid form: the root of 2 s(h_true) = s(h_min) + s(h_max), which is linear in e^{d/k}."""
    if h_min < h_true < h_max:
        u, v = math.exp(-(h_true - h_min) / k), math.exp(-(h_max - h_true) / k)
        above, below = 1.0 + u * v - 2.0 * u, 1.0 + u * v - 2.0 * v
        if above > 0 and below > 0:
            return h_true + k * math.log(above / below)
    raise ValueError(
        f"Expected `h_true` between `h_min` and `h_max` such that a sigmoid of width {k:g} can be one half there, but got {h_true} between {h_min} and "
        f"{h_max}. Move `h_true` towards the middle, or lower `gamma`."
    )


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
