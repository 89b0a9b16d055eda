"""Charts of a report beside the reliability diagrams, and the list of all that an evaluation has."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import FuncFormatter, MaxNLocator

from densecal.metrics.evaluation import Evaluation
from densecal.report.drawing import Chart, Panel, Theme, plain_text, style_axes
from densecal.report.reliability import REGION_TITLES, draw_reliability_lines, expected_gap

__all__ = [
    "boundary_distance_chart",
    "class_chart",
    "classwise_errors",
    "comparison_chart",
    "history_charts",
    "risk_coverage_chart",
]

_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g} %")


def risk_coverage_chart(evaluation: Evaluation) -> Chart:
    """Error rate among the most confident voxels, by how many are kept; one panel per region that has the curve."""

    def panel(region: str, curve: Mapping[str, Sequence[float]]) -> Panel:
        title = REGION_TITLES.get(region, region)

        def draw(figure: FigureBase, theme: Theme) -> None:
            axes = figure.subplots()
            _risk_axes(axes, f"Risk and coverage\n{title.lower()}", theme)
            best, risk, coverage = (np.array(curve[key], dtype=float) for key in ("best_risk", "risk", "coverage"))
            axes.fill_between(coverage, best, risk, color=theme.bar, alpha=0.15, linewidth=0, zorder=2)
            axes.plot(coverage, risk, color=theme.bar, linewidth=1.8, label="least confident left out first", zorder=4)
            axes.plot(coverage, best, color=theme.muted, linewidth=1.4, linestyle=(0, (4, 3)), label="best possible order", zorder=3)
            axes.legend(loc="upper left", fontsize=9, frameon=False, labelcolor=theme.ink)
            axes.set_ylim(0, _ceiling(risk))

        return Panel(f"Risk-coverage curve, {title.lower()}", draw)

    return Chart("risk_coverage", tuple(panel(region, curve) for region, curve in risk_curves(evaluation).items()))


def risk_curves(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Region -> its risk-coverage curve, where it has points."""
    named = {region: f"risk_coverage{'' if region == 'all' else f'_{region}'}" for region in evaluation.pooled}
    return {region: evaluation.curves[key] for region, key in named.items() if evaluation.curves.get(key, {}).get("coverage")}


def boundary_distance_chart(curve: Mapping[str, Any]) -> Chart:
    """Error rate and 1 - confidence by the distance from a reference boundary: one line where the model is calibrated everywhere."""

    def draw(figure: FigureBase, theme: Theme) -> None:
        axes = figure.subplots()
        edges, count, accuracy, confidence = (np.array(curve[key], dtype=float) for key in ("edges", "count", "accuracy", "mean_confidence"))
        filled = count > 0
        steps = np.diff(edges)
        last = steps[np.isfinite(steps)][-1] if np.isfinite(steps).any() else 1.0
        middle = (edges[:-1] + np.where(np.isfinite(steps), steps, last) / 2)[filled]
        error, doubt = 1 - accuracy[filled], 1 - confidence[filled]
        axes.fill_between(middle, doubt, error, color=theme.gap, alpha=0.25, linewidth=0, label="miscalibration", zorder=2)
        axes.plot(middle, error, linewidth=1.8, markersize=4, label="error rate", zorder=4, **theme.line(1))
        axes.plot(middle, doubt, linewidth=1.8, markersize=4, label="1 − confidence", zorder=3, **theme.line(0))
        axes.set_title("Errors by distance from a boundary", color=theme.ink, fontsize=11)
        axes.set_xlabel(f"Distance from the reference's boundary ({curve['unit']})", color=theme.ink)
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.set_ylim(0, _ceiling(np.concatenate([error, doubt])))
        axes.set_xlim(left=0)
        axes.legend(loc="upper right", fontsize=9, frameon=False, labelcolor=theme.ink, handlelength=3)
        style_axes(axes, theme)

    return Chart("boundary_distance", (Panel("Error rate and one minus confidence by distance from a boundary", draw),))


def class_chart(evaluation: Evaluation) -> Chart:
    """Overlap and classwise calibration error of every class as bars."""
    names = evaluation.class_names
    if evaluation.leading[0] == "dice":
        title, shown = "Overlap, mean over cases", {"Dice": (evaluation.mean, "dice"), "IoU": (evaluation.mean, "iou")}
    else:
        title, shown = "IoU", {"whole data set": (evaluation.fine_grained, "iou_dataset"), "mean over cases": (evaluation.mean, "iou")}
    overlap = {label: [numbers[f"{key}/{name}"] for name in names] for label, (numbers, key) in shown.items()}
    errors = {REGION_TITLES.get(region, region): classwise_errors(evaluation, region) for region in evaluation.bins}
    panels = (
        Panel("Overlap per class", lambda figure, theme: _bars(figure, names, overlap, title, 1.0, theme)),
        Panel("Classwise ECE per class", lambda figure, theme: _bars(figure, names, errors, "Classwise ECE, pooled", None, theme)),
    )
    return Chart("classes", panels, height=1.3 + len(names) * (0.3 if len(names) > 8 else 0.5))


def classwise_errors(evaluation: Evaluation, region: str) -> list[float]:
    """Expected calibration error of each class's probability."""
    bins = evaluation.bins[region]["classwise"]
    return [
        expected_gap({"edges": bins["edges"], **{key: bins[key][c] for key in ("count", "mean_confidence", "accuracy")}})
        for c in range(len(evaluation.class_names))
    ]


def comparison_chart(evaluations: Mapping[str, Evaluation], region: str) -> Chart:
    """Reliability curves of all models in one diagram, and their risk-coverage curves in another where they have them."""
    title = REGION_TITLES.get(region, region)
    bins = {name: evaluation.bins[region]["top_label"] for name, evaluation in evaluations.items()}
    curves = {name: curve[region] for name, evaluation in evaluations.items() if region in (curve := risk_curves(evaluation))}

    def reliability(figure: FigureBase, theme: Theme) -> None:
        draw_reliability_lines(figure.subplots(), bins, f"Reliability\n{title.lower()}", theme)

    def risk(figure: FigureBase, theme: Theme) -> None:
        axes = figure.subplots()
        _risk_axes(axes, f"Risk and coverage\n{title.lower()}", theme)
        for i, name in enumerate(evaluations):
            if name in curves:
                coverage, values = (np.array(curves[name][key], dtype=float) for key in ("coverage", "risk"))
                axes.plot(coverage, values, linewidth=1.6, markersize=4.5, markevery=0.12, label=plain_text(name), **theme.line(i))
        axes.set_ylim(0, _ceiling(np.concatenate([np.array(curve["risk"], dtype=float) for curve in curves.values()])))
        axes.legend(loc="upper left", fontsize=8.5, frameon=False, labelcolor=theme.ink, handlelength=3)

    panels = [Panel(f"Reliability curves of all models, {title.lower()}", reliability)]
    if curves:
        panels.append(Panel(f"Risk-coverage curves of all models, {title.lower()}", risk))
    return Chart("comparison", tuple(panels), width=5.0, height=4.8)


_HISTORY: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("Loss", "loss", lambda key: "loss" in key),
    ("Dice (validation)", "dice", lambda key: key.split("/", 1)[-1] in ("dice", "val_dice")),
    ("mIoU over the data set (validation)", "iou_dataset", lambda key: key.split("/", 1)[-1] == "iou_dataset"),
    ("ECE (validation)", "ece", lambda key: re.sub(r"^val_", "", key.split("/", 1)[-1]) in ("ece", "ece_foreground")),
)


def history_charts(history: Sequence[Mapping[str, Any]], *, overlap: str = "dice") -> list[Chart]:
    """Curves over epochs: losses, validation overlap, validation ECE; only those that the history has.

    Args:
        history: One row per epoch with ``epoch`` (else its place counts) and any of ``train/loss``, ``val/dice``, ``val/ece``, ``val/ece_foreground``, ...
            Missing and non-finite values are left out.
        overlap: ``"dice"`` or ``"iou_dataset"``, which of them to draw.

    Returns:
        ``history_loss``, ``history_dice`` (or ``history_iou_dataset``), ``history_ece``.
    """
    epochs = np.array([float(row.get("epoch", i)) for i, row in enumerate(history)])
    charts = []
    for title, name, wanted in (entry for entry in _HISTORY if entry[1] in ("loss", overlap, "ece")):
        keys = [key for key in dict.fromkeys(key for row in history for key in row) if wanted(key)]
        values = {key: np.array([_number(row.get(key)) for row in history]) for key in keys}
        curves = {key: (epochs[there], column[there]) for key, column in values.items() if (there := np.isfinite(column)).any()}
        if curves:
            charts.append(Chart(f"history_{name}", (_history_panel(title, curves, from_zero=name == "ece"),), height=3.0))
    return charts


def _history_panel(title: str, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, from_zero: bool) -> Panel:
    def draw(figure: FigureBase, theme: Theme) -> None:
        axes = figure.subplots()
        for i, (key, (epoch, values)) in enumerate(curves.items()):
            look = theme.line(i) | ({} if len(values) < 30 else {"marker": ""})
            axes.plot(epoch, values, linewidth=1.6, markersize=3, label=plain_text(key), **look)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_title(title, color=theme.ink, fontsize=11)
        axes.set_xlabel("Epoch", color=theme.ink)
        axes.legend(fontsize=9, frameon=False, labelcolor=theme.ink, handlelength=3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        style_axes(axes, theme)

    return Panel(f"{title} per epoch", draw)


def _bars(figure: FigureBase, names: Sequence[str], series: Mapping[str, Sequence[float]], title: str, end: float | None, theme: Theme) -> None:
    """Horizontal bars, classes from top to bottom, one bar per series; a class without a value is said to have none."""
    axes = figure.subplots()
    place, height = np.arange(len(names)), 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        at = place - 0.4 + height * (i + 0.5)
        numbers = np.array(values, dtype=float)
        axes.barh(at, np.nan_to_num(numbers), height, color=theme.series[i], alpha=(1, 0.65, 0.85)[i % 3], linewidth=0, label=label, zorder=2)
    for c in np.flatnonzero(np.isnan(np.array(list(series.values()), dtype=float)).all(0)).tolist():
        axes.text(0.01, c, "not in the data", transform=axes.get_yaxis_transform(), va="center", fontsize=8.5, color=theme.muted)
    axes.set_yticks(place, [plain_text(name, max_length=18) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlim(0, end)
    axes.set_title(title, color=theme.ink, fontsize=11)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8.5, frameon=False, labelcolor=theme.ink)
    style_axes(axes, theme)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelcolor=theme.ink)


def _risk_axes(axes: Axes, title: str, theme: Theme) -> None:
    axes.set_title(title, color=theme.ink, fontsize=11)
    axes.set_xlabel("Coverage: share kept, most confident first", color=theme.ink)
    axes.set_ylabel("Error rate among those kept", color=theme.ink)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_formatter(_PERCENT)
    style_axes(axes, theme)


def _ceiling(values: np.ndarray) -> float:
    """End of an axis that starts at 0, with room for a legend above the highest value."""
    finite = values[np.isfinite(values)]
    return 1.3 * float(finite.max()) if finite.size and finite.max() > 0 else 0.01


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
