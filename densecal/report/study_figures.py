"""Charts of a study: many methods at once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator

from densecal.report.drawing import Chart, Panel, Theme, plain_text, style_axes
from densecal.report.measures import measure
from densecal.report.reliability import expected_gap
from densecal.report.study_scores import StudyScores

__all__ = ["boundary_chart", "class_chart", "front", "front_chart", "length_chart", "reliability_grid", "size_chart"]

Runs = Mapping[str, Sequence[StudyScores]]


def mean_of(runs: Sequence[StudyScores], key: str) -> float:
    """Mean of a number over runs, NaN where one has none."""
    return statistics.fmean(run.scores.get(key, math.nan) for run in runs)


def front(methods: Runs, keys: Sequence[str]) -> list[str]:
    """The methods that no other one beats: none is at least as good in every measure and better in one."""
    signs = [1 if measure(key).better == "higher" else -1 for key in keys]
    points = {name: [sign * mean_of(runs, key) for sign, key in zip(signs, keys, strict=True)] for name, runs in methods.items()}

    def beaten(name: str) -> bool:
        mine = points[name]
        return any(all(o >= m for o, m in zip(theirs, mine, strict=True)) and theirs != mine for other, theirs in points.items() if other != name)

    return [name for name, values in points.items() if all(map(math.isfinite, values)) and not beaten(name)]


def front_chart(methods: Runs, overlap: str, errors: Sequence[str]) -> Chart:
    """Overlap against errors, a panel for each: mean and spread of every method, those that no other beats joined by a line."""

    def panel(error: str) -> Panel:
        def draw(figure: FigureBase, theme: Theme) -> None:
            axes = figure.subplots()
            best = front(methods, (overlap, error))
            xs, ys = ({name: mean_of(runs, key) for name, runs in methods.items()} for key in (error, overlap))
            line = sorted(best, key=lambda name: xs[name])
            axes.step(
                [xs[name] for name in line],
                [ys[name] for name in line],
                where="post",
                color=theme.muted,
                linewidth=1,
                linestyle=(0, (4, 3)),
                zorder=2,
            )
            for name, runs in methods.items():
                plain = not any(run.posthoc for run in runs)
                color = theme.bar if plain else theme.gap
                spread = [statistics.stdev(run.scores[key] for run in runs) if len(runs) > 1 else 0.0 for key in (error, overlap)]
                axes.errorbar(xs[name], ys[name], spread[1], spread[0], color=color, alpha=0.3, linewidth=1, zorder=2)
                axes.plot(xs[name], ys[name], "o" if plain else "D", color=color, markersize=6 if name in best else 4.5, zorder=4)
            axes.set_xlabel(f"{measure(error).name} (lower is better)", color=theme.ink)
            axes.set_ylabel(f"{measure(overlap).name} (higher is better)", color=theme.ink)
            style_axes(axes, theme)
            _label_points(axes, xs, ys, best, theme)

        return Panel(f"{measure(overlap).name} against {measure(error).name} of all methods", draw)

    return Chart("front", tuple(panel(error) for error in errors), width=7.0, height=6.0)


def _label_points(axes: Axes, xs: Mapping[str, float], ys: Mapping[str, float], first: Sequence[str], theme: Theme) -> None:
    """A name beside each point, where there is room: those of ``first`` before the others, and none over another or over a point."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # everything goes to its place
    finite = [name for name in xs if math.isfinite(xs[name]) and math.isfinite(ys[name])]
    points = {name: axes.transData.transform((xs[name], ys[name])) for name in finite}
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points.values()]
    area = axes.get_window_extent()
    places: tuple[tuple[int, int, str, str], ...] = (
        (7, 0, "left", "center"),
        (-7, 0, "right", "center"),
        (0, 8, "center", "bottom"),
        (0, -8, "center", "top"),
    )
    places += tuple((dx, dy, side, "center") for dx, side in ((9, "left"), (-9, "right")) for dy in (9, -9, 18, -18))
    for name in [*(name for name in first if name in points), *(name for name in finite if name not in first)]:
        for dx, dy, across, along in places:
            label = axes.annotate(
                plain_text(name, max_length=34),
                (xs[name], ys[name]),
                (dx, dy),
                textcoords="offset points",
                ha=across,
                va=along,
                fontsize=7.5,
                color=theme.ink if name in first else theme.muted,
                zorder=5,
            )
            box = label.get_window_extent()
            clear = all(box.x1 < x0 or box.x0 > x1 or box.y1 < y0 or box.y0 > y1 for x0, y0, x1, y1 in taken)
            if clear and box.x0 > area.x0 and box.x1 < area.x1 and box.y0 > area.y0 and box.y1 < area.y1:
                taken.append((box.x0, box.y0, box.x1, box.y1))
                break
            label.remove()


def reliability_grid(methods: Runs, region: str, title: str) -> Chart:
    """A small reliability diagram for each method, its runs pooled, as trained and repaired; the others are shadows behind it."""
    families: dict[str, dict[str, Mapping[str, list]]] = {}
    for runs in methods.values():
        families.setdefault(runs[0].method, {})[runs[0].posthoc] = _pooled([run.diagrams[region] for run in runs])
    columns = min(5, len(families))
    rows = math.ceil(len(families) / columns)

    def draw(figure: FigureBase, theme: Theme) -> None:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(families) :]:
            axes.set_visible(False)
        for axes, (name, repairs) in zip(grid.flat, families.items(), strict=False):
            for others in families.values():
                axes.plot(*_line(next(iter(others.values()))), color=theme.grid, linewidth=0.8, zorder=1)
            axes.plot([0, 1], [0, 1], linestyle=(0, (4, 3)), color=theme.muted, linewidth=1, zorder=2)
            for i, bins in enumerate(repairs.values()):
                axes.plot(*_line(bins), color=theme.series[i % len(theme.series)], linewidth=1.8, zorder=3)
            errors = " → ".join(f"{expected_gap(bins):.3f}" for bins in repairs.values())
            axes.set_title(f"{plain_text(name, max_length=26)}\nECE {errors}", color=theme.ink, fontsize=8.5)
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1)
            axes.set_xticks([0, 0.5, 1])
            axes.set_yticks([0, 0.5, 1])
            axes.set_aspect("equal")
            style_axes(axes, theme)
        figure.supxlabel("Confidence", color=theme.ink, fontsize=9)
        figure.supylabel("Accuracy", color=theme.ink, fontsize=9)

    return Chart(
        "reliability", (Panel(f"Reliability diagrams of all methods, {title.lower()}", draw),), width=2.0 * columns + 0.4, height=0.6 + 2.25 * rows
    )


def class_chart(methods: Runs, overlap: str, region: str, classes: Sequence[str]) -> Chart:
    """Overlap and calibration error of each class, a row for each method."""
    names = list(methods)
    panels = (
        Panel(
            "Overlap of each class",
            lambda figure, theme: _dots(figure, names, _overlaps(methods, overlap, classes), f"{measure(overlap).name} of each class", theme),
        ),
        Panel(
            "Calibration error of each class",
            lambda figure, theme: _dots(figure, names, _errors(methods, region, classes), "Classwise ECE of each class", theme),
        ),
    )
    return Chart("classes", panels, width=5.6, height=1.6 + 0.24 * len(names) + 0.2 * math.ceil(len(classes) / 4))


def _overlaps(methods: Runs, overlap: str, classes: Sequence[str]) -> dict[str, list[float]]:
    return {one: [mean_of(runs, f"{overlap}/{one}") for runs in methods.values()] for one in classes}


def _errors(methods: Runs, region: str, classes: Sequence[str]) -> dict[str, list[float]]:
    return {one: [statistics.fmean(run.class_errors[region][one] for run in runs) for runs in methods.values()] for one in classes}


def _dots(figure: FigureBase, names: Sequence[str], values: Mapping[str, Sequence[float]], title: str, theme: Theme) -> None:
    axes = figure.subplots()
    rows = np.arange(len(names))[::-1]
    for i, (label, series) in enumerate(values.items()):
        look = theme.line(i)
        axes.plot(series, rows, look["marker"], color=look["color"], markersize=4.5, label=plain_text(label), zorder=3)
    axes.set_yticks(rows, [plain_text(name, max_length=34) for name in names], fontsize=8)
    axes.set_title(title, color=theme.ink, fontsize=11)
    style_axes(axes, theme)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    figure.legend(loc="outside lower center", ncols=min(4, len(values)), fontsize=8, frameon=False, labelcolor=theme.ink)


def boundary_chart(methods: Runs, shown: Sequence[str]) -> Chart:
    """How much too sure some methods are, by distance from a boundary."""

    def draw(figure: FigureBase, theme: Theme) -> None:
        axes = figure.subplots()
        unit = ""
        for i, name in enumerate(shown):
            curves = [run.boundary_distance for run in methods[name] if run.boundary_distance]
            if not curves:
                continue
            unit = curves[0]["unit"]
            count = np.array([curve["count"] for curve in curves], dtype=float)
            gap = np.array([[_or_nan(c) - _or_nan(a) for c, a in zip(curve["mean_confidence"], curve["accuracy"], strict=True)] for curve in curves])
            pooled = np.nansum(count * gap, 0) / np.maximum(count.sum(0), 1)
            edges = np.array(curves[0]["edges"], dtype=float)
            axes.plot(
                (edges[:-1] + edges[1:]) / 2, pooled, linewidth=1.8, markersize=4, label=plain_text(name, max_length=34), zorder=3, **theme.line(i)
            )
        axes.axhline(0, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
        axes.set_title("Over-confidence by distance from a boundary", color=theme.ink, fontsize=11)
        axes.set_xlabel(f"Distance from the reference's boundary ({unit})", color=theme.ink)
        axes.set_ylabel("Mean confidence minus accuracy", color=theme.ink)
        axes.legend(fontsize=8.5, frameon=False, labelcolor=theme.ink, handlelength=3)
        style_axes(axes, theme)

    return Chart("boundary_distance", (Panel("Mean confidence minus accuracy by distance from a boundary", draw),), width=6.4, height=4.2)


def length_chart(methods: Runs, shown: Sequence[str], keys: Sequence[str]) -> Chart | None:
    """Validation numbers by length of training, the mean over runs; None where there are fewer than three points."""
    histories = {name: [run.history for run in methods[name] if len(run.history) > 2] for name in shown}
    keys = [key for key in keys if any(f"val/{key}" in row for runs in histories.values() for history in runs for row in history)]
    if not keys:
        return None

    def panel(key: str) -> Panel:
        def draw(figure: FigureBase, theme: Theme) -> None:
            axes = figure.subplots()
            for i, (name, runs) in enumerate(histories.items()):
                points: dict[int, list[float]] = {}
                for history in runs:
                    for row in history:
                        if f"val/{key}" in row:
                            points.setdefault(int(row["epoch"]), []).append(row[f"val/{key}"])
                whole = {epoch: values for epoch, values in points.items() if len(values) == len(runs)}
                if whole:
                    epochs = sorted(whole)
                    axes.plot(
                        epochs,
                        [statistics.fmean(whole[e]) for e in epochs],
                        linewidth=1.6,
                        markersize=4,
                        label=plain_text(name, max_length=34),
                        **theme.line(i),
                    )
            axes.set_title(f"{measure(key).short} by length of training\n(validation cases, mean over runs)", color=theme.ink, fontsize=10.5)
            axes.set_xlabel("Epochs", color=theme.ink)
            axes.legend(fontsize=8, frameon=False, labelcolor=theme.ink, handlelength=3)
            style_axes(axes, theme)

        return Panel(f"{measure(key).name} by length of training", draw)

    return Chart("length", tuple(panel(key) for key in keys), width=4.8, height=3.9)


def size_chart(methods: Runs, keys: Sequence[str]) -> Chart | None:
    """Numbers by how many cases were trained on, a line for methods that differ in settings of the data and the trainer alone; None where no method has two sizes."""
    families: dict[tuple[str, ...], dict[str, Sequence[StudyScores]]] = {}
    for name, runs in methods.items():
        own = (*(line for line in runs[0].facts.get("settings", ()) if not line.startswith(("data.", "trainer."))), runs[0].posthoc)
        families.setdefault(own, {})[name] = runs
    shown = [family for family in families.values() if len({_size(runs) for runs in family.values()}) > 1]
    if not shown:
        return None
    ticks = sorted({_size(runs) for family in shown for runs in family.values()})

    def panel(key: str) -> Panel:
        def draw(figure: FigureBase, theme: Theme) -> None:
            axes = figure.subplots()
            for i, family in enumerate(shown):
                ordered = sorted(family.values(), key=_size)
                sizes, means = [_size(runs) for runs in ordered], [mean_of(runs, key) for runs in ordered]
                spread = [statistics.stdev(run.scores[key] for run in runs) if len(runs) > 1 else 0.0 for runs in ordered]
                label = plain_text(ordered[-1][0].name, max_length=34)
                axes.errorbar(sizes, means, spread, linewidth=1.6, markersize=4.5, capsize=2, elinewidth=0.8, label=label, **theme.line(i))
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.set_xticks(ticks, [f"{size:.0f}" for size in ticks])
            axes.set_title(f"{measure(key).short} by number of training cases", color=theme.ink, fontsize=10.5)
            axes.set_xlabel("Training cases (mean over runs)", color=theme.ink)
            figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False, labelcolor=theme.ink, handlelength=3)
            style_axes(axes, theme)

        return Panel(f"{measure(key).name} by number of training cases", draw)

    return Chart("size", tuple(panel(key) for key in keys), width=4.8, height=4.2)


def _size(runs: Sequence[StudyScores]) -> float:
    return statistics.fmean(run.facts.get("training_cases", math.nan) for run in runs)


def _pooled(diagrams: Sequence[Mapping[str, list]]) -> dict[str, list]:
    """Bins of several runs as one."""
    count = np.array([one["count"] for one in diagrams], dtype=float)

    def mean(key: str) -> list[float]:
        values = np.array([[_or_nan(value) for value in one[key]] for one in diagrams])
        total = count.sum(0)
        sums = np.nansum(count * np.nan_to_num(values), 0)
        return [float(s / t) if t else math.nan for s, t in zip(sums, total, strict=True)]

    return {
        "edges": list(diagrams[0]["edges"]),
        "count": count.sum(0).tolist(),
        "mean_confidence": mean("mean_confidence"),
        "accuracy": mean("accuracy"),
    }


def _line(bins: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and accuracy of the bins that hold enough to be seen: at least a hundred-thousandth of all."""
    count = np.array(bins["count"], dtype=float)
    filled = count > count.sum() * 1e-5
    return np.array(bins["mean_confidence"], dtype=float)[filled], np.array(bins["accuracy"], dtype=float)[filled]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
