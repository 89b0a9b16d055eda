"""From the label maps of several raters to the label of a case."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from densecal.seeds import derive_seed
from densecal.targets import rater_mean_target

__all__ = ["check_fusion", "draw", "fuse", "majority_of_raters", "mean_of_raters", "pairwise_dice", "staple_of_raters"]


def mean_of_raters(rater_labels: Tensor, num_classes: int, *, ignore_index: int) -> Tensor:
    """Share of the raters who chose each class, of those who chose any.

    Args:
        rater_labels: One label map per rater ``(R, *spatial)``, integer.
        num_classes: Number of classes K.
        ignore_index: Label of pixels that a rater gave no class.

    Returns:
        ``(K, *spatial)``, float32, 0 in all classes where nobody chose one.

    Raises:
        ValueError: If a label is no class.

    Example:
        >>> mean_of_raters(torch.tensor([[0, 1, 1, 9], [0, 0, 9, 9]]), 2, ignore_index=9)[1]
        tensor([0.0000, 0.5000, 1.0000, 0.0000])
    """
    dims = rater_labels.ndim - 1
    return rater_mean_target(rater_labels.unsqueeze(0), num_classes, ignore_index=ignore_index, spatial_dims=dims).probs[0]


def majority_of_raters(rater_labels: Tensor, num_classes: int, *, ignore_index: int) -> Tensor:
    """The class that most raters chose; of tied classes the one with the lowest number, which of two raters and two classes is the background.

    Returns:
        ``(1, *spatial)``, int64, ``ignore_index`` where nobody chose a class. Arguments and errors as :func:`mean_of_raters`.

    Example:
        >>> majority_of_raters(torch.tensor([[0, 1, 1, 9], [0, 0, 9, 9]]), 2, ignore_index=9)
        tensor([[0, 0, 1, 9]])
    """
    share, label = mean_of_raters(rater_labels, num_classes, ignore_index=ignore_index).max(0)  # the first of equals
    return torch.where(share > 0, label, ignore_index).unsqueeze(0)


def staple_of_raters(rater_labels: Tensor, num_classes: int, *, ignore_index: int) -> Tensor:
    """The label map that STAPLE finds most likely, weighing each rater by an estimate of how often they err; computed by SimpleITK's MultiLabelSTAPLE.

    "No class" is one of the labels that raters are compared by. Pixels that STAPLE leaves undecided get the majority.

    Returns:
        ``(1, *spatial)``, int64. Arguments and errors as :func:`mean_of_raters`; 2 or 3 spatial axes.

    Raises:
        ValueError: If SimpleITK is not installed.

    Reference:
        Warfield, Zou and Wells, "Simultaneous Truth and Performance Level Estimation (STAPLE)", IEEE TMI 23(7), 2004; of several labels: Rohlfing, Russakoff and
        Maurer, "Performance-based classifier combination in atlas-based image segmentation using expectation-maximization parameter estimation", IEEE TMI 23(8), 2004.
    """
    check_fusion("staple")
    majority = majority_of_raters(rater_labels, num_classes, ignore_index=ignore_index)
    if len(rater_labels) == 1:
        return majority
    import SimpleITK

    codes = torch.where(rater_labels == ignore_index, num_classes, rater_labels).numpy().astype(np.uint16)
    undecided = num_classes + 1
    staple = SimpleITK.MultiLabelSTAPLEImageFilter()
    staple.SetLabelForUndecidedPixels(undecided)
    fused = staple.Execute([SimpleITK.GetImageFromArray(one) for one in codes])
    label = torch.from_numpy(SimpleITK.GetArrayFromImage(fused).astype(np.int64)).unsqueeze(0)
    label = torch.where(label == num_classes, ignore_index, label)
    return torch.where(label == undecided, majority, label)


def _each(rater_labels: Tensor, num_classes: int, *, ignore_index: int) -> Tensor:
    return rater_labels


_FUSED: dict[str, Callable[..., Tensor]] = {
    "mean": mean_of_raters,
    "majority": majority_of_raters,
    "staple": staple_of_raters,
    "random": _each,
    "all": majority_of_raters,
}
"""By what ``rater_fusion`` of a card may be."""


def fuse(rater_labels: Tensor, num_classes: int, fusion: str, *, ignore_index: int) -> Tensor:
    """The label that is kept of a case.

    Args:
        rater_labels: One label map per rater ``(R, *spatial)``, integer.
        num_classes: Number of classes K.
        fusion: As ``rater_fusion`` of :class:`densecal.data.DataCard`.
        ignore_index: Label of pixels without a class.

    Returns:
        Shares ``(K, *spatial)``, float32, for ``"mean"``; every rater ``(R, *spatial)`` for ``"random"``, of whom a patch takes the one that :func:`draw` tells;
        else a label map ``(1, *spatial)``, int64.
    """
    return _FUSED[fusion](rater_labels, num_classes, ignore_index=ignore_index)


def draw(seed: int, num_raters: int) -> int:
    """Which rater's labels a patch gets; it follows from the seed of the patch alone.

    Example:
        >>> sorted({draw(seed, 3) for seed in range(20)})
        [0, 1, 2]
    """
    return derive_seed(seed, "rater") % num_raters


def check_fusion(fusion: str) -> None:
    """Refuse a fusion whose package is not installed.

    Raises:
        ValueError: If so.
    """
    if fusion == "staple" and importlib.util.find_spec("SimpleITK") is None:
        raise ValueError("rater_fusion: staple needs SimpleITK. Install it with `pip install 'densecal[raters]'`, or choose another fusion.")


def pairwise_dice(rater_labels: Tensor, num_classes: int, *, background: int | None, ignore_index: int) -> float:
    """How far raters agree: Dice of each two of them, averaged over the foreground classes that either marked, then over the pairs.

    Args:
        rater_labels: One label map per rater ``(R, *spatial)``, integer.
        num_classes: Number of classes.
        background: Class to leave out, or ``None``.
        ignore_index: Label of pixels without a class; a pair is compared where both have one.

    Returns:
        In [0, 1]; NaN for fewer than two raters, or where no pair marked anything.

    Example:
        >>> pairwise_dice(torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 1]]), 2, background=0, ignore_index=-100)  # (2/3 + 2/3 + 1) / 3
        0.7777...
    """
    foreground = [c for c in range(num_classes) if c != background]
    scores = []
    for a, b in itertools.combinations(rater_labels.flatten(1), 2):
        both = (a != ignore_index) & (b != ignore_index)
        table = torch.bincount(a[both] * num_classes + b[both], minlength=num_classes**2).view(num_classes, num_classes).double()
        dice = 2 * table.diagonal() / (table.sum(0) + table.sum(1))
        scores.append(float(dice[foreground].nanmean()))
    defined = [score for score in scores if not math.isnan(score)]
    return sum(defined) / len(defined) if defined else math.nan
