"""Which terms of a loss are computed together in one pass over the logits: by Triton kernels on a GPU, in slabs on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from densecal.ops import slab_losses
from densecal.ops.backend import Backend, NotCovered, say_once, why_not_triton
from densecal.ops.label_losses import Part
from densecal.targets.base import SoftTarget
from densecal.terms.base import Fused, Term

__all__ = ["fused_values"]

_NOT_NUMERICS = ("__init__", "extra_repr", "fused")


def fused_values(
    backend: Backend,
    terms: Iterable[tuple[str, Term]],
    logits: Tensor,
    target: SoftTarget,
    context_of: Callable[[Term], Mapping[str, Any]],
    weights: Mapping[str, float | Tensor],
) -> dict[str, Tensor]:
    """Values of the terms that are computed together, by name; the others compute themselves.

    Args:
        backend: ``"auto"``: what Triton kernels cover, on a GPU and outside of ``torch.compile``, and a word in the log about what they do not.
            ``"triton"``: everything by them, or an error. On a CPU, outside of ``torch.compile``, PyTorch's operations take slabs of pixels where
            :mod:`densecal.ops.slab_losses` covers the term, whether ``"auto"`` or ``"torch"``.
        terms: Names and terms.
        logits: ``(N, C, *spatial)`` as the network gave them.
        target: The target of all terms.
        context_of: The side inputs of a term.
        weights: What each value will be multiplied by, most likely, before they are added up; they are not here.

    Raises:
        ValueError: If ``backend`` is ``"triton"`` and a term is not covered, or Triton does not run there.
    """
    named = list(terms)
    if _takes_kernels(backend, logits):
        return _by_triton(backend == "triton", named, logits, target, context_of)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        return _run(slab_losses.label_losses, slab_losses.check_part, lambda reason: None, named, logits, target, context_of, weights)
    return {}


def _takes_kernels(backend: Backend, logits: Tensor) -> bool:
    return backend == "triton" or (backend == "auto" and logits.is_cuda and not torch.compiler.is_compiling())


@torch.compiler.disable
def _by_triton(
    insist: bool, terms: list[tuple[str, Term]], logits: Tensor, target: SoftTarget, context_of: Callable[[Term], Mapping[str, Any]]
) -> dict[str, Tensor]:
    leave = functools.partial(_leave_to_torch, insist=insist)
    if (reason := why_not_triton(logits.device)) is not None:
        leave(reason)
        return {}
    from densecal.ops.triton.label_losses import label_losses

    def compute(*args: Any, objective: slab_losses.Objective, **options: Any) -> list[Any]:
        return label_losses(*args, **options)  # a gradient made in the forward pass would have to be read and written again in the backward pass

    return _run(compute, lambda part: None, leave, terms, logits, target, context_of, {})


def _run(
    label_losses: Callable[..., list[Any]],
    check_part: Callable[[Part], None],
    leave: Callable[[str], None],
    terms: list[tuple[str, Term]],
    logits: Tensor,
    target: SoftTarget,
    context_of: Callable[[Term], Mapping[str, Any]],
    weights: Mapping[str, float | Tensor],
) -> dict[str, Tensor]:
    """Compute what ``label_losses`` covers, and ``leave`` the rest with a reason."""
    try:
        labels = target.labels_as_given()
    except NotCovered as uncovered:
        leave(str(uncovered))
        return {}
    covered: dict[str, Fused] = {}
    for name, term in terms:
        try:
            _check_inherited(type(term))
            fused = term.fused(logits, target, context=context_of(term))
            check_part(fused.part)
            covered[name] = fused
        except NotCovered as uncovered:
            leave(f"{name!r}: {uncovered}")
    values: dict[str, Tensor] = {}
    for per_pixel in (False, True):
        chosen = {name: fused for name, fused in covered.items() if fused.per_pixel == per_pixel}
        if not chosen:
            continue
        try:
            parts = [fused.part for fused in chosen.values()]
            objective = functools.partial(_weighted_sum, chosen, weights)
            results = label_losses(logits, labels.given, parts, ignore_index=labels.ignore_index, per_pixel=per_pixel, objective=objective)
        except NotCovered as uncovered:
            leave(str(uncovered))
            continue
        values |= {name: fused.finish(result) for (name, fused), result in zip(chosen.items(), results, strict=True)}
    return values


def _weighted_sum(terms: Mapping[str, Fused], weights: Mapping[str, float | Tensor], results: Iterable[Any]) -> Tensor:
    values = [weights[name] * fused.finish(result) for (name, fused), result in zip(terms.items(), results, strict=True)]
    return torch.stack(values).sum()


def _check_inherited(term: type[Term]) -> None:
    """A class that computes something else than the one whose kernel it inherits is not covered by that kernel."""
    owner = next(cls for cls in term.__mro__ if "fused" in vars(cls))
    if owner is not Term:
        for cls in term.__mro__[: term.__mro__.index(owner)]:
            if changed := [name for name, value in vars(cls).items() if callable(value) and name not in _NOT_NUMERICS]:
                raise NotCovered(f"no kernel computes {cls.__name__}, which has a {changed[0]!r} of its own")


def _leave_to_torch(reason: str, *, insist: bool) -> None:
    if insist:
        raise ValueError(f"Expected a loss that Triton kernels compute, for backend='triton', but {reason}. Use backend='auto' or 'torch'.")
    say_once(reason)
