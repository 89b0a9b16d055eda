"""Does confidence equal accuracy? Reliability diagrams of a data set, of its cases, and of several models."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.figure import FigureBase
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from densecal.metrics.evaluation import Evaluation
from densecal.ops.binning import Bins
from densecal.report.drawing import Chart, Panel, Theme, plain_text, style_axes

__all__ = ["REGION_TITLES", "accuracy_band", "dataset_reliability_chart", "draw_reliability_lines", "expected_gap", "reliability_chart"]

REGION_TITLES = {"all": "Everywhere", "foreground": "In and near the structure", "boundary": "Along boundaries"}


def reliability_chart(evaluation: Evaluation) -> Chart:
    """Top-label reliability diagrams, one per region, each above the histogram of its confidence."""

    def panel(region: str) -> Panel:
        title, bins = REGION_TITLES.get(region, region), evaluation.bins[region]["top_label"]
        band = accuracy_band(evaluation.case_bins[region]) if region in evaluation.case_bins else None

        def draw(figure: FigureBase, theme: Theme) -> None:
            upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
            _reliability(upper, bins, band, title, theme)
            _histogram(lower, bins, theme)

        return Panel(f"Reliability diagram, {title.lower()}", draw)

    return Chart("reliability", tuple(panel(region) for region in evaluation.bins), height=5.2)


def accuracy_band(bins: Bins, *, num_resamples: int = 1000, level: float = 0.95, seed: int = 0) -> tuple[np.ndarray, np.ndarray] | None:
    """Bootstrap interval of each bin's accuracy, cases drawn with replacement: voxels of a case are alike, cases are what differs.

    Args:
        bins: Bins of each case, ``(cases, B)``.
        num_resamples: Number of draws.
        level: Share of the draws inside.
        seed: Of the draws.

    Returns:
        Lower and upper end, ``[B]`` each, NaN in bins that fewer than two cases fill; None where there are fewer than two cases.
    """
    count, correct = bins.count.double().cpu().numpy(), bins.correct.double().cpu().numpy()
    num_cases = len(count)
    if num_cases < 2:
        return None
    draws = np.random.default_rng(seed).multinomial(num_cases, np.full(num_cases, 1 / num_cases), size=num_resamples).astype(float)
    low, high = np.full((2, count.shape[1]), np.nan)
    for b in np.flatnonzero((count > 0).sum(0) >= 2):
        drawn = draws @ count[:, b]
        accuracy = (draws @ correct[:, b])[drawn > 0] / drawn[drawn > 0]
        low[b], high[b] = np.quantile(accuracy, [(1 - level) / 2, (1 + level) / 2])
    return low, high


def expected_gap(bins: Mapping[str, list]) -> float:
    """Expected calibration error of one row of bins; NaN where all are empty."""
    _, count, confidence, accuracy = _arrays(bins)
    return float(np.nansum(count * np.abs(accuracy - confidence)) / count.sum()) if count.sum() else float("nan")


def dataset_reliability_chart(evaluation: Evaluation) -> Chart:
    """In how many cases does a bin of confidence have which accuracy? One histogram per region (Barfoot et al. 2024, arXiv:2403.06759)."""

    def panel(region: str) -> Panel:
        title = REGION_TITLES.get(region, region)
        return Panel(
            f"Dataset reliability histogram, {title.lower()}",
            lambda figure, theme: _dataset_histogram(figure, evaluation.case_bins[region], title, theme),
        )

    return Chart("dataset_reliability", tuple(panel(region) for region in evaluation.case_bins), height=4.0)


def draw_reliability_lines(axes: Axes, models: Mapping[str, Mapping[str, list]], title: str, theme: Theme) -> None:
    """Reliability curves of several models, model -> top-label bins, in one diagram."""
    axes.plot([0, 1], [0, 1], linestyle=(0, (4, 3)), color=theme.muted, linewidth=1.2, zorder=2)
    for i, (name, bins) in enumerate(models.items()):
        _, count, confidence, accuracy = _arrays(bins)
        filled = count > 0
        label = f"{plain_text(name)}: ECE {expected_gap(bins):.3f}"
        axes.plot(confidence[filled], accuracy[filled], markersize=4.5, linewidth=1.6, label=label, zorder=3, **theme.line(i))
    axes.set_title(title, color=theme.ink, fontsize=11)
    axes.set_xlabel("Confidence", color=theme.ink)
    axes.set_ylabel("Accuracy", color=theme.ink)
    _unit_square(axes)
    axes.legend(loc="upper left", fontsize=8.5, frameon=False, labelcolor=theme.ink, handlelength=3)
    style_axes(axes, theme)


def _arrays(bins: Mapping[str, list]) -> tuple[np.ndarray, ...]:
    return tuple(np.array(bins[key], dtype=float) for key in ("edges", "count", "mean_confidence", "accuracy"))


def _unit_square(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_yticks(np.linspace(0, 1, 6))


def _reliability(axes: Axes, bins: Mapping[str, list], band: tuple[np.ndarray, np.ndarray] | None, title: str, theme: Theme) -> None:
    edges, count, confidence, accuracy = _arrays(bins)
    n = count.sum()
    filled = count > 0
    left, width = edges[:-1][filled], np.diff(edges)[filled]
    conf, acc = confidence[filled], accuracy[filled]
    axes.plot([0, 1], [0, 1], linestyle=(0, (4, 3)), color=theme.muted, linewidth=1.2, label="perfectly calibrated", zorder=4)
    if n:
        axes.bar(left, acc, width, align="edge", color=theme.bar, alpha=0.85, linewidth=0, label="accuracy", zorder=2)
        axes.bar(left, conf - acc, width, bottom=acc, align="edge", color=theme.gap, alpha=0.45, linewidth=0, label="gap to confidence", zorder=3)
        axes.plot(conf, acc, marker="o", markersize=4.5, linestyle="none", color=theme.ink, zorder=6, clip_on=False)
    if band is not None and n:
        low, high = (end[filled] for end in band)
        axes.vlines(conf, low, high, color=theme.ink, linewidth=6, alpha=0.35, label="95 % over cases", zorder=5)
    axes.set_title(f"{title}\n" + (f"ECE {expected_gap(bins):.3f},  n = {int(n):,}" if n else "nothing to count"), color=theme.ink, fontsize=11)
    axes.set_ylabel("Accuracy", color=theme.ink)
    _unit_square(axes)
    axes.legend(loc="upper left", fontsize=9, frameon=False, labelcolor=theme.ink)
    style_axes(axes, theme)


def _histogram(axes: Axes, bins: Mapping[str, list], theme: Theme) -> None:
    edges, count, confidence, _ = _arrays(bins)
    n = count.sum()
    axes.bar(edges[:-1], count / max(n, 1), np.diff(edges), align="edge", color=theme.muted, alpha=0.7, linewidth=0, zorder=2)
    if n:
        axes.axvline(float(np.nansum(confidence * count) / n), color=theme.gap, linewidth=1.4, zorder=3)
        axes.set_yscale("log")
        axes.set_ylim(min(1e-3, 0.5 * count[count > 0].min() / n), 1.5)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1)
        axes.set_yticks([])
    axes.set_ylabel("Share\n(log scale)", color=theme.ink)
    axes.set_xlabel("Confidence (line: mean)", color=theme.ink)
    style_axes(axes, theme)


def _dataset_histogram(figure: FigureBase, bins: Bins, title: str, theme: Theme) -> None:
    axes = figure.subplots()
    count, correct = bins.count.double().cpu().numpy(), bins.correct.double().cpu().numpy()
    num_bins = count.shape[1]
    case, column = np.nonzero(count)
    row = np.ceil(correct[case, column] / count[case, column] * num_bins - 1).clip(0, num_bins - 1).astype(int)
    cases = np.zeros((num_bins, num_bins))
    np.add.at(cases, (row, column), 1)
    edges = np.linspace(0, 1, num_bins + 1)
    most = max(int(cases.max()), 1)
    levels = ListedColormap([to_rgba(theme.bar, alpha) for alpha in np.linspace(0.15, 1, min(most, 12))])
    mesh = axes.pcolormesh(edges, edges, np.ma.masked_equal(cases, 0), cmap=levels, vmin=0.5, vmax=most + 0.5, zorder=2)
    axes.plot([0, 1], [0, 1], linestyle=(0, (4, 3)), color=theme.ink, linewidth=1.2, zorder=4)
    bar = figure.colorbar(mesh, ax=axes, pad=0.03)
    bar.set_label("Cases", color=theme.ink)
    bar.ax.tick_params(colors=theme.muted, labelsize=9)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    bar.outline.set_visible(False)
    bar.ax.patch.set_alpha(0)  # the colours are translucent: the page shines through here, too
    axes.set_title(f"{title}\n{len(count)} case{'s' if len(count) != 1 else ''}", color=theme.ink, fontsize=11)
    axes.set_xlabel("Confidence", color=theme.ink)
    axes.set_ylabel("Accuracy in one case", color=theme.ink)
    _unit_square(axes)
    style_axes(axes, theme)
