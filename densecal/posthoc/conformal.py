"""Conformal risk control: a threshold below which so little of a region is missed, on average over new cases, whatever the network is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from densecal.checks import check_choice, plain
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.targets.one_hot import align_label, one_hot_target

__all__ = ["FalseNegativeControl"]

_STEPS = 4096
"""Thresholds are looked for among so many, evenly spaced in log p - log(1 - p) between -16 and 16, and 0."""


class FalseNegativeControl:
    r"""A threshold on a region's probability that keeps the expected share of the region that is missed under ``alpha``.

    With the false-negative rate :math:`\mathrm{FNR}_i(\lambda)` of case i, the share of its region whose probability lies below :math:`\lambda`, over n cases

    .. math:: \hat\lambda = \max \Big\{ \lambda : \frac{1}{n+1} \Big( \sum_i \mathrm{FNR}_i(\lambda) + 1 \Big) \le \alpha \Big\}

    The new case may be as bad as any, which is the 1. If it and the n cases are exchangeable (drawn alike, from one patient each), the expected false-negative rate of
    the mask :math:`p \ge \hat\lambda` is at most alpha, over draws of all n + 1. That is an average, no promise for every case; and it says nothing of how much too much the mask holds.

    Cases without the region have no false-negative rate and are left out: the promise is about cases that have it. What is kept is one sum per threshold.

    Args:
        region: Channel of the region; of exclusive classes several, whose probabilities are added.
        alpha: Share of the region that may be missed, in (0, 1).
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label of pixels to leave out.

    Attributes:
        num_cases: Cases n that have the region.
        threshold: :math:`\hat\lambda`, after :meth:`finish`. 0, the whole image, where n is less than 1 / alpha - 1: no other threshold can be promised then.

    Raises:
        ValueError: If ``alpha`` is out of range, or several channels are given under sigmoid, where regions overlap.

    Reference:
        Angelopoulos et al., "Conformal Risk Control", ICLR 2024, arXiv:2208.02814.

    Example:
        >>> control = FalseNegativeControl(1, alpha=0.5)
        >>> probs = torch.tensor([[[0.2, 0.1, 0.4], [0.8, 0.9, 0.6]]])
        >>> threshold = control.fit([(probs, torch.tensor([[1, 1, 0]]))] * 9).threshold
        >>> round(threshold, 2)  # 0.8 misses none of 9, more would miss half of each: (4.5 + 1) / 10 > 0.5
        0.8
        >>> control(probs)
        tensor([[ True,  True, False]])
    """

    def __init__(
        self, region: int | Sequence[int], *, alpha: float = 0.1, activation: Activation = "softmax", ignore_index: int = DEFAULT_IGNORE_INDEX
    ) -> None:
        check_choice("activation", activation, ("softmax", "sigmoid"))
        self.region = (region,) if isinstance(region, int) else tuple(region)
        if not self.region or len(set(self.region)) < len(self.region) or min(self.region) < 0:
            raise ValueError(f"Expected `region` to be a channel or different channels, but got {region}.")
        if activation == "sigmoid" and len(self.region) > 1:
            raise ValueError(f"Expected one channel as `region` under sigmoid, where regions may overlap, but got {self.region}.")
        if not 0 < alpha < 1:
            raise ValueError(f"Expected `alpha` in (0, 1), but got {alpha}. A tenth of the region is 0.1.")
        self.alpha, self.activation, self.ignore_index = alpha, activation, ignore_index
        grid = torch.linspace(-16, 16, _STEPS, dtype=torch.float64).sigmoid().float()
        self.thresholds = torch.cat([grid.new_zeros(1), grid])
        self.reset()

    def reset(self) -> None:
        """Forget all cases."""
        self.num_cases = 0
        self.threshold = math.nan
        self._missed = torch.zeros(len(self.thresholds), dtype=torch.float64)

    def fit(self, batches: Iterable[Sequence[Tensor]]) -> FalseNegativeControl:
        """Choose the threshold from pairs of probabilities and labels, as :meth:`update` takes them."""
        self.reset()
        for probs, label in batches:
            self.update(probs, label)
        self.finish()
        return self

    def update(self, probs: Tensor, label: Tensor) -> None:
        """Look at whole cases.

        Args:
            probs: Probabilities ``(N, C, *spatial)``.
            label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)``; of regions 0 and 1, ``(N, C, *spatial)``. Of soft labels the larger half of shares is the region.

        Raises:
            ValueError: If shapes or values do not fit.
        """
        inside, (truth, _) = self._inside(probs), self._truth(probs, label)
        for p, y in zip(inside.flatten(1).cpu(), truth.flatten(1).cpu(), strict=True):
            found = p[y].sort().values
            if len(found):
                below = torch.searchsorted(found, self.thresholds)  # how many lie strictly below each
                self._missed += below.double() / len(found)
                self.num_cases += 1

    def finish(self) -> None:
        """Choose the threshold.

        Raises:
            ValueError: If no case has the region.
        """
        if not self.num_cases:
            raise ValueError("Expected cases that have the region, but got none. Look at `region` and `ignore_index`.")
        allowed = (self._missed + 1) / (self.num_cases + 1) <= self.alpha
        self.threshold = float(self.thresholds[allowed].max()) if bool(allowed.any()) else 0.0

    def __call__(self, probs: Tensor) -> Tensor:
        """The mask ``(N, *spatial)`` of what may be the region, bool.

        Raises:
            ValueError: If no threshold was chosen yet.
        """
        if math.isnan(self.threshold):
            raise ValueError("Expected a threshold, but none was chosen yet. Call `fit` first.")
        return self._inside(probs) >= self.threshold

    def false_negative_rate(self, probs: Tensor, label: Tensor) -> Tensor:
        """Share of the region that the mask misses, per case, ``(N,)``, float64; NaN where a case does not have it."""
        missed = ~self(probs).flatten(1)
        truth = self._truth(probs, label)[0].flatten(1).to(missed.device)
        return (missed & truth).sum(1).double() / truth.sum(1)

    def size_ratio(self, probs: Tensor, label: Tensor) -> Tensor:
        """How many times as large as the region the mask is, per case, ``(N,)``, float64, ignored pixels left out; NaN where a case does not have the region."""
        mask = self(probs).flatten(1)
        truth, valid = (one.flatten(1).to(mask.device) for one in self._truth(probs, label))
        ratio = (mask & valid).sum(1).double() / truth.sum(1)
        return torch.where(truth.any(1), ratio, torch.nan)

    def _inside(self, probs: Tensor) -> Tensor:
        probs = plain(probs)
        if not probs.is_floating_point() or probs.ndim < 3 or max(self.region) >= probs.shape[1]:
            raise ValueError(
                f"Expected floating `probs` (N, C, *spatial) with more than {max(self.region)} channels, but got {probs.dtype} {tuple(probs.shape)}."
            )
        return probs[:, list(self.region)].float().sum(1)

    def _truth(self, probs: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Where the region is, and where pixels count."""
        target = one_hot_target(
            align_label(label, probs), probs.shape[1], activation=self.activation, ignore_index=self.ignore_index, spatial_dims=probs.ndim - 2
        )
        if target.label_map is not None:
            inside = torch.isin(target.label_map, torch.tensor(self.region, device=target.label_map.device))
        else:
            inside = target.one_hot[:, list(self.region)].sum(1) > 0.5
        return inside & target.valid, target.valid.expand_as(inside)
