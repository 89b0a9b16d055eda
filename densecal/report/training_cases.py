"""What a loss kept of each training case: how it is spread over the cases, and the cases at both ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator

from densecal.report.drawing import Chart, Panel, Theme, style_axes
from densecal.report.tables import Table, number, text

__all__ = ["CaseLevels", "levels_chart", "levels_rows", "levels_table"]

CaseLevels = Mapping[str, Mapping[str, float]]
"""Name of a number -> training case -> number."""

_NAMES = {"perturbation": "Level of label perturbation"}
_SHOWN = 5


def levels_rows(levels: CaseLevels) -> list[dict[str, str | float]]:
    """One row per case, ``case_id`` and its numbers.

    Example:
        >>> levels_rows({"perturbation": {"a": 0.1, "b": 0.0}})
        [{'case_id': 'a', 'perturbation': 0.1}, {'case_id': 'b', 'perturbation': 0.0}]
    """
    cases = dict.fromkeys(case for values in levels.values() for case in values)
    return [{"case_id": case, **{name: values[case] for name, values in levels.items() if case in values}} for case in cases]


def levels_chart(levels: CaseLevels) -> Chart:
    """How many training cases have which level, one panel for each name."""
    return Chart("training_cases", tuple(_panel(name, list(values.values())) for name, values in levels.items()), height=3.0)


def levels_table(levels: CaseLevels) -> Table:
    """The training cases with the highest and the lowest levels, the highest first."""
    rows = []
    for name, values in levels.items():
        ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
        ends = ordered if len(ordered) <= 2 * _SHOWN else ordered[:_SHOWN] + ordered[-_SHOWN:]
        rows += [(text(case), text(_NAMES.get(name, name)), number(float(value), digits=4)) for case, value in ends]
    left_out = any(len(values) > 2 * _SHOWN for values in levels.values())
    return Table(
        "training_cases",
        "Training cases",
        (text("Case"), text("Number"), text("Value")),
        tuple(rows),
        note=f"The {_SHOWN} highest and the {_SHOWN} lowest; training_cases.csv has all of them." if left_out else "",
    )


def _panel(name: str, values: Sequence[float]) -> Panel:
    title = _NAMES.get(name, name)

    def draw(figure: FigureBase, theme: Theme) -> None:
        axes = figure.subplots()
        numbers = np.array(values, dtype=float)
        end = max(float(numbers.max()), 1e-3)
        axes.hist(numbers, bins=np.linspace(min(0.0, float(numbers.min())), end, 25).tolist(), color=theme.bar, linewidth=0, zorder=2)
        axes.set_title(f"{title}, end of training", color=theme.ink, fontsize=11)
        axes.set_xlabel("Level", color=theme.ink)
        axes.set_ylabel("Training cases", color=theme.ink)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        style_axes(axes, theme)

    return Panel(f"{title} over the training cases", draw)
