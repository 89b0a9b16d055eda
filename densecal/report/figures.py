"""Charts of a report, drawn on their own ``Figure`` objects: pyplot's global state stays as it was."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

__all__ = ["DARK_ON_LIGHT", "REGION_TITLES", "Theme", "history_figures", "inline_svg", "png_bytes", "reliability_figure", "svg_text"]

REGION_TITLES = {"all": "All voxels", "foreground": "In and near the structure", "boundary": "Along boundaries"}


@dataclass(frozen=True)
class Theme:
    """Colours of a chart."""

    ink: str = "#1c2733"
    muted: str = "#5d6b7a"
    grid: str = "#dfe4ea"
    bar: str = "#3b7dd8"
    gap: str = "#d9573f"
    series: tuple[str, ...] = ("#3b7dd8", "#d9573f", "#2f9e6e", "#a06cd5", "#c28a1c")


DARK_ON_LIGHT = Theme()

# Colours that stand for CSS variables in a chart that is part of a page and follows its light or dark style.
_PLACEHOLDERS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--bar)",
    "#050505": "var(--gap)",
    "#060606": "var(--series-3)",
    "#070707": "var(--series-4)",
    "#080808": "var(--series-5)",
}
IN_PAGE = Theme("#010101", "#020202", "#030303", "#040404", "#050505", ("#040404", "#050505", "#060606", "#070707", "#080808"))


def reliability_figure(bins: Mapping[str, Mapping[str, Mapping[str, list]]], regions: Sequence[str], *, theme: Theme = DARK_ON_LIGHT) -> Figure:
    """Top-label reliability diagrams side by side, each above the histogram of its confidence.

    Args:
        bins: ``Evaluation.bins``.
        regions: Regions to draw, from left to right.
        theme: Colours.

    Returns:
        A figure of 4.6 x 5.2 inches per region.
    """
    figure = Figure(figsize=(4.6 * len(regions), 5.2), layout="constrained")
    figure.patch.set_alpha(0)
    grid = figure.subplots(2, len(regions), squeeze=False, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    for column, region in enumerate(regions):
        top_label = bins[region]["top_label"]
        _reliability(grid[0, column], top_label, REGION_TITLES.get(region, region), theme)
        _histogram(grid[1, column], top_label, theme)
    return figure


def _arrays(bins: Mapping[str, list]) -> tuple[np.ndarray, ...]:
    return tuple(np.array(bins[key], dtype=float) for key in ("edges", "count", "mean_confidence", "accuracy"))


def _reliability(axes: Axes, bins: Mapping[str, list], title: str, theme: Theme) -> None:
    edges, count, confidence, accuracy = _arrays(bins)
    n = count.sum()
    filled = count > 0
    left, width = edges[:-1][filled], np.diff(edges)[filled]
    conf, acc = confidence[filled], accuracy[filled]
    axes.plot([0, 1], [0, 1], linestyle=(0, (4, 3)), color=theme.muted, linewidth=1.2, label="perfectly calibrated", zorder=4)
    if n:
        axes.bar(left, acc, width, align="edge", color=theme.bar, alpha=0.85, linewidth=0, label="accuracy", zorder=2)
        axes.bar(left, conf - acc, width, bottom=acc, align="edge", color=theme.gap, alpha=0.45, linewidth=0, label="gap to confidence", zorder=3)
        axes.plot(conf, acc, marker="o", markersize=4.5, linestyle="none", color=theme.ink, zorder=5, clip_on=False)
    ece = f"ECE {np.sum(count[filled] * np.abs(acc - conf)) / n:.3f},  n = {int(n):,} voxels" if n else "nothing to count"
    axes.set_title(f"{title}\n{ece}", color=theme.ink, fontsize=11)
    axes.set_ylabel("Accuracy", color=theme.ink)
    axes.set_ylim(0, 1)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(loc="upper left", fontsize=9, frameon=False, labelcolor=theme.ink)
    _style(axes, theme)


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
    axes.set_xlim(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_ylabel("Voxels\n(log scale)", color=theme.ink)
    axes.set_xlabel("Confidence (line: mean)", color=theme.ink)
    _style(axes, theme)


_HISTORY: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("Loss", "loss", lambda key: "loss" in key),
    ("Dice (validation)", "dice", lambda key: key.split("/", 1)[-1] in ("dice", "val_dice")),
    ("ECE (validation)", "ece", lambda key: re.sub(r"^val_", "", key.split("/", 1)[-1]) in ("ece", "ece_foreground")),
)


def history_figures(history: Sequence[Mapping[str, Any]], *, theme: Theme = DARK_ON_LIGHT) -> list[tuple[str, Figure]]:
    """Curves over epochs: losses, validation Dice, validation ECE; only those that the history has.

    Args:
        history: One row per epoch with ``epoch`` (else its place counts) and any of ``train/loss``, ``val/dice``, ``val/ece``, ``val/ece_foreground``, ...
            Missing and non-finite values are left out.
        theme: Colours.

    Returns:
        Name and figure of each chart.
    """
    epochs = [float(row.get("epoch", i)) for i, row in enumerate(history)]
    charts = []
    for title, name, wanted in _HISTORY:
        keys = [key for key in dict.fromkeys(key for row in history for key in row) if wanted(key)]
        curves = {}
        for key in keys:
            values = np.array([_number(row.get(key)) for row in history])
            if np.isfinite(values).any():
                curves[key] = values
        if not curves:
            continue
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        for i, (key, values) in enumerate(curves.items()):
            there = np.isfinite(values)
            marker = "o" if there.sum() < 30 else ""
            axes.plot(
                np.array(epochs)[there],
                values[there],
                color=theme.series[i % len(theme.series)],
                linewidth=1.6,
                marker=marker,
                markersize=3,
                label=key,
            )
        if name == "ece":
            axes.set_ylim(bottom=0)
        axes.set_title(title, color=theme.ink, fontsize=11)
        axes.set_xlabel("Epoch", color=theme.ink)
        axes.legend(fontsize=9, frameon=False, labelcolor=theme.ink)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _style(axes, theme)
        charts.append((name, figure))
    return charts


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _style(axes: Axes, theme: Theme) -> None:
    axes.patch.set_alpha(0)
    axes.grid(color=theme.grid, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, labelsize=9, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)


def png_bytes(figure: Figure, *, dpi: int = 150) -> bytes:
    """The figure on white, as a file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


def svg_text(figure: Figure) -> str:
    """The figure on white, as a standalone SVG file."""
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_figure(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return buffer.getvalue().decode()


def inline_svg(figure: Figure, *, label: str, prefix: str) -> str:
    """The figure as an ``<svg>`` element of a page, in the page's colours; draw it with the theme ``IN_PAGE``.

    Args:
        figure: The chart.
        label: What a screen reader says.
        prefix: Put before every id, so that charts of one page do not mix.

    Returns:
        The element, without a fixed size.
    """
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_figure(buffer, format="svg", facecolor="none", metadata={"Date": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    text = re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}" class="chart">', text, count=1)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'xlink:href="#', f'href="#{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-")
    for color, variable in _PLACEHOLDERS.items():
        text = text.replace(color, variable)
    return text
