r"""Per-class sums of the overlap losses, correct for soft labels.

With :math:`P=\sum p`, :math:`Q=\sum q` and :math:`D=\sum |p-q|` over a region: :math:`tp=(P+Q-D)/2`, :math:`fp=P-tp`, :math:`fn=Q-tp`. The usual
product form :math:`tp=\sum pq` agrees for hard labels only; for soft ones it is not largest at p = q.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from densecal.checks import check_choice

__all__ = ["overlap_sums", "tversky_score"]


def overlap_sums(probs: Tensor, target: Tensor, valid: Tensor, *, norm: Literal["l1", "l2"] = "l1") -> tuple[Tensor, Tensor, Tensor]:
    """True positives, false positives and false negatives per image and class.

    Args:
        probs: Prediction in [0, 1], ``(N, C, *spatial)``.
        target: Distribution, same shape.
        valid: ``(N, *spatial)``, bool; other pixels are left out.
        norm: ``"l1"`` sums absolute values, ``"l2"`` squares (not their roots).

    Returns:
        ``tp, fp, fn``, each ``(N, C)``, in pixels.

    Raises:
        ValueError: If ``norm`` is neither.

    Reference:
        Wang et al., "Jaccard Metric Losses", NeurIPS 2023, arXiv:2302.05666; "Dice Semimetric Losses", MICCAI 2023, arXiv:2303.16296.

    Example:
        >>> p = torch.tensor([[[0.25, 1.0]]])
        >>> tp, fp, fn = overlap_sums(p, torch.tensor([[[0.75, 1.0]]]), torch.ones(1, 2, dtype=torch.bool))
        >>> tp.item(), fp.item(), fn.item()
        (1.25, 0.0, 0.5)
    """
    check_choice("norm", norm, ("l1", "l2"))
    mask = valid.unsqueeze(1)
    axes = tuple(range(2, probs.ndim))
    p, q = torch.where(mask, probs, 0.0), torch.where(mask, target, 0.0)
    difference = p - q
    if norm == "l1":
        cardinality_p, cardinality_q, distance = p.sum(axes), q.sum(axes), difference.abs().sum(axes)
    else:
        cardinality_p, cardinality_q, distance = p.square().sum(axes), q.square().sum(axes), difference.square().sum(axes)
    tp = (cardinality_p + cardinality_q - distance) / 2
    return tp, cardinality_p - tp, cardinality_q - tp


def tversky_score(tp: Tensor, fp: Tensor, fn: Tensor, *, alpha: float, beta: float, smooth: float) -> Tensor:
    r"""(tp + s) / (tp + alpha fp + beta fn + s): Jaccard at alpha = beta = 1, Dice at 1/2. Nothing predicted and nothing there is 1.

    Args:
        tp: True positives, any shape.
        fp: False positives, same shape.
        fn: False negatives, same shape.
        alpha: Weight of false positives, at least 0.
        beta: Weight of false negatives, at least 0.
        smooth: Added above and below, at least 0, in pixels.

    Returns:
        Scores in [0, 1], same shape.

    Example:
        >>> tversky_score(torch.tensor(2.0), torch.tensor(1.0), torch.tensor(1.0), alpha=0.5, beta=0.5, smooth=0.0)
        tensor(0.6667)
    """
    numerator = tp + smooth
    denominator = tp + alpha * fp + beta * fn + smooth
    empty = denominator == 0
    return torch.where(empty, 1.0, numerator / torch.where(empty, 1.0, denominator))
