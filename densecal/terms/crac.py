"""Class- and region-adaptive constraints on the logits, with multipliers that validation data set (CRaC)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from densecal.checks import check_choice, check_odd, check_positive, per_axis
from densecal.ops.activation import probabilities
from densecal.ops.boundary import boundary_region
from densecal.ops.neighbourhood import mean_kernel, normalized_convolution
from densecal.ops.reduction import REDUCTIONS, Reduction, reduce
from densecal.registry import TERMS
from densecal.targets.base import SoftTarget
from densecal.terms.base import Term

__all__ = ["ConstraintPenalty", "NeighbourConstraint", "constraint_penalty", "constraint_slope"]

ConstraintPenalty: TypeAlias = Literal["phr", "p2", "p3"]
PENALTIES = ("phr", "p2", "p3")


def constraint_penalty(gap: Tensor, multiplier: Tensor, rho: Tensor, kind: ConstraintPenalty = "phr") -> Tensor:
    r"""Penalty P(h) of a constraint h <= 0 in an augmented Lagrangian.

    .. math:: P_{PHR} &= \lambda h + \tfrac12 \rho h^2 \text{ if } \lambda + \rho h \ge 0, \quad -\lambda^2 / 2\rho \text{ else} \\
              P_2 &= \lambda h + \lambda \rho h^2 + \tfrac16 \rho^2 h^3, \quad P_3 = \lambda h + \lambda \rho h^2 \text{ if } h \ge 0,
              \quad \lambda h / (1 - \rho h) \text{ else}

    Args:
        gap: h, what a constraint is violated by, any shape.
        multiplier: lambda, > 0, broadcastable to it.
        rho: Penalty parameter, > 0, broadcastable to it.
        kind: ``"phr"``, ``"p2"`` or ``"p3"``.

    Returns:
        P of the shape of ``gap``; 0 at h = 0.

    Raises:
        ValueError: If ``kind`` is none of the three.

    Example:
        >>> constraint_penalty(torch.tensor([2.0, -0.5, -9.0]), torch.tensor(1.0), torch.tensor(1.0))
        tensor([ 4.0000, -0.3750, -0.5000])
    """
    check_choice("kind", kind, PENALTIES)
    if kind == "phr":
        return torch.where(multiplier + rho * gap >= 0, multiplier * gap + rho * gap.square() / 2, -multiplier.square() / (2 * rho))
    violated, met = torch.where(gap >= 0, gap, 0.0), torch.where(gap < 0, gap, 0.0)
    value = multiplier * violated + multiplier * rho * violated.square() + multiplier * met / (1.0 - rho * met)
    return value if kind == "p3" else value + rho.square() * violated**3 / 6


def constraint_slope(gap: Tensor, multiplier: Tensor, rho: Tensor, kind: ConstraintPenalty = "phr") -> Tensor:
    """dP/dh of :func:`constraint_penalty`, whose arguments it shares: what the multiplier becomes.

    Example:
        >>> constraint_slope(torch.tensor([2.0, -0.5, -9.0]), torch.tensor(1.0), torch.tensor(1.0))
        tensor([3.0000, 0.5000, 0.0000])
    """
    check_choice("kind", kind, PENALTIES)
    if kind == "phr":
        return (multiplier + rho * gap).clamp_min(0.0)
    violated, met = torch.where(gap >= 0, gap, 0.0), torch.where(gap < 0, gap, 0.0)
    value = multiplier / (1.0 - rho * met).square() + 2 * multiplier * rho * violated
    return value if kind == "p3" else value + (rho * violated).square() / 2


@TERMS.register("crac")
class NeighbourConstraint(Term):
    r"""Logits held to the class shares :math:`\tau` of the neighbourhood by constraints whose weights adapt per class and per region.

    .. math:: \frac{1}{|V|\, R\, C} \sum_{x \in V} \sum_{r, c} P\big(h_{rc}(x); \lambda_{rc}, \rho_{rc}\big), \quad
              h_{rc}(x) = |m_r\, \tau_c(x) - z_c(x)|\ \text{where x lies in the region r, else 0}

    The regions are the boundary, pixels with another class in their window (m = 1), and the interior (m = ``margin``). After each validation, over its
    pixels,

    .. math:: \lambda \leftarrow \overline{dP/dh}\ \text{within its bounds}, \quad \rho \leftarrow \min(\gamma \rho, \rho_{max})\
              \text{where}\ \bar h > \tau_c\ \text{times the last}\ \bar h

    A class that validation does not contain keeps its own. Under sigmoid a logit is the difference between those of a region being there and not, so it is
    held to :math:`m (2\tau - 1)`. The shares come from the labels as given.

    The update needs validation *logits*: call :meth:`densecal.losses.CompoundLoss.on_validation_batch` with each batch, then ``on_validation`` (on all
    ranks, where there are several), as densecal's task does. Log-probabilities will not do: constraints on logits change when all logits are shifted.

    Args:
        num_classes: Number of channels C of the logits.
        margin: What an interior pixel's shares are multiplied by, > 0; 1 with ``acts_on="probs"``.
        penalty: ``"phr"``, ``"p2"`` or ``"p3"``; see :func:`constraint_penalty`.
        constraint: ``"abs"`` as above, or ``"relu"``, which holds only logits above their shares: max(0, z - m tau).
        per_class: Multipliers of each class's own, or one for all classes.
        per_region: Multipliers of boundary and interior apart, or one region with the same margin everywhere.
        acts_on: Constrain the ``"logits"`` or the ``"probs"``.
        kernel_size: Odd side of the window per axis, in pixels.
        border: ``"replicate"``, ``"renormalize"``, ``"zeros"`` (outside is no class) or ``"background"`` (outside is class 0, as published).
        multiplier_min: Smallest multiplier and the first, > 0.
        multiplier_max: Largest multiplier.
        rho: First penalty parameter, > 0.
        rho_max: Largest penalty parameter.
        rho_growth: Factor gamma of its growth, >= 1.
        rho_every: Number of validations from one growth to the next.
        progress: Share tau_c of the last mean violation that counts as progress, > 0.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.

    Raises:
        ValueError: If an option is unknown, a number out of range, or the logits have another number of channels.

    Reference:
        Murugesan et al., "Class and Region-Adaptive Constraints for Network Calibration", MICCAI 2024, arXiv:2403.12364.
        Differs from the code, which weighs multipliers by inverse class frequency (so that they shrink, and are NaN for absent classes), tells the boundary by
        rounding noise, counts the outside as class 0 and keeps ignored pixels.

    Example:
        >>> from densecal.targets import one_hot_target
        >>> term = NeighbourConstraint(num_classes=2, margin=1.0, per_region=False)
        >>> logits, target = torch.zeros(1, 2, 3), one_hot_target(torch.tensor([[0, 0, 0]]), 2)
        >>> term(logits, target)  # (1e-6 + 1/2) / 2
        tensor(0.2500)
        >>> term.on_validation_batch(torch.full((1, 2, 2), 3.0), one_hot_target(torch.tensor([[0, 1]]), 2))
        >>> term.on_validation({})
        >>> term.multiplier  # the mean of h, for lambda near 0 and rho = 1
        tensor([[2.5000, 2.5000]])
    """

    can_sync_stats = True

    wants_validation_logits = True
    multiplier: Tensor
    rho: Tensor
    last_gap: Tensor
    updates: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        margin: float = 10.0,
        penalty: ConstraintPenalty = "phr",
        constraint: Literal["abs", "relu"] = "abs",
        per_class: bool = True,
        per_region: bool = True,
        acts_on: Literal["logits", "probs"] = "logits",
        kernel_size: int | Sequence[int] = 3,
        border: Literal["replicate", "renormalize", "zeros", "background"] = "replicate",
        multiplier_min: float = 1e-6,
        multiplier_max: float = 1e6,
        rho: float = 1.0,
        rho_max: float = 10.0,
        rho_growth: float = 1.2,
        rho_every: int = 1,
        progress: float = 0.9,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        positive = {
            "num_classes": num_classes,
            "margin": margin,
            "multiplier_min": multiplier_min,
            "rho": rho,
            "rho_every": rho_every,
            "progress": progress,
        }
        for name, value in positive.items():
            check_positive(name, value)
        for name, value, least in (
            ("multiplier_max", multiplier_max, multiplier_min),
            ("rho_max", rho_max, rho),
            ("rho_growth", rho_growth, 1.0),
        ):
            if not value >= least:
                raise ValueError(f"Expected `{name}` to be {least:g} or greater, but got {value}.")
        check_choice("penalty", penalty, PENALTIES)
        check_choice("constraint", constraint, ("abs", "relu"))
        check_choice("acts_on", acts_on, ("logits", "probs"))
        check_choice("border", border, ("replicate", "renormalize", "zeros", "background"))
        check_choice("reduction", reduction, REDUCTIONS)
        for side in (kernel_size,) if isinstance(kernel_size, int) else kernel_size:
            check_odd("kernel_size", side)
        self.num_classes, self.margin = num_classes, margin
        self.penalty: ConstraintPenalty = penalty
        self.constraint, self.acts_on, self.border = constraint, acts_on, border
        self.per_class, self.per_region = per_class, per_region
        self.kernel_size = kernel_size
        self.multiplier_min, self.multiplier_max = multiplier_min, multiplier_max
        self.rho_max, self.rho_growth, self.rho_every, self.progress = rho_max, rho_growth, rho_every, progress
        self.reduction: Reduction = reduction
        shape = (2 if per_region else 1, num_classes if per_class else 1)  # boundary, interior
        self.register_buffer("multiplier", torch.full(shape, multiplier_min))
        self.register_buffer("rho", torch.full(shape, float(rho)))
        self.register_buffer("last_gap", torch.full(shape, torch.inf))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._sums: Tensor | None = None  # of the validation that is going on

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        total = torch.zeros_like(logits)
        for region, gap in enumerate(self._gaps(logits, target)):
            # P(0) = 0, so a pixel adds nothing to the region it does not lie in.
            total = total + constraint_penalty(gap, *self._state(region, logits), self.penalty)
        values = torch.where(target.valid, total.mean(dim=1) / self.multiplier.shape[0], 0.0)
        return reduce(values, target.valid.sum().to(values.dtype), self.reduction, sync=self.sync_stats)

    def on_validation_batch(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> None:
        with torch.no_grad():
            mask = target.valid.unsqueeze(1)
            axes = (0, *range(2, logits.ndim))
            gaps = self._gaps(logits, target)
            slopes = [constraint_slope(gap, *self._state(region, logits), self.penalty) for region, gap in enumerate(gaps)]
            per_channel = [torch.where(mask, values, 0.0).double().sum(axes) for values in (*slopes, *gaps, target.one_hot)]
            sums = torch.cat([*per_channel, target.valid.sum().double().reshape(1)])
            self._sums = sums if self._sums is None else self._sums + sums

    def on_validation(self, stats: Mapping[str, Any]) -> None:
        regions, c = self.multiplier.shape[0], self.num_classes
        with torch.no_grad():
            sums = self._sums
            self._sums = None
            if sums is None:  # a rank without validation data still takes part in the sum over ranks
                sums = torch.zeros((2 * regions + 1) * c + 1, dtype=torch.float64, device=self.multiplier.device)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                sums = sums.to(self.multiplier.device).clone()
                torch.distributed.all_reduce(sums)
            count, (slope, gap, present) = sums[-1], sums[:-1].split([regions * c, regions * c, c])
            seen = present > 0
            slope, gap = (part.view(regions, c) / count.clamp_min(1) for part in (slope, gap))
            if not self.per_class:
                slope, gap, seen = slope.mean(1, keepdim=True), gap.mean(1, keepdim=True), count > 0
            due = (self.updates + 1) % self.rho_every == 0
            grow = seen & due & (gap > self.progress * self.last_gap)
            self.multiplier.copy_(torch.where(seen, slope.clamp(self.multiplier_min, self.multiplier_max), self.multiplier))
            self.rho.copy_(torch.where(grow, (self.rho * self.rho_growth).clamp(max=self.rho_max), self.rho))
            self.last_gap.copy_(torch.where(seen, gap, self.last_gap))
            self.updates.add_(count > 0)

    def _state(self, region: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Multipliers and penalty parameters of a region, shaped to the logits."""
        shape = (1, -1, *[1] * (logits.ndim - 2))
        return self.multiplier[region].to(logits.dtype).view(shape), self.rho[region].to(logits.dtype).view(shape)

    def _gaps(self, logits: Tensor, target: SoftTarget) -> list[Tensor]:
        """What each constraint is violated by, ``(N, C, *spatial)`` for each region; 0 outside the region."""
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"Expected logits of num_classes={self.num_classes} channels, but got {logits.shape[1]}.")
        shares, boundary = self._neighbourhood(target)
        shares = shares.to(logits.dtype)
        values = logits
        if self.acts_on == "probs":
            values = probabilities(logits, target.activation)
        elif target.activation == "sigmoid":
            shares = 2 * shares - 1
        if boundary is None:
            return [self._gap(values, self.margin * shares)]
        return [
            torch.where(boundary, self._gap(values, shares), 0.0),
            torch.where(boundary, 0.0, self._gap(values, self.margin * shares)),
        ]

    def _gap(self, values: Tensor, shares: Tensor) -> Tensor:
        return (values - shares).abs() if self.constraint == "abs" else F.relu(values - shares)

    def _neighbourhood(self, target: SoftTarget) -> tuple[Tensor, Tensor | None]:
        """Class shares of the windows, and which pixels are boundary: under softmax as soon as any class changes."""
        labels, valid, border = target.one_hot, target.valid, self.border
        spatial_dims = labels.ndim - 2
        reach = [side // 2 for side in per_axis("kernel_size", self.kernel_size, spatial_dims)]
        if self.border == "background":
            padding = [r for r in reversed(reach) for _ in range(2)]  # torch counts axes from the last
            outside = F.pad(torch.zeros_like(labels[:, :1]), padding, value=1.0 if target.activation == "softmax" else 0.0)
            labels, valid, border = F.pad(labels, padding), F.pad(valid, padding, value=True), "zeros"
            labels = torch.cat([labels[:, :1] + outside, labels[:, 1:]], dim=1)
        shares = normalized_convolution(labels, valid, mean_kernel(self.kernel_size, spatial_dims), border=border)  # type: ignore[arg-type]
        boundary = None
        if self.per_region:
            boundary = boundary_region(labels, valid, kernel_size=self.kernel_size)
            if target.activation == "softmax":
                boundary = boundary.any(dim=1, keepdim=True)
        if self.border == "background":
            inside = (slice(None), slice(None), *(slice(r, -r or None) for r in reach))
            shares, boundary = shares[inside], None if boundary is None else boundary[inside]
        return shares, boundary

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, margin={self.margin}, penalty={self.penalty!r}, constraint={self.constraint!r}, "
            f"per_class={self.per_class}, per_region={self.per_region}, acts_on={self.acts_on!r}, kernel_size={self.kernel_size}, border={self.border!r}"
        )
