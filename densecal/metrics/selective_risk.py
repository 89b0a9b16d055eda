"""Selective prediction: how many errors are left when only the pixels with the highest score are kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from densecal.checks import check_choice
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.metrics.inputs import Pixels, read_pixels
from densecal.metrics.ordered import MAX_EXACT, OrderMetric, fine_row, one_row, rows_of, share_below
from densecal.ops.activation import Activation
from densecal.ops.binning import Bins
from densecal.registry import METRICS

__all__ = [
    "AreaUnderRiskCoverage",
    "ExcessAreaUnderRiskCoverage",
    "RiskCoverage",
    "Score",
    "area_under_risk_coverage",
    "aurc_bound_from_bins",
    "aurc_from_bins",
    "choose_logit_norm",
    "excess_area_under_risk_coverage",
    "excess_aurc_from_bins",
    "logit_norm_score",
    "risk_coverage",
    "risk_coverage_from_bins",
]

Score: TypeAlias = Literal["max_probability", "logit_norm"]


class RiskCoverage(NamedTuple):
    """A risk-coverage curve, each part float64 ``(G,)``.

    Attributes:
        coverage: Share of the pixels that are kept, those of the highest score.
        risk: Share of errors among them; NaN where no pixel counts.
        best_risk: The lowest risk that an order of the same pixels could have: all errors last.
    """

    coverage: Tensor
    risk: Tensor
    best_risk: Tensor


def area_under_risk_coverage(
    probs: Tensor,
    label: Tensor,
    *,
    score: Score = "max_probability",
    norm: float | None = None,
    activation: Activation = "softmax",
    mask: Tensor | None = None,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    validate_args: bool = True,
) -> Tensor:
    r"""Area under the risk-coverage curve (AURC): the error rate among the k pixels of the highest score, averaged over k = 1 to n.

    .. math:: \mathrm{AURC} = \tfrac{1}{n} \sum_{k=1}^{n} \tfrac{1}{k} \sum_{i=1}^{k} e_{(i)}

    The order of pixels of the same score is random, and the value its expectation: among g tied pixels of which e are wrong, after c pixels of which E are
    wrong, the sum over k is :math:`\sum_{j=1}^{g} (E + j e/g) / (c + j) = e + (E - c e/g) (\psi(c + g + 1) - \psi(c + 1))`, psi the digamma function.

    Args:
        probs: Probabilities ``(N, C, *spatial)``, floating, 1 to 3 spatial dims.
        label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)``, or a soft reference ``(N, C, *spatial)``, floating; an error is then 1 minus the share that
            it gives to the predicted class.
        score: ``"max_probability"``: probability of the predicted class. ``"logit_norm"``: see :func:`logit_norm_score`; it repairs the order of networks
            trained with label smoothing.
        norm: p of the norm for ``"logit_norm"``, at least 1; 2 by default. See :func:`choose_logit_norm`.
        activation: ``"softmax"``, or ``"sigmoid"`` for regions that may overlap.
        mask: True where a pixel counts, ``(N, *spatial)``, bool.
        ignore_index: Label of pixels to leave out.
        validate_args: Look at the values too; that waits for a GPU.

    Returns:
        Scalar in [0, 1], float64, lower is better. NaN where no pixel counts.

    Raises:
        TypeError: If ``probs`` is not floating or ``mask`` not bool.
        ValueError: If an option is unknown, out of range or without effect, there are fewer than 3 classes for ``"logit_norm"``, shapes do not fit or, with
            ``validate_args``, values are out of range.

    Reference:
        Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017, arXiv:1705.08500; Geifman et al., "Bias-Reduced Uncertainty
        Estimation for Deep Neural Classifiers", ICLR 2019, arXiv:1805.08206.

    Example:
        In order of confidence right, wrong, right, right: (0 + 1/2 + 1/3 + 1/4) / 4.

        >>> probs = torch.tensor([[[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]]])
        >>> area_under_risk_coverage(probs, torch.tensor([[0, 1, 0, 0]]))
        tensor(0.2708, dtype=torch.float64)
    """
    norm = _check_score(score, norm)
    pixels = read_pixels(probs, label, mask, ignore_index=ignore_index, activation=activation, validate_args=validate_args)
    return aurc_from_bins(rows_of(*_entries(pixels, norm))[0])


def excess_area_under_risk_coverage(
    probs: Tensor,
    label: Tensor,
    *,
    score: Score = "max_probability",
    norm: float | None = None,
    activation: Activation = "softmax",
    mask: Tensor | None = None,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    validate_args: bool = True,
) -> Tensor:
    r"""AURC minus the lowest one that an order could have with the same accuracy, m errors among n pixels: all errors last.

    .. math:: \mathrm{AURC}^* = \tfrac{1}{n} \sum_{k=n-m+1}^{n} \tfrac{k - (n - m)}{k} = \tfrac{1}{n} \big( m - (n - m) (\psi(n + 1) - \psi(n - m + 1)) \big)

    It measures the score alone, whatever the accuracy. With soft references it is 0 only where shares are 0 or 1, since part of an error comes with each pixel.
    Arguments and errors as :func:`area_under_risk_coverage`.

    Returns:
        Scalar in [0, 1], float64, lower is better. NaN where no pixel counts.

    Reference:
        Geifman et al., "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019, arXiv:1805.08206.
        Differs from the paper: it takes the limit of many pixels, r + (1 - r) log(1 - r) with r = m/n, which here is the exact sum.

    Example:
        One error among four, second rather than last: (1/2 + 1/3 + 1/4) / 4 - (1/4) / 4.

        >>> probs = torch.tensor([[[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]]])
        >>> excess_area_under_risk_coverage(probs, torch.tensor([[0, 1, 0, 0]]))
        tensor(0.2083, dtype=torch.float64)
    """
    norm = _check_score(score, norm)
    pixels = read_pixels(probs, label, mask, ignore_index=ignore_index, activation=activation, validate_args=validate_args)
    return excess_aurc_from_bins(rows_of(*_entries(pixels, norm))[0])


def risk_coverage(
    probs: Tensor,
    label: Tensor,
    *,
    coverage: Tensor | None = None,
    score: Score = "max_probability",
    norm: float | None = None,
    activation: Activation = "softmax",
    mask: Tensor | None = None,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    validate_args: bool = True,
) -> RiskCoverage:
    r"""Risk-coverage curve: error rate among the share of pixels with the highest score. Further arguments and errors as :func:`area_under_risk_coverage`.

    Args:
        coverage: Shares in (0, 1], ``(G,)``; 0.01, 0.02, ..., 1 by default. Where they end inside a pixel or among tied ones, these count in proportion.

    Returns:
        ``coverage``, ``risk`` and ``best_risk``.

    Example:
        >>> probs = torch.tensor([[[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]]])
        >>> risk_coverage(probs, torch.tensor([[0, 1, 0, 0]]), coverage=torch.tensor([0.25, 0.5, 1.0])).risk
        tensor([0.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    norm = _check_score(score, norm)
    pixels = read_pixels(probs, label, mask, ignore_index=ignore_index, activation=activation, validate_args=validate_args)
    return risk_coverage_from_bins(rows_of(*_entries(pixels, norm))[0], coverage)


def logit_norm_score(probs: Tensor, norm: float = 2.0) -> Tensor:
    r"""Largest logit over the p-norm of the centred logits, scaled to (0, 1]: a score to order pixels by, not a probability.

    .. math:: s = \frac{\max_c z_c}{\lVert z \rVert_p} \big(1 + (C - 1)^{1-p}\big)^{1/p}, \quad z_c = \log p_c - \tfrac{1}{C} \sum_k \log p_k

    Softmax forgets a constant, so log-probabilities centre to the same z as logits. The factor takes the largest possible value, all other logits equal, to 1;
    it does not change the order. Probabilities that a softmax has rounded to 0 count as the smallest normal number of their dtype. Where all classes are
    equally likely the score is 0.

    Args:
        probs: Probabilities ``(N, C, ...)``, floating, C at least 3: with two, z = (a, -a) and every pixel would score 1.
        norm: p, at least 1, finite.

    Returns:
        ``(N, ...)`` in [0, 1], float64.

    Raises:
        ValueError: If ``norm`` is out of range or there are fewer than 3 classes.

    Reference:
        Cattelan and Silva, "How to Fix a Broken Confidence Estimator: Evaluating Post-hoc Methods for Selective Classification with Deep Neural Networks",
        UAI 2024, arXiv:2305.15508; Xia et al., "Understanding Why Label Smoothing Degrades Selective Classification and How to Fix It", ICLR 2025,
        arXiv:2403.14715.

    Example:
        Of two pixels with the same confidence, the one whose other classes are unequal scores lower.

        >>> logit_norm_score(torch.tensor([[[0.8, 0.8], [0.1, 0.199], [0.1, 0.001]]]))
        tensor([[1.0000, 0.6610]], dtype=torch.float64)
    """
    _check_norm(norm)
    c = probs.shape[1]
    if c < 3:
        raise ValueError(
            f"Expected at least 3 classes for score='logit_norm', but got {c}: two centred logits are opposite, and every pixel would score the same. "
            "Use score='max_probability'."
        )
    log_probs = probs.detach().clamp(min=torch.finfo(probs.dtype).tiny).double().log()
    z = log_probs - log_probs.mean(1, keepdim=True)
    largest = z.amax(1)
    # Divided by the largest, no power overflows; a row of equal logits has none.
    relative = z.abs() / z.abs().amax(1, keepdim=True)
    length = z.abs().amax(1) * relative.pow(norm).sum(1).pow(1 / norm)
    score = largest / length * (1 + (c - 1) ** (1 - norm)) ** (1 / norm)
    return torch.where(largest > 0, score, 0.0).clamp(max=1.0)


def choose_logit_norm(
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    candidates: Sequence[float | None] = (None, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0),
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    validate_args: bool = True,
) -> tuple[float | None, dict[float | None, float]]:
    """The p of ``"logit_norm"`` with the lowest AURC on validation data.

    Args:
        batches: Pairs of probabilities ``(N, C, *spatial)`` and labels; read once.
        candidates: Values of p, at least 1, and ``None`` for the maximum probability, which wins where no norm is better.
        ignore_index: Label of pixels to leave out.
        validate_args: Look at the values too; that waits for a GPU.

    Returns:
        The best candidate, the first of equals, and the AURC of each.

    Raises:
        ValueError: If there are no candidates or no batches, no pixel counts, or as :func:`area_under_risk_coverage`.

    Example:
        >>> probs = torch.tensor([[[0.8, 0.8], [0.1, 0.199], [0.1, 0.001]]])
        >>> best, values = choose_logit_norm([(probs, torch.tensor([[0, 1]]))], candidates=(None, 2.0))
        >>> best, values
        (2.0, {None: 0.5, 2.0: 0.25})
    """
    if not candidates:
        raise ValueError("Expected at least one of `candidates`, but got none.")
    metrics = {
        norm: AreaUnderRiskCoverage(
            score="max_probability" if norm is None else "logit_norm", norm=norm, ignore_index=ignore_index, validate_args=validate_args
        )
        for norm in candidates
    }
    empty = True
    for probs, label in batches:
        empty = False
        for metric in metrics.values():
            metric.to(probs.device).update(probs, label)
    values = {norm: math.nan if empty else metric.compute().item() for norm, metric in metrics.items()}
    if any(math.isnan(value) for value in values.values()):
        raise ValueError("Expected `batches` with at least one pixel that is not ignored, but got none. An iterator can be read only once.")
    return min(values, key=lambda norm: values[norm]), values


def aurc_from_bins(bins: Bins) -> Tensor:
    """AURC of one row of bins in rising order of the score; what shares a bin is in random order. See :func:`area_under_risk_coverage`.

    Args:
        bins: ``(1, B)`` or ``(B,)``: fine bins, or one bin per distinct score.

    Returns:
        Scalar, float64; NaN where the bins are empty.

    Raises:
        ValueError: If there are several rows.

    Example:
        >>> from densecal.ops.fine_bins import accumulate_fine_bins
        >>> aurc_from_bins(accumulate_fine_bins(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([True, False, True, True])))
        tensor(0.2708, dtype=torch.float64)
    """
    count, wrong, before, wrong_before = _descending(one_row(bins))
    share = wrong / count.clamp(min=1)
    return (wrong + (wrong_before - before * share) * _harmonic(before, before + count)).sum() / count.sum()


def excess_aurc_from_bins(bins: Bins) -> Tensor:
    """AURC minus the best one of the same accuracy, of one row of bins. See :func:`excess_area_under_risk_coverage`; arguments and errors as
    :func:`aurc_from_bins`.

    Example:
        >>> from densecal.ops.fine_bins import accumulate_fine_bins
        >>> excess_aurc_from_bins(accumulate_fine_bins(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([True, False, True, True])))
        tensor(0.2083, dtype=torch.float64)
    """
    flat = one_row(bins)
    n = flat.count.sum().double()
    right = flat.correct.sum()
    # With soft references the errors are no whole number: the first k at which the best order must have some is the next one above what is right.
    whole = right.floor()
    return aurc_from_bins(bins) - ((n - whole) - right * _harmonic(whole, n)) / n


def risk_coverage_from_bins(bins: Bins, coverage: Tensor | None = None) -> RiskCoverage:
    """Risk-coverage curve of one row of bins in rising order of the score. See :func:`risk_coverage`.

    Args:
        bins: ``(1, B)`` or ``(B,)``: fine bins, or one bin per distinct score.
        coverage: Shares in (0, 1], ``(G,)``; 0.01, 0.02, ..., 1 by default.

    Raises:
        ValueError: If there are several rows, or ``coverage`` is not a vector of shares in (0, 1].

    Example:
        >>> from densecal.ops.fine_bins import accumulate_fine_bins
        >>> bins = accumulate_fine_bins(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([True, False, True, True]))
        >>> risk_coverage_from_bins(bins, torch.tensor([0.5, 1.0])).best_risk
        tensor([0.0000, 0.2500], dtype=torch.float64)
    """
    bins = one_row(bins)
    device = bins.count.device
    if coverage is None:
        coverage = torch.arange(1, 101, dtype=torch.float64) / 100
    if coverage.ndim != 1 or not bool(((coverage > 0) & (coverage <= 1)).all()):
        raise ValueError(f"Expected `coverage` to be a vector of shares in (0, 1], but got {coverage.tolist()}.")
    coverage = coverage.to(device=device, dtype=torch.float64)
    n = bins.count.sum().double()
    if bins.num_bins == 0:
        nothing = torch.full_like(coverage, math.nan)
        return RiskCoverage(coverage, nothing, nothing.clone())
    _, wrong, _, wrong_before = _descending(bins)
    kept = coverage * n
    place, share = share_below(bins.count.flip(0), kept)
    risk = (wrong_before[place] + share * wrong[place]) / kept
    return RiskCoverage(coverage, risk, (kept - bins.correct.sum()).clamp(min=0) / kept)


def aurc_bound_from_bins(bins: Bins) -> Tensor:
    r"""How far the order of the entries within fine bins could move :func:`aurc_from_bins`.

    Among the first j of g entries with e errors, whatever their order, there are at least max(0, j - (g - e)) and at most min(j, e) errors. With c entries and
    E errors before them the sum of (E + errors) / (c + j) over j has closed forms for both, of harmonic numbers, and the bound is the larger deviation of
    the two areas. Bins of exactly 0 and 1 hold ties and nothing else. The best AURC is known exactly, so the bound holds for the excess, too.

    Args:
        bins: ``(1, B)`` or ``(B,)`` fine bins.

    Raises:
        ValueError: If these are not the fine bins, or several rows of them.
    """
    flat, lower, upper = fine_row(bins)
    count, wrong, before, _ = _descending(flat)
    share = wrong / count.clamp(min=1)
    after = before + count
    expected = wrong - before * share * _harmonic(before, after)  # the errors of the bin itself; those before it are the same in every order
    right, first = (count - wrong).floor(), wrong.floor()
    best = (count - right) - (before + count - wrong) * _harmonic(before + right, after)
    worst = first - before * _harmonic(before, before + first) + wrong * _harmonic(before + first, after)
    several = (lower < upper).flip(0) & (count > 1)
    deviations = torch.stack([torch.where(several, part, 0.0).sum() for part in (worst - expected, expected - best)])
    return deviations.amax().clamp(min=0) / count.sum()


class _SelectiveMetric(OrderMetric):
    def __init__(
        self,
        *,
        score: Score = "max_probability",
        norm: float | None = None,
        activation: Activation = "softmax",
        max_exact: int = MAX_EXACT,
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_exact=max_exact, **kwargs)
        self.norm = _check_score(score, norm)
        self.score: Score = score
        self.activation: Activation = activation
        self.ignore_index = ignore_index
        self.validate_args = validate_args

    def update(self, probs: Tensor, label: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; arguments as :func:`area_under_risk_coverage`."""
        pixels = read_pixels(probs, label, mask, ignore_index=self.ignore_index, activation=self.activation, validate_args=self.validate_args)
        self.add(*_entries(pixels, self.norm))

    def curve(self, coverage: Tensor | None = None) -> RiskCoverage:
        """The risk-coverage curve so far, over all ranks. See :func:`risk_coverage_from_bins`."""
        with self.sync_context():
            return risk_coverage_from_bins(self.rows()[0], coverage)

    def _bound(self, bins: Bins) -> Tensor:
        return aurc_bound_from_bins(bins)


@METRICS.register("aurc")
class AreaUnderRiskCoverage(_SelectiveMetric):
    """Area under the risk-coverage curve over batches, and the curve. See :func:`area_under_risk_coverage`.

    Exact up to ``max_exact`` pixels. Beyond, pixels that share one of the bins of :mod:`densecal.ops.fine_bins` are in random order, and :attr:`error_bound`
    says how far their true order could move the value; see :func:`aurc_bound_from_bins`.

    Args:
        score: ``"max_probability"`` or ``"logit_norm"``.
        norm: p of the norm for ``"logit_norm"``, at least 1; 2 by default.
        activation: ``"softmax"``, or ``"sigmoid"`` for regions that may overlap.
        max_exact: Pixels, ignored ones included, up to which all are kept, on each rank.
        ignore_index: Label of pixels to leave out.
        validate_args: Look at the values too; that waits for a GPU.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an option is unknown, out of range or without effect.

    Example:
        >>> metric = AreaUnderRiskCoverage()
        >>> metric.update(torch.tensor([[[0.9, 0.8], [0.1, 0.2]]]), torch.tensor([[0, 1]]))
        >>> metric.update(torch.tensor([[[0.7, 0.6], [0.3, 0.4]]]), torch.tensor([[0, 0]]))
        >>> metric.compute(), metric.error_bound, metric.curve(torch.tensor([0.5, 1.0])).risk
        (tensor(0.2708, dtype=torch.float64), tensor(0., dtype=torch.float64), tensor([0.5000, 0.2500], dtype=torch.float64))
    """

    def compute(self) -> Tensor:
        """The area, a float64 scalar; NaN where nothing counted."""
        return aurc_from_bins(self.rows()[0])


@METRICS.register("excess_aurc")
class ExcessAreaUnderRiskCoverage(_SelectiveMetric):
    """AURC minus the best one of the same accuracy, over batches. See :func:`excess_area_under_risk_coverage`; arguments, errors and bound as
    :class:`AreaUnderRiskCoverage`.

    Example:
        >>> metric = ExcessAreaUnderRiskCoverage()
        >>> metric(torch.tensor([[[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]]]), torch.tensor([[0, 1, 0, 0]]))
        tensor(0.2083, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The excess, a float64 scalar; NaN where nothing counted."""
        return excess_aurc_from_bins(self.rows()[0])


def _check_norm(norm: float) -> None:
    if not 1 <= norm < math.inf:
        raise ValueError(f"Expected `norm` to be at least 1 and finite, but got {norm}.")


def _check_score(score: str, norm: float | None) -> float | None:
    """The norm to use, ``None`` for the maximum probability."""
    check_choice("score", score, ("max_probability", "logit_norm"))
    if score == "max_probability":
        if norm is not None:
            raise ValueError(f"Expected no `norm` with score='max_probability', but got {norm}. Use score='logit_norm'.")
        return None
    norm = 2.0 if norm is None else norm
    _check_norm(norm)
    return norm


def _entries(pixels: Pixels, norm: float | None) -> tuple[Tensor, Tensor, Tensor]:
    confidence, _, correct = pixels.top_label()
    score = confidence if norm is None else logit_norm_score(pixels.probs, norm)
    return score.unsqueeze(1), correct.unsqueeze(1), pixels.valid.unsqueeze(1)


def _descending(bins: Bins) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the highest score down: entries and errors in each bin, and before it."""
    count = bins.count.double().flip(0)
    wrong = torch.minimum((count - bins.correct.flip(0)).clamp(min=0), count)
    return count, wrong, count.cumsum(0) - count, wrong.cumsum(0) - wrong


def _harmonic(start: Tensor, end: Tensor) -> Tensor:
    """Sum of 1/k over k from ``start`` + 1 to ``end``, whole numbers."""
    return torch.digamma(end + 1) - torch.digamma(start + 1)
