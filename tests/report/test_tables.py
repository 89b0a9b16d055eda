"""Tables in Markdown and LaTeX: the numbers as a reader wants them, names without a meaning of their own."""

import re

import pytest

from densecal.report.tables import Table, latex, markdown, number, text

NASTY = '50% of $x_1$ & #2 {a} \\b ~c^d <e> |f| [g] *h* "i" `j`'


@pytest.mark.parametrize(
    ("value", "interval", "options", "expected"),
    [
        (0.81549, (0.8012, 0.8301), {}, "0.815 (0.80 to 0.83)"),
        (0.0141, (0.0139, 0.0144), {}, "0.0141 (0.0139 to 0.0144)"),
        (0.5, (0.5, 0.5), {}, "0.500 (0.500 to 0.500)"),
        (4.2, (3.1, 17.25), {"digits": 2}, "4.20 (3.10 to 17.25)"),
        (0.5, (float("nan"), 1.0), {}, "0.500"),
        (-0.02, (-0.03, 0.01), {"signed": True}, "−0.020 (−0.03 to +0.01)"),
        (0.02, (0.003, 0.04), {"signed": True}, "+0.020 (+0.003 to +0.040)"),
        (0.02, (0.0, 0.04), {}, "0.020 (0.00 to 0.04)"),
        (0.25, None, {}, "0.250"),
        (1234567, None, {}, "1,234,567"),
        (float("nan"), (0.1, 0.2), {}, "–"),
        (float("inf"), None, {}, "–"),
        (None, None, {}, "–"),
    ],
)
def test_number_shows_what_its_interval_deserves(value, interval, options, expected):
    assert number(value, interval, **options).text == expected


def test_number_undefined_sorts_last():
    assert number(float("nan")).value is None
    assert number(0.5).value == 0.5


def table(name):
    return Table(
        "t",
        name,
        (text("Class"), text("Dice")),
        ((text(name), number(0.5, strong=True)), (text("[1] first"), number(0.25, remark="worse"))),
        note=name,
    )


def test_markdown_keeps_every_row_in_its_columns():
    lines = markdown(table(NASTY + "\nnext")).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    assert "**0.500**" in rows[2]
    assert rows[3].endswith("0.250 (worse) |")
    assert not re.search(r"(?<!\\)[$<`_]", rows[2])


def test_latex_escapes_what_tex_would_read():
    source = latex(table(NASTY))
    body = re.search(r"\\midrule\n(.*)\\bottomrule", source, re.DOTALL)[1]
    first, second = body.strip().splitlines()
    for escaped in (
        r"50\% of \$x\_1\$ \& \#2 \{a\} \textbackslash{}b \textasciitilde{}c\textasciicircum{}d",
        r"\textless{}e\textgreater{} \textbar{}f\textbar{}",
    ):
        assert escaped in first
    assert len(re.findall(r"(?<!\\)&", first)) == 1
    assert r"\textbf{0.500}" in first
    # "\\ [" would be an optional argument of the line break.
    assert second.strip().startswith("{[}1{]}" if "{]}" in second else "{[}1]")
    assert source.count("\\begin{") == source.count("\\end{") == 2
    assert re.sub(r"\\[{}]", "", source).count("{") == re.sub(r"\\[{}]", "", source).count("}")


def test_latex_has_a_column_for_each_cell():
    source = latex(Table("t", "Numbers", tuple(text(str(i)) for i in range(4)), ((text("a"), number(-1.0), number(None), number(2)),)))
    assert r"\begin{tabular}{lrrr}" in source
    assert r"a & $-$1.000 & -- & 2 \\" in source
    assert re.fullmatch(r"[\x00-\x7f]+", source)
