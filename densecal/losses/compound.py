"""A loss is a target and a weighted sum of terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from densecal.checks import check_choice, check_logits, may_look, plain
from densecal.losses.fused import fused_values
from densecal.ops.backend import BACKENDS, Backend
from densecal.registry import LOSSES, near_matches
from densecal.schedules import Level
from densecal.targets.base import SoftTarget, Target
from densecal.targets.one_hot import align_label
from densecal.terms.base import Term

__all__ = ["CompoundLoss"]


@LOSSES.register("compound")
class CompoundLoss(nn.Module):
    r"""Make the target once, hand it to every term, and add up.

    .. math:: \mathcal{L} = \sum_i \lambda_i\, \ell_i(z, q), \quad q = \text{target}(y)

    Args:
        target: Turns labels into a distribution; it knows the activation and the ignored label.
        terms: ``{name: {"weight": float, "term": Term}}``. Names are free and appear in :meth:`terms`; a weight is 0 or more, or a
            :class:`densecal.schedules.Schedule` of such.
        ignore_index: Handed to the target. None keeps the target's own.
        backend: ``"auto"`` computes by fused kernels, on a GPU, the terms that they cover, and says once in the log which ones they do not; ``"torch"``
            computes everything by PyTorch's operations, ``"triton"`` everything by kernels, or says why it cannot.
        sync_stats: With several processes (``DistributedDataParallel``), take over the batch of all of them what the terms take over the batch: sums of overlaps, counts
            of pixels and images. Loss and gradient are then those of one process with all of it; each process has to compute the loss as often as the others.
            Where there is one process, or no process group, it changes nothing. Without it each process has the loss of its own batch, as customary.

    Raises:
        TypeError: If the target or a term is something else.
        ValueError: If there are no terms, a weight is negative, the target already ignores another label, or ``sync_stats`` is asked of a term that cannot.

    Example:
        >>> from densecal.targets import SVLSTarget
        >>> from densecal.terms import CrossEntropy, DiceSemimetric
        >>> loss = CompoundLoss(SVLSTarget(), {"ce": {"weight": 0.25, "term": CrossEntropy()}, "dml": {"weight": 0.75, "term": DiceSemimetric()}})
        >>> logits, label_map = torch.zeros(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 4, 4, dtype=torch.long)
        >>> value = loss(logits, label_map)
        >>> value.backward()
        >>> {name: round(part.item(), 4) for name, part in loss.terms(logits, label_map).items()}
        {'ce': 0.6931, 'dml': 0.3333}
    """

    def __init__(
        self,
        target: Target,
        terms: Mapping[str, Mapping[str, Any]],
        *,
        ignore_index: int | None = None,
        backend: Backend = "auto",
        sync_stats: bool = False,
    ) -> None:
        super().__init__()
        if not terms:
            raise ValueError("Expected at least one term, {name: {'weight': ..., 'term': ...}}, but got none.")
        check_choice("backend", backend, BACKENDS)
        self.backend: Backend = backend
        self.levels = nn.ModuleDict()
        self.parts = nn.ModuleDict()
        for name, entry in terms.items():
            if not isinstance(entry, Mapping) or "term" not in entry:
                raise TypeError(f"Expected the term {name!r} as {{'weight': float, 'term': Term}}, but got {entry!r}.")
            if unknown := sorted(set(entry) - {"weight", "term"}):
                raise ValueError(f"Unknown key {unknown[0]!r} in the term {name!r}. {near_matches(unknown[0], ('weight', 'term'))}")
            term = entry["term"]
            if not isinstance(term, Term):
                raise TypeError(f"Expected the term {name!r} to be a densecal.terms.Term, but got {type(term).__name__}.")
            self.levels[name] = Level(f"terms.{name}.weight", entry.get("weight", 1.0))
            if sync_stats:
                _check_can_sync(name, term)
            term.sync_stats = sync_stats
            self.parts[name] = term
        self.replace_target(target)
        if ignore_index is not None:
            target.take_ignore_index(ignore_index, "the target", "the loss")

    def replace_target(self, target: Target) -> None:
        """Start from another target, such as one around the present one.

        Raises:
            TypeError: If it is something else.

        Example:
            >>> from densecal.perturbation import StochasticPerturbation
            >>> from densecal.losses import SVLSLoss
            >>> loss = SVLSLoss()
            >>> loss.replace_target(StochasticPerturbation(label_target=loss.target, alpha=0.1))
        """
        if not isinstance(target, Target):
            raise TypeError(f"Expected `target` to be a densecal.targets.Target, but got {type(target).__name__}.")
        self.target = target
        self.needs: tuple[str, ...] = tuple(dict.fromkeys(name for part in self._members() for name in part.needs))

    @property
    def ignore_index(self) -> int:
        """The label that is left out."""
        return self.target.ignore_index

    @property
    def weights(self) -> dict[str, float | Tensor]:
        """The present weight of each term: a number, or a 0-d tensor where it follows a schedule."""
        return {name: level.value for name, level in self._levels()}

    def terms(self, logits: Tensor, target: Tensor, *, context: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """The unweighted value of each term by name; arguments as :meth:`forward`."""
        first = (context or {}).get("output", 0) == 0
        logits, soft_target, context = self._prepared(logits, target, context)
        fused = fused_values(self.backend, self._terms(), logits, soft_target, lambda term: _only(context, term.needs), self.weights)
        observers = [part for part in self._members() if part.wants_training_logits] if self.training and first else []
        masked = _masked(logits, soft_target) if observers or len(fused) < len(self.parts) else logits
        with torch.no_grad():
            for part in observers:
                part.on_batch(masked, soft_target, context=_only(context, part.needs))
        return {name: fused[name] if name in fused else term(masked, soft_target, context=_only(context, term.needs)) for name, term in self._terms()}

    def _prepared(self, logits: Tensor, target: Tensor, context: Mapping[str, Any] | None) -> tuple[Tensor, SoftTarget, dict[str, Any]]:
        """Checked logits, the target made from the labels, the side inputs."""
        logits = plain(logits)
        spatial_dims = check_logits(logits)
        checked = self._checked(context)
        label = align_label(target, logits)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        soft_target = self.target(label, logits.shape[1], spatial_dims=spatial_dims, dtype=dtype, context=_only(checked, self.target.needs))
        soft_target.backend = self.backend
        return logits, soft_target, checked

    def forward(self, logits: Tensor, target: Tensor, *, context: Mapping[str, Any] | None = None) -> Tensor:
        """The loss.

        Args:
            logits: ``(N, C, *spatial)`` with 1 to 3 spatial dims, fp16, bf16, fp32 or fp64.
            target: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)``, or soft labels or regions ``(N, C, *spatial)``; see
                :func:`densecal.targets.one_hot_target`.
            context: Side inputs by name; those in ``needs`` must be there, others are left alone. ``output`` says which of a network's outputs the logits are:
                target and terms that learn from logits while training see the one of number 0 alone, which they are without it.

        Returns:
            A scalar of at least single precision (one value per pixel where every term has ``reduction="none"``); 0 where no pixel is valid.

        Raises:
            TypeError: If ``logits`` are not floating.
            ValueError: If shapes do not fit, a label is out of range (checked on a CPU), or a side input is missing.
        """
        return self.total(self.terms(logits, target, context=context))

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of what :meth:`terms` gave: the loss, without computing the parts again."""
        total: Tensor | None = None
        weights = self.weights
        for name, value in parts.items():
            weighted = weights[name] * value
            total = weighted if total is None else total + weighted
        assert total is not None
        return total

    def on_epoch(self, epoch: int, max_epochs: int) -> None:
        """Tell target, terms and weights that epoch ``epoch`` of ``max_epochs`` begins, counted from 0."""
        for part in self._told():
            part.on_epoch(epoch, max_epochs)

    def on_step(self, step: int, max_steps: int) -> None:
        """Tell target, terms and weights that step ``step`` of ``max_steps`` begins, counted from 0."""
        for part in self._told():
            part.on_step(step, max_steps)

    def on_epoch_end(self) -> None:
        """Tell target and terms that an epoch is over, the validation that belongs to it included."""
        for part in self._members():
            part.on_epoch_end()

    @property
    def needs_validation(self) -> bool:
        """Whether the target learns nothing without a validation."""
        return self.target.needs_validation

    def numbers(self) -> dict[str, float]:
        """What target and terms have to say of their present state, by name, for logging."""
        return {name: value for part in self._members() for name, value in part.numbers().items()}

    def case_levels(self) -> dict[str, dict[str, float]]:
        """Numbers that the target keeps of each training case: name -> case id -> number."""
        return self.target.case_levels()

    @property
    def wants_validation_logits(self) -> bool:
        """Whether a term learns from :meth:`on_validation_batch`."""
        return any(term.wants_validation_logits for _, term in self._terms())

    def on_validation_batch(self, logits: Tensor, target: Tensor, *, context: Mapping[str, Any] | None = None) -> None:
        """Show the terms a batch of a validation; :meth:`on_validation` ends it. Arguments as :meth:`forward`."""
        with torch.no_grad():
            logits, soft_target, context = self._prepared(logits, target, context)
            logits = _masked(logits, soft_target)
            for _, term in self._terms():
                if term.wants_validation_logits:
                    term.on_validation_batch(logits, soft_target, context=_only(context, term.needs))

    def on_validation(self, stats: Mapping[str, Any]) -> None:
        """Tell target and terms the numbers of a validation."""
        for part in self._members():
            part.on_validation(stats)

    def _terms(self) -> Iterable[tuple[str, Term]]:
        return cast("Iterable[tuple[str, Term]]", self.parts.items())

    def _levels(self) -> Iterable[tuple[str, Level]]:
        return cast("Iterable[tuple[str, Level]]", self.levels.items())

    def _told(self) -> list[Target | Term | Level]:
        return [*self._members(), *(level for _, level in self._levels())]

    def _members(self) -> list[Target | Term]:
        return [self.target, *(term for _, term in self._terms())]

    def _checked(self, context: Mapping[str, Any] | None) -> dict[str, Any]:
        given = {name: plain(value) if isinstance(value, Tensor) else value for name, value in (context or {}).items() if name in self.needs}
        for name in self.needs:
            if name not in given:
                users = [type(part).__name__ for part in self._members() if name in part.needs]
                raise ValueError(
                    f"Expected the side input {name!r}, which {' and '.join(users)} needs, but got {sorted(context or {})}. "
                    f"Call the loss with context={{{name!r}: ...}}."
                )
        return given


def _check_can_sync(name: str, term: Term) -> None:
    if not term.can_sync_stats:
        raise ValueError(
            f"Expected terms whose statistics can be summed over ranks for `sync_stats`, but {name!r} is a {type(term).__name__}. Leave `sync_stats` out, or choose "
            "other terms."
        )
    if getattr(term, "reduction", "mean") == "none":
        raise ValueError(f"Expected a mean or a sum for `sync_stats`, but {name!r} has reduction='none', which holds each rank's own pixels.")


def _masked(logits: Tensor, target: SoftTarget) -> Tensor:
    """What terms are handed: whatever stands at an ignored pixel, inf and NaN included, reaches neither a value nor a gradient. Below single
    precision exp and sums fail."""
    valid = target.valid
    masked = logits if may_look(valid) and bool(valid.all()) else torch.where(valid.unsqueeze(1), logits, 0.0)
    return masked.to(target.dtype)


def _only(context: Mapping[str, Any], needs: tuple[str, ...]) -> dict[str, Any]:
    return {name: context[name] for name in needs}
