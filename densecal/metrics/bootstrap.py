"""How far a number could be off because these cases were looked at and not others: the bootstrap over cases.

The unit that is drawn is the case (or the subject), never the pixel: pixels of one image are far from independent, and intervals over pixels come out far
too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from densecal.checks import check_positive, plain

__all__ = ["CaseBootstrap"]

_BLOCK = 1 << 22
"""Resampled sums held at a time, in numbers: 32 MiB."""


class CaseBootstrap:
    r"""Resamples of n cases, drawn once, so that every number and every model that is asked about sees the same ones.

    A replicate draws as many cases as there are, with replacement; it is kept as how often each case was drawn. A figure that is a function of sums over
    cases (a mean, a pooled error from bins) is that function of the weighted sums, so a replicate costs a row of one matrix product.

    Because resamples are shared, the difference of two models is bootstrapped on pairs: its interval is narrower than the two single ones suggest, and it is
    the one to look at.

    Intervals are between percentiles of the replicates. Two things to know when reading them. With few cases they are somewhat short: of strongly skewed scores
    (many near 1, a tail towards 0) those of 95 % held the true mean in 91 % of samples of 20 cases and 92 % of 50. And a calibration error is never
    below 0, so noise moves it up, in the data and once more in a resample: near 0 the interval lies too high, in a tenth of samples even above the figure itself.
    Bias-corrected, accelerated intervals were tried and helped little with the first (93 % and 94 %), not with the second.

    Args:
        num_cases: Number of cases n.
        replicates: Number of resamples R.
        level: Share of resamples that the interval holds, in (0, 1).
        groups: Which cases belong together, for example the subject of each, ``(n,)``, whole numbers: groups are drawn whole, as many as there are.
        seed: Of the draws.

    Raises:
        ValueError: If a number is out of range, or ``groups`` has not one entry per case.

    Reference:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.

    Example:
        >>> bootstrap = CaseBootstrap(4)
        >>> bootstrap.mean_interval(torch.tensor([0.5, 0.7, 0.8, 0.9]))
        (tensor(0.5750, dtype=torch.float64), tensor(0.8500, dtype=torch.float64))
    """

    def __init__(
        self,
        num_cases: int,
        *,
        replicates: int = 1000,
        level: float = 0.95,
        groups: Tensor | Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        if num_cases < 0:
            raise ValueError(f"Expected `num_cases` to be 0 or greater, but got {num_cases}.")
        check_positive("replicates", replicates)
        if not 0 < level < 1:
            raise ValueError(f"Expected `level` in (0, 1), but got {level}. An interval of 95 % is 0.95.")
        self.num_cases, self.replicates, self.level, self.seed = num_cases, replicates, level, seed
        units = torch.arange(num_cases)
        if groups is not None:
            groups = torch.as_tensor(groups).cpu()
            if groups.shape != (num_cases,):
                raise ValueError(f"Expected `groups` of shape (n,) = {(num_cases,)}, one entry per case, but got {tuple(groups.shape)}.")
            units = groups.unique(return_inverse=True)[1]
        self.units = units
        """Number of each case's group, or of the case itself, ``(n,)``."""
        self.num_units = int(units.max()) + 1 if num_cases else 0

        counts = torch.zeros(replicates, self.num_units, dtype=torch.int32)
        if self.num_units:
            drawn = torch.randint(0, self.num_units, counts.shape, generator=torch.Generator().manual_seed(seed))
            counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.int32))
        self.weights = counts[:, units]
        """How often each replicate drew each case, ``(R, n)``, int32."""

    def mean_interval(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Interval of the mean over cases.

        The difference of two models' means is ``mean_interval(a - b)``: over the cases where both have a value.

        Args:
            values: One number per case, ``(n,)``, or several, ``(n, *rest)``. NaN where a case has none: it is left out of each replicate's mean.

        Returns:
            Lower and upper end, each ``(*rest,)``, float64, on the CPU. NaN where fewer than two cases (or groups) have a value.

        Raises:
            ValueError: If there is not one row per case.
        """
        values = self._per_case("values", values)
        defined = ~values.isnan()
        # Columns may have their values in different cases, so each brings its own count along.
        means = self.resampled(lambda total, count: total / count, values.nan_to_num(nan=0.0), defined)
        return self._ends(means, defined)

    def interval(self, statistic: Callable[..., Tensor], *per_case_sums: Tensor) -> tuple[Tensor, Tensor]:
        """Interval of a pooled figure: a function of sums over cases.

        Args:
            statistic: Takes the sums of r resamples, each ``(r, *rest)``, float64, and returns the figure of each, ``(r, *shape)``.
            per_case_sums: What each case adds, ``(n, *rest)`` each: for example counts, confidences and hits per bin. A case without anything adds 0.

        Returns:
            Lower and upper end, each ``(*shape,)``, float64, on the CPU. NaN where fewer than two cases (or groups) add anything, or the figure is undefined.

        Raises:
            ValueError: If there is not one row per case, or a sum is NaN.

        Example:
            >>> count, hits = torch.tensor([10.0, 30.0, 20.0]), torch.tensor([9.0, 15.0, 16.0])
            >>> CaseBootstrap(3).interval(lambda count, hits: hits / count, count, hits)
            (tensor(0.5000, dtype=torch.float64), tensor(0.9000, dtype=torch.float64))
        """
        sums = [self._per_case("per_case_sums", one) for one in per_case_sums]
        if any(bool(one.isnan().any()) for one in sums):
            raise ValueError("Expected `per_case_sums` without NaN, but got some. A case that has nothing to add adds 0.")
        adds = torch.stack([(one != 0).reshape(self.num_cases, math.prod(one.shape[1:])).any(1) for one in sums]).any(0)
        return self._ends(self.resampled(statistic, *sums), adds)

    def difference_interval(self, statistic: Callable[..., Tensor], sums_a: Sequence[Tensor], sums_b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Interval of the difference of a pooled figure between two models on the same cases, a minus b, on the same resamples.

        Args:
            statistic: As for :meth:`interval`.
            sums_a: What each case adds for model a, ``(n, *rest)`` each.
            sums_b: The same for model b.

        Returns:
            Lower and upper end, as :meth:`interval`. An interval that leaves 0 out is a difference that the choice of cases does not explain.

        Raises:
            ValueError: As :meth:`interval`.
        """
        split = len(sums_a)
        return self.interval(lambda *sums: statistic(*sums[:split]) - statistic(*sums[split:]), *sums_a, *sums_b)

    def resampled(self, statistic: Callable[..., Tensor], *per_case_sums: Tensor) -> Tensor:
        """The figure of every replicate, ``(R, *shape)``, float64; arguments as for :meth:`interval`."""
        sums = [self._per_case("per_case_sums", one) for one in per_case_sums]
        width = sum(math.prod(one.shape[1:]) for one in sums)
        step = max(1, _BLOCK // max(width, self.num_cases, 1))
        return torch.cat([statistic(*(self._weighted(rows.double(), one) for one in sums)) for rows in self.weights.split(step)])

    @staticmethod
    def _weighted(rows: Tensor, sums: Tensor) -> Tensor:
        return (rows @ sums.reshape(len(sums), math.prod(sums.shape[1:]))).view(len(rows), *sums.shape[1:])

    def _ends(self, replicates: Tensor, defined: Tensor) -> tuple[Tensor, Tensor]:
        """Quantiles of the replicates, NaN where fewer than two units are defined; ``defined`` ``(n,)`` or ``(n, *shape)``."""
        has_value = torch.zeros(self.num_units, *defined.shape[1:], dtype=torch.int64).index_add_(0, self.units, defined.long()) > 0
        enough = has_value.sum(0) >= 2
        tail = (1 - self.level) / 2
        lower, upper = (torch.where(enough, _quantile(replicates, share), torch.nan) for share in (tail, 1 - tail))
        return lower, upper

    def _per_case(self, name: str, values: Tensor) -> Tensor:
        values = plain(values).detach().cpu().double()
        if values.ndim < 1 or len(values) != self.num_cases:
            raise ValueError(f"Expected `{name}` with one row for each of {self.num_cases} cases, but got shape {tuple(values.shape)}.")
        return values


def _quantile(replicates: Tensor, share: float) -> Tensor:
    """Quantile of the values along axis 0 that are not NaN, linear between neighbours. ``torch.nanquantile`` takes at most 16 million values."""
    ordered = replicates.sort(dim=0).values  # NaN last
    last = ((~ordered.isnan()).sum(0) - 1).clamp(min=0)
    position = share * last
    below = position.floor().long()
    low, high = (ordered.gather(0, index.unsqueeze(0)).squeeze(0) for index in (below, torch.minimum(below + 1, last)))
    return low + (high - low) * (position - below)
