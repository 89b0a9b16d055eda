"""How charts look and leave: colours, axes, and the same drawing as a file or as part of a page. Pyplot's global state stays as it was."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure, FigureBase

from densecal.files import write_atomically

__all__ = ["DARK_ON_LIGHT", "IN_PAGE", "Chart", "Panel", "Theme", "inline_svg", "plain_text", "png_bytes", "style_axes", "svg_text"]


@dataclass(frozen=True)
class Theme:
    """Colours of a chart."""

    ink: str = "#1c2733"
    muted: str = "#5d6b7a"
    grid: str = "#dfe4ea"
    bar: str = "#3b7dd8"
    gap: str = "#d9573f"
    series: tuple[str, ...] = ("#3b7dd8", "#d9573f", "#2f9e6e", "#a06cd5", "#c28a1c")

    def line(self, i: int) -> dict[str, Any]:
        """Look of the i-th line: dashes and marker tell lines apart, too, not colour alone."""
        return {
            "color": self.series[i % len(self.series)],
            "linestyle": ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))[i % 4],
            "marker": "os^DvPX"[i % 7],
        }


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


@dataclass(frozen=True)
class Panel:
    """One drawing.

    Args:
        label: What a screen reader says.
        draw: Draws on an empty figure or part of one.
    """

    label: str
    draw: Callable[[FigureBase, Theme], None]


@dataclass(frozen=True)
class Chart:
    """Panels of equal size: side by side in one file, each by itself in a page, where they wrap.

    Args:
        name: Name of the file; ids in a page start with it.
        panels: From left to right.
        width: Of one panel, in inches.
        height: In inches.
    """

    name: str
    panels: tuple[Panel, ...]
    width: float = 4.6
    height: float = 3.4

    def figure(self, *panels: Panel, theme: Theme = DARK_ON_LIGHT) -> Figure:
        """These panels, by default all."""
        panels = panels or self.panels
        figure = Figure(figsize=(self.width * len(panels), self.height), layout="constrained")
        figure.patch.set_alpha(0)
        for panel, part in zip(panels, figure.subfigures(1, len(panels), squeeze=False)[0], strict=True):
            part.patch.set_alpha(0)
            panel.draw(part, theme)
        return figure

    def save(self, folder: Path) -> None:
        """``<name>.png`` and ``<name>.svg``."""
        figure = self.figure()
        write_atomically(folder / f"{self.name}.png", png_bytes(figure))
        figure.set_layout_engine("none")  # everything has its place now; finding it once more would take as long as drawing
        write_atomically(folder / f"{self.name}.svg", svg_text(figure))

    def inline(self) -> list[str]:
        """An ``<svg>`` element per panel."""
        return [
            inline_svg(self.figure(panel, theme=IN_PAGE), label=panel.label, prefix=f"{self.name}-{i}" if i else self.name)
            for i, panel in enumerate(self.panels)
        ]


def style_axes(axes: Axes, theme: Theme) -> None:
    axes.patch.set_alpha(0)
    axes.grid(color=theme.grid, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, labelsize=9, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)


def plain_text(text: str, *, max_length: int = 28) -> str:
    """A name as a label: shortened, and without a meaning to matplotlib, which reads ``$`` as mathematics and hides what starts with ``_``.

    Example:
        >>> print(plain_text("a price of $5, and a very long one", max_length=12))
        a price of …
    """
    text = text if len(text) <= max_length else text[: max_length - 1] + "…"
    text = text.replace("\\", "\N{SET MINUS}").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def png_bytes(figure: Figure, *, dpi: int = 150) -> bytes:
    """The figure on white, as a file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


def svg_text(figure: Figure) -> str:
    """The figure on white, as a standalone SVG file."""
    return _svg(figure, "white")


def inline_svg(figure: Figure, *, label: str, prefix: str) -> str:
    """The figure as an ``<svg>`` element of a page, in the page's colours; draw it with the theme ``IN_PAGE``.

    Args:
        figure: The chart.
        label: What a screen reader says; any text.
        prefix: Put before every id, so that charts of one page do not mix; letters, digits and hyphens.

    Returns:
        The element, without a fixed size.
    """
    text = _svg(figure, "none")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    start = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" class="chart">'
    text = re.sub(r"<svg[^>]*>", lambda _: start, text, count=1)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'xlink:href="#', f'href="#{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-")
    for color, variable in _PLACEHOLDERS.items():
        text = text.replace(color, variable)
    return text


def _svg(figure: Figure, background: str) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "densecal"}):  # the same drawing is the same file
        FigureCanvasSVG(figure).print_figure(buffer, format="svg", facecolor=background, metadata={"Date": None})
    return buffer.getvalue().decode()
