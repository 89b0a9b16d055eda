"""What a measure that needs the order of the confidences keeps of the pixels: the pixels themselves while they fit, then a histogram with thousands of bins.

Both are :class:`densecal.ops.binning.Bins` in rising order of confidence, one bin per distinct confidence or one per fine bin, so every measure has one formula
for both. Where bins hold several confidences, each measure also says how far their order could move it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from densecal.checks import check_choice, check_non_negative
from densecal.metrics.calibration_error import CalibrationKind
from densecal.metrics.inputs import Pixels
from densecal.ops.binning import Bins
from densecal.ops.fine_bins import NUM_FINE_BINS, accumulate_fine_bins, distinct_bins, fine_bin_edges

__all__ = ["MAX_EXACT", "OrderMetric", "confidence_of", "fine_row", "num_rows_of", "one_row", "rows_of", "share_below"]

MAX_EXACT = 1 << 16
"""Pixels that a metric keeps before it passes to the histogram: 1.5 MiB per class."""


def confidence_of(pixels: Pixels, kind: CalibrationKind) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence and correctness, each ``(N, K, P)``, and where they count, of a shape that broadcasts to it. K is 1 for the top label."""
    check_choice("kind", kind, ("top_label", "classwise"))
    if kind == "classwise":
        return pixels.per_class()
    confidence, _, correct = pixels.top_label()
    return confidence.unsqueeze(1), correct.unsqueeze(1), pixels.valid.unsqueeze(1)


def rows_of(confidence: Tensor, correct: Tensor, valid: Tensor) -> list[Bins]:
    """Exact bins ``(1, number of distinct values)``, one per row K of ``(N, K, P)``."""
    valid = valid.expand_as(confidence)
    return [distinct_bins(confidence[:, k], correct[:, k], valid[:, k]) for k in range(confidence.shape[1])]


def one_row(bins: Bins) -> Bins:
    """The bins as a vector; an error where there are several rows, which have no common order."""
    if bins.count.numel() != bins.num_bins:
        raise ValueError(
            f"Expected one row of bins, (1, B) or (B,), but got {tuple(bins.count.shape)}. Pick a row, or merge them with `bins.sum(0)`."
        )
    return bins.view(bins.num_bins)


def share_below(count: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first ``at`` entries of bins that hold ``count`` end: the bin, and the share of it that lies among them. Entries of a bin are alike."""
    upto = count.cumsum(0).double()
    place = torch.searchsorted(upto, at).clamp(max=len(count) - 1)
    count = count[place]
    return place, ((at - (upto[place] - count)) / count.clamp(min=1)).clamp(0, 1)


def fine_row(bins: Bins) -> tuple[Bins, Tensor, Tensor]:
    """One row of fine bins as a vector, with the lower and upper bound of the confidences in each."""
    if bins.num_bins != NUM_FINE_BINS:
        raise ValueError(
            f"Expected the {NUM_FINE_BINS} bins of `accumulate_fine_bins`, but got {bins.num_bins}. One bin per distinct value has no error."
        )
    edges = fine_bin_edges(device=bins.count.device)
    return one_row(bins), edges[:-1], edges[1:]


def num_rows_of(kind: CalibrationKind, num_classes: int | None) -> int:
    """Rows that a metric keeps."""
    check_choice("kind", kind, ("top_label", "classwise"))
    if kind == "top_label":
        return 1
    if num_classes is None:
        raise ValueError("Expected `num_classes` for kind='classwise', which keeps a row per class. Give the number of channels of `probs`.")
    return num_classes


class OrderMetric(Metric):
    """Base of the measures that sort confidences; a subclass turns :meth:`rows` into a number.

    Args:
        num_rows: Number of rows K, each sorted for itself.
        max_exact: Pixels, ignored ones included, of which every entry is kept, on each rank.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``max_exact`` is negative.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    entries: list[Tensor]
    bin_count: Tensor
    bin_confidence: Tensor
    bin_correct: Tensor

    def __init__(self, num_rows: int = 1, *, max_exact: int = MAX_EXACT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_non_negative("max_exact", max_exact)
        self.num_rows = num_rows
        self.max_exact = max_exact
        empty = Bins.empty(num_rows, NUM_FINE_BINS)
        self.add_state("entries", [], dist_reduce_fx="cat")
        self.add_state("bin_count", empty.count, dist_reduce_fx="sum")
        self.add_state("bin_confidence", empty.confidence, dist_reduce_fx="sum")
        self.add_state("bin_correct", empty.correct, dist_reduce_fx="sum")

    def add(self, confidence: Tensor, correct: Tensor, valid: Tensor) -> None:
        """Take in ``(N, K, P)``. Sizes alone, which the host knows, decide what is kept how; what is kept after the histogram has begun joins it later."""
        if confidence.shape[1] != self.num_rows:
            raise ValueError(f"Expected `probs` with {self.num_rows} classes, but got {confidence.shape[1]}.")
        new = confidence.shape[0] * confidence.shape[2]
        if sum(len(entry) for entry in self.entries) + new <= self.max_exact:
            tensors = torch.broadcast_tensors(confidence.double(), correct.double(), valid.double())
            self.entries.append(torch.stack([tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors], dim=-1))  # (N P, K, 3)
            return
        bins = self._kept_and_binned()
        row = torch.arange(self.num_rows, device=confidence.device).view(1, -1, 1)
        bins = bins + accumulate_fine_bins(confidence, correct, row=row, num_rows=self.num_rows, valid=valid)
        self.entries = []
        self.bin_count, self.bin_confidence, self.bin_correct = bins.count, bins.confidence, bins.correct

    def rows(self) -> list[Bins]:
        """What was accumulated, ``(1, B)`` or ``(B,)`` for each row, in rising order of confidence: exact bins while everything fits, else fine ones."""
        if self.bin_count.any():
            bins = self._kept_and_binned()
            return [bins[k] for k in range(self.num_rows)]
        confidence, correct, valid = self._kept().unbind(-1)
        return [distinct_bins(confidence[:, k], correct[:, k], valid[:, k] > 0) for k in range(self.num_rows)]

    @property
    def error_bound(self) -> Tensor:
        """How far :meth:`compute` can be from the exact value, over all ranks: 0 while all pixels are kept. Mean over rows, as the value is."""
        with self.sync_context():
            if not self.bin_count.any():
                return torch.zeros((), dtype=torch.float64, device=self.device)
            return torch.stack([self._bound(bins) for bins in self.rows()]).nanmean()

    def _bound(self, bins: Bins) -> Tensor:
        """How far the order within a row of fine bins could move its value."""
        raise NotImplementedError

    @property
    def count(self) -> Tensor:
        """Number of pixels that counted (of the first row)."""
        return self.bin_count[0].sum() + sum(entry[:, 0, 2].sum().long() for entry in self._as_list())

    def _as_list(self) -> list[Tensor]:
        return [self.entries] if isinstance(self.entries, Tensor) else self.entries

    def _kept(self) -> Tensor:
        """Kept entries ``(n, K, 3)``: confidence, correctness and 1 where they count."""
        kept = self._as_list()
        return dim_zero_cat(kept) if len(kept) else torch.zeros(0, self.num_rows, 3, dtype=torch.float64, device=self.device)

    def _kept_and_binned(self) -> Bins:
        confidence, correct, valid = self._kept().unbind(-1)
        row = torch.arange(self.num_rows, device=confidence.device)
        kept = accumulate_fine_bins(confidence, correct, row=row, num_rows=self.num_rows, valid=valid > 0)
        return Bins(self.bin_count, self.bin_confidence, self.bin_correct) + kept

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # A rank without entries takes part in the gathering with none of the right width; torchmetrics would send a single-precision vector.
        if not len(self.entries):
            self.entries = [self._kept()]
        super()._sync_dist(*args, **kwargs)
