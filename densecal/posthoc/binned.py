"""Calibration maps of one probability at a time: histogram binning and isotonic regression, from counts per bin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from densecal.checks import check_positive
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation, probabilities
from densecal.ops.binning import Bins, accumulate_bins, bin_index
from densecal.ops.fine_bins import NUM_FINE_BINS, accumulate_fine_bins
from densecal.posthoc.base import Calibrator
from densecal.registry import CALIBRATORS
from densecal.targets.base import SoftTarget

__all__ = ["HistogramBinning", "IsotonicCalibration"]


class _Binned(Calibrator):
    """One map per class or region, each class against the rest; under softmax the results are divided by their sum.

    Nothing is drawn: the counts of all pixels are kept. A class or region that no pixel has keeps its probability, and so does a pixel where all results are 0.
    """

    _bins: Bins

    def __init__(self, num_classes: int, *, activation: Activation, ignore_index: int, num_bins: int) -> None:
        check_positive("num_bins", num_bins)
        super().__init__(num_classes, activation=activation, ignore_index=ignore_index)
        self.num_bins = num_bins
        self._forget()

    def _observe(self, z: Tensor, target: SoftTarget, counted: Tensor, case_ids: list[str]) -> None:
        probs = probabilities(z, self.activation)
        valid = counted.flatten(1)
        rows = []
        for c in range(self.num_classes):  # all at once would take C times the memory
            share = (target.label_map == c) if target.label_map is not None else target.one_hot[:, c]
            rows.append(self._accumulate(probs[:, c].flatten(1), share.flatten(1), valid))
        self._bins = self._bins + Bins(*(torch.cat([getattr(row, name) for row in rows]).cpu() for name in ("count", "confidence", "correct")))

    def _accumulate(self, probs: Tensor, share: Tensor, valid: Tensor) -> Bins:
        return accumulate_bins(probs, share, num_bins=self.num_bins, valid=valid)

    def _calibrate(self, z: Tensor) -> Tensor:
        probs = probabilities(z, self.activation)
        mapped = torch.stack([self._map_class(c, probs[:, c]) for c in range(self.num_classes)], dim=1)
        if self.activation == "sigmoid":
            return mapped
        total = mapped.sum(1, keepdim=True)
        return torch.where(total > 0, mapped / torch.where(total > 0, total, 1.0), probs)

    def _map_class(self, c: int, probs: Tensor) -> Tensor:
        raise NotImplementedError

    def _forget(self) -> None:
        self._bins = Bins.empty(self.num_classes, self.num_bins)


@CALIBRATORS.register("histogram")
class HistogramBinning(_Binned):
    r"""The frequency of the class among the pixels whose probability of it lies in the same bin.

    Bins are equal, (lower, upper]; bins of equal mass would nearly all lie at 0 in segmentation, where most pixels are sure. Each class is held against the rest and, under
    softmax, the frequencies are divided by their sum. A bin without a pixel keeps the probability. Probabilities in a bin become one, so that their order is lost;
    the most probable class may change.

    Args:
        num_classes: Number of classes C, or of regions.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label of pixels to leave out.
        num_bins: Number of bins B.

    Attributes:
        frequency: ``(C, B)``, float64; NaN where a bin was empty.

    Raises:
        ValueError: If an option is out of its range.

    Reference:
        Zadrozny and Elkan, "Obtaining calibrated probability estimates from decision trees and naive Bayesian classifiers", ICML 2001; of several classes as in Guo et
        al., ICML 2017, arXiv:1706.04599.

    Example:
        >>> probs = torch.tensor([[[0.9, 0.8, 0.9, 0.1]]])
        >>> binning = HistogramBinning(1, activation="sigmoid", num_bins=2).fit([(probs, torch.tensor([[[1, 1, 0, 0]]]))], from_probs=True)
        >>> binning(probs, from_probs=True)
        tensor([[[0.6667, 0.6667, 0.6667, 0.0000]]])
    """

    frequency: Tensor

    def __init__(self, num_classes: int, *, activation: Activation = "softmax", ignore_index: int = DEFAULT_IGNORE_INDEX, num_bins: int = 15) -> None:
        super().__init__(num_classes, activation=activation, ignore_index=ignore_index, num_bins=num_bins)
        self.register_buffer("frequency", torch.full((num_classes, num_bins), torch.nan, dtype=torch.float64))

    def summary(self) -> dict[str, Any]:
        return {"frequency": self.frequency.tolist()}

    def _solve(self) -> None:
        seen = self._bins.correct.sum(1, keepdim=True) > 0
        self.frequency.copy_(torch.where(seen, self._bins.accuracy, torch.nan))

    def _map_class(self, c: int, probs: Tensor) -> Tensor:
        found = self.frequency[c].to(probs.dtype)[bin_index(probs, self.num_bins)]
        return torch.where(found.isnan(), probs, found)


@CALIBRATORS.register("isotonic")
class IsotonicCalibration(_Binned):
    r"""The best map that never falls: least squares over all monotone functions of the probability (scikit-learn's isotonic regression).

    It is fitted to counts in 5,892 bins that are narrower towards 0 and 1 (:mod:`densecal.ops.fine_bins`; no wider than 1/128 of the distance to 0 or 1), not to a sample
    of the pixels, and is linear between their means. Each class is held against the rest and, under softmax, the results are divided by their sum; the most probable class may change. Where no
    pixel contradicts, it says 0 or 1.

    Args:
        num_classes: Number of classes C, or of regions.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label of pixels to leave out.

    Attributes:
        probability: Where the map of each class has its corners, ``(C, K)``, float64, rising; the last one repeated to the length of the longest.
        frequency: What it says there, ``(C, K)``, float64, never falling.

    Raises:
        ValueError: If an option is out of its range.

    Reference:
        Zadrozny and Elkan, "Transforming classifier scores into accurate multiclass probability estimates", KDD 2002.

    Example:
        >>> probs = torch.tensor([[[0.2, 0.4, 0.6, 0.8]]])
        >>> isotonic = IsotonicCalibration(1, activation="sigmoid").fit([(probs, torch.tensor([[[0, 1, 0, 1]]]))], from_probs=True)
        >>> isotonic(probs, from_probs=True)
        tensor([[[0.0000, 0.5000, 0.5000, 1.0000]]])
    """

    probability: Tensor
    frequency: Tensor

    def __init__(self, num_classes: int, *, activation: Activation = "softmax", ignore_index: int = DEFAULT_IGNORE_INDEX) -> None:
        super().__init__(num_classes, activation=activation, ignore_index=ignore_index, num_bins=NUM_FINE_BINS)
        identity = torch.tensor([[0.0, 1.0]], dtype=torch.float64).repeat(num_classes, 1)
        self.register_buffer("probability", identity)
        self.register_buffer("frequency", identity.clone())

    def _accumulate(self, probs: Tensor, share: Tensor, valid: Tensor) -> Bins:
        return accumulate_fine_bins(probs, share, valid=valid)

    def _solve(self) -> None:
        from sklearn.isotonic import IsotonicRegression

        corners = []
        for c in range(self.num_classes):
            bins = self._bins[c]
            filled = bins.count > 0
            if not bool(bins.correct.sum() > 0):
                corners.append(torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64))
                continue
            regression = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
            regression.fit(bins.mean_confidence[filled].numpy(), bins.accuracy[filled].numpy(), sample_weight=bins.count[filled].double().numpy())
            corners.append(torch.stack([torch.from_numpy(regression.X_thresholds_), torch.from_numpy(regression.y_thresholds_)]).double())
        longest = max(pair.shape[1] for pair in corners)
        padded = torch.stack([torch.cat([pair, pair[:, -1:].expand(2, longest - pair.shape[1])], dim=1) for pair in corners])
        self.probability = padded[:, 0].to(self.probability.device)
        self.frequency = padded[:, 1].to(self.frequency.device)

    def _map_class(self, c: int, probs: Tensor) -> Tensor:
        x, y = self.probability[c], self.frequency[c]
        if len(x) == 1:
            return y[0].to(probs.dtype).expand_as(probs)
        p = probs.double().clamp(float(x[0]), float(x[-1]))
        above = torch.searchsorted(x, p.contiguous()).clamp(1, len(x) - 1)
        left, right = x[above - 1], x[above]
        share = torch.where(right > left, (p - left) / torch.where(right > left, right - left, 1.0), 1.0)
        return (y[above - 1] + share * (y[above] - y[above - 1])).to(probs.dtype)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("probability", "frequency"):  # as many corners as the data asked for
            if (value := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(value, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
