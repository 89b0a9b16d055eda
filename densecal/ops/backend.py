"""Who computes a loss, or the bins of a metric: PyTorch's own operations, or the fused kernels of :mod:`densecal.ops.triton`."""

from __future__ import annotations

import functools
import logging
from typing import Literal, TypeAlias

import torch

__all__ = ["BACKENDS", "Backend", "NotCovered", "say_once", "why_not_triton"]

_logger = logging.getLogger("densecal")

Backend: TypeAlias = Literal["auto", "torch", "triton"]
BACKENDS = ("auto", "torch", "triton")


class NotCovered(Exception):
    """What a fused kernel does not do. The text names the part and says why."""


@functools.lru_cache
def _import_error() -> str | None:
    try:
        import densecal.ops.triton.label_losses  # noqa: F401 - is it there?
    except ImportError as error:
        return f"Triton cannot be imported ({error}); it comes with PyTorch's CUDA builds"
    return None


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of a device; None where they can.

    On a CPU they run under Triton's interpreter, for tests: ``TRITON_INTERPRET=1`` has to be set before Triton is imported.

    Example:
        >>> why_not_triton(torch.device("meta"))
        "tensors are on 'meta', and Triton kernels run on 'cuda'"
    """
    if device.type not in ("cuda", "cpu"):
        return f"tensors are on {device.type!r}, and Triton kernels run on 'cuda'"
    if (error := _import_error()) is not None:
        return error
    from densecal.ops.triton.label_losses import INTERPRETED

    if device.type == "cpu" and not INTERPRETED:
        return "tensors are on 'cpu', where Triton kernels run only under its interpreter, for tests (TRITON_INTERPRET=1 from the start)"
    return None


@functools.lru_cache(maxsize=256)
def say_once(reason: str) -> None:
    """Tell the log why no fused kernel was taken, each reason once."""
    _logger.info("Computed by PyTorch, not by a fused kernel: %s.", reason)
