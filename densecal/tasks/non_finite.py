"""What becomes of a batch whose loss is NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["NON_FINITE", "NonFinite", "NonFiniteLoss", "describe_fault", "finite_everywhere", "weights_are_finite"]

NonFinite: TypeAlias = Literal["stop", "skip"]
NON_FINITE = ("stop", "skip")


class NonFiniteLoss(ArithmeticError):
    """The loss of a batch is NaN or infinite; the text names the cases and the parts of the loss."""


def finite_everywhere(*values: Tensor) -> bool:
    """Whether all values are finite, on every rank where there are several: they have to go on together, or wait for each other for ever."""
    finite = torch.stack([torch.isfinite(value).all() for value in values]).all()
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        flag = finite.to(torch.int32)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        finite = flag > 0
    return bool(finite)


def weights_are_finite(modules: Iterable[nn.Module]) -> bool:
    """Whether all parameters are."""
    return all(bool(torch.isfinite(parameter).all()) for module in modules for parameter in module.parameters())


@torch.no_grad()
def describe_fault(outputs: Sequence[Tensor], batch: Mapping[str, Any], parts: Mapping[str, Tensor], *, weights_finite: bool) -> str:
    """Name the cases of all ranks that a loss is not finite for, the parts of the loss, and the likely cause.

    Args:
        outputs: What the network gave, each ``(N, ...)``.
        batch: The batch; cases whose output is not finite are named, or all where every output is.
        parts: Terms of the loss by name; empty if they were not computed.
        weights_finite: Whether the network's weights are.
    """
    bad = torch.stack([~torch.isfinite(output.flatten(1)).all(dim=1) for output in outputs]).any(dim=0).tolist()
    image = ~torch.isfinite(batch["image"].flatten(1)).all(dim=1)
    terms = [name for name, value in parts.items() if not bool(torch.isfinite(value))]
    ids = list(batch.get("case_id") or (f"number {n} of the batch" for n in range(len(bad))))
    mine = {
        "all": ids,
        "bad": [case for case, is_bad in zip(ids, bad, strict=True) if is_bad],
        "image": bool(image.any()),
        "half": any(output.dtype == torch.float16 for output in outputs),
        "terms": terms,
    }
    everyone: list[dict[str, Any]] = [mine]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
    cases = _once(case for one in everyone for case in one["bad"])
    terms = _once(term for one in everyone for term in one["terms"])
    outputs_bad = bool(cases)
    cases = cases or _once(case for one in everyone for case in one["all"])
    what = "The network's output is" if outputs_bad else f"The loss{' (' + ', '.join(terms) + ')' if terms else ''} is"
    text = f"{what} not finite for {'the case' if len(cases) == 1 else 'cases'} {', '.join(cases)}."
    if not weights_finite:
        return f"{text} The network's weights are not finite either: an earlier gradient was not. A lower optimizer.lr or trainer.gradient_clip_val=1 may help."
    if any(one["image"] for one in everyone):
        return f"{text} The image holds such values after augmentation."
    if outputs_bad and any(one["half"] for one in everyone):
        return f"{text} 16-bit floats end at 65504: trainer.precision=bf16-mixed or 32-true does not."
    return f"{text} A lower optimizer.lr or trainer.gradient_clip_val=1 may help."


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
