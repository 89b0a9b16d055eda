"""One table, three doors: a page, Markdown, LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Cell", "Table", "latex", "markdown", "number", "text"]

UNDEFINED = "–"


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table.

    Args:
        text: As a reader sees it.
        value: What a page sorts by: a number, None for an undefined one (always last), or a text.
        definition: Shown by a page when one points at the text.
        color: A swatch before the text, ``#rrggbb``.
        href: A page links the text to it.
        remark: Small print after the text.
        strong: Stands out, in a page, Markdown and LaTeX alike.
    """

    text: str
    value: float | str | None = None
    definition: str = ""
    color: str = ""
    href: str = ""
    remark: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a header.

    Args:
        name: For references, such as ``"overlap"``.
        caption: What the table shows.
        header: One cell per column; the first heads the names of the rows.
        rows: Cells.
        sorted_by: Column whose values already ascend.
        note: Sentence below.
    """

    name: str
    caption: str
    header: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    sorted_by: int | None = None
    note: str = ""


def text(content: str, **options: Any) -> Cell:
    """A cell of words."""
    return Cell(content, content, **options)


def number(value: Any, interval: Sequence[float] | None = None, *, digits: int = 3, signed: bool = False, **options: Any) -> Cell:
    """A cell with a number as a reader wants it: thousands marked for counts, a dash for undefined, an interval with the decimals that its width deserves.

    Example:
        >>> [cell.text for cell in (number(0.8154, (0.8012, 0.8301)), number(0.0141, (0.0139, 0.0144)), number(12345), number(float("nan")))]
        ['0.815 (0.80 to 0.83)', '0.0141 (0.0139 to 0.0144)', '12,345', '–']
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return Cell(UNDEFINED, None, **options)
    if isinstance(value, int):
        return Cell(f"{value:,}", value, **options)
    if not isinstance(value, float):
        return text(str(value), **options)
    sign = "+" if signed else ""
    if interval is None or not all(math.isfinite(end) for end in interval):
        return Cell(_minus(f"{value:{sign}.{digits}f}"), value, **options)
    low, high = (float(end) for end in interval)
    decimals = min(max(math.ceil(-math.log10(high - low)), min(2, digits)), 4) if high > low else digits
    while decimals < 4 and any(end != 0 and round(end, decimals) == 0 for end in (low, high)):
        decimals += 1  # an end beside 0 must not look like 0
    content = f"{value:{sign}.{max(digits, decimals)}f} ({low:{sign}.{decimals}f} to {high:{sign}.{decimals}f})"
    return Cell(_minus(content), value, **options)


def _minus(content: str) -> str:
    return content.replace("-", "\N{MINUS SIGN}")


def markdown(table: Table) -> str:
    """A pipe table under its caption.

    Example:
        >>> print(markdown(Table("t", "Scores", (text("class"), text("Dice")), ((text("a|b"), number(0.5)),))))
        **Scores**
        <BLANKLINE>
        | class | Dice |
        | :-- | --: |
        | a\\|b | 0.500 |
        <BLANKLINE>
    """

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    lines = [line([_markdown(cell) for cell in row]) for row in (table.header, *table.rows)]
    lines.insert(1, line([":--", *["--:"] * (len(table.header) - 1)]))
    note = [_escape_markdown(table.note), ""] if table.note else []
    return "\n".join([f"**{_escape_markdown(table.caption)}**", "", *lines, "", *note])


def _markdown(cell: Cell) -> str:
    content = _escape_markdown(cell.text)
    content = f"**{content}**" if cell.strong else content
    return f"{content} ({_escape_markdown(cell.remark)})" if cell.remark else content


def _escape_markdown(content: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]$~])", r"\\\1", re.sub(r"\s+", " ", content))


def latex(table: Table) -> str:
    """A ``table`` environment for a paper that loads booktabs.

    Example:
        >>> print(latex(Table("scores", "Scores", (text("class"), text("Dice")), ((text("left_lung"), number(0.5)),))))
        \\begin{table}
          \\centering
          \\caption{Scores}
          \\label{tab:scores}
          \\begin{tabular}{lr}
            \\toprule
            class & Dice \\\\
            \\midrule
            left\\_lung & 0.500 \\\\
            \\bottomrule
          \\end{tabular}
        \\end{table}
        <BLANKLINE>
    """

    def line(row: Sequence[Cell]) -> str:
        return "    " + " & ".join(_latex(cell) for cell in row) + r" \\"

    caption = f"{table.caption}. {table.note}" if table.note else table.caption
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_escape_latex(caption)}}}",
        rf"  \label{{tab:{table.name}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        r"    \toprule",
        line(table.header),
        r"    \midrule",
        *(line(row) for row in table.rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex(cell: Cell) -> str:
    content = _escape_latex(cell.text)
    content = rf"\textbf{{{content}}}" if cell.strong else content
    return f"{content} ({_escape_latex(cell.remark)})" if cell.remark else content


# A bracket or star at the start of a row would be read as an argument of the line break before it.
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "[": "{[}",
    "*": "{*}",
    "–": "--",
    "\N{MINUS SIGN}": "$-$",
    "\N{NO-BREAK SPACE}": "~",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _escape_latex(content: str) -> str:
    return "".join(_LATEX.get(character, character) for character in re.sub(r"[ \t\r\n]+", " ", content))
