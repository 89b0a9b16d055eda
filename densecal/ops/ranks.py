"""Sums over the processes of a training, with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["sum_over_ranks"]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.distributed.get_world_size()


def sum_over_ranks(values: Tensor) -> Tensor:
    r"""The elementwise sum of what each process of the default group holds; ``values`` themselves where there is no group, or a group of one.

    Every rank computes the same loss :math:`f(\sum_r s_r)` from it, and ``DistributedDataParallel`` takes the *mean* over ranks of the gradients that each finds. So
    that this mean is the gradient of f, the one that a rank finds is that of its own share times the number of ranks, :math:`R f' \partial s_r`.

    Args:
        values: Of the same shape and type on each rank; every rank has to call.

    Returns:
        A tensor of that shape.

    Example:
        >>> sum_over_ranks(torch.tensor([1.0, 2.0]))  # in a process of its own
        tensor([1., 2.])
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return values
    total: Tensor = _SumOverRanks.apply(values)
    return total
