"""Figures that are made and printed blank, for tests that look at other things: printing is most of what a report costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def print_blank(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """From here on Matplotlib writes files of the right size and kind, with nothing in them.

    Args:
        replace: Puts the function in its place, ``monkeypatch.setattr`` for the time of one test.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    original = FigureCanvasBase.print_figure

    def print_figure(canvas: FigureCanvasBase, *args: Any, **options: Any) -> Any:
        canvas.figure.set_visible(False)
        try:
            return original(canvas, *args, **options)
        finally:
            canvas.figure.set_visible(True)

    replace(FigureCanvasBase, "print_figure", print_figure)
