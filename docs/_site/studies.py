"""Tables and figures of the studies in README.md and docs/, from the scores kept in docs/studies/STUDY/scores:

    uv run docs/_site/studies.py            # write them anew
    uv run docs/_site/studies.py --check    # say which are out of date

A table stands between two comments, which say what it holds:

    <!-- study: hippocampus_small means methods=ce,svls measures=dice,ece_foreground -->
    <!-- /study -->

``posthoc=temperature`` chooses the methods that were repaired by one, ``posthoc=none`` those that were not; ``without=`` leaves methods out, repaired or not. ``means`` has means and standard deviations over runs, ``cases`` differences from
``baseline=`` with intervals over cases, ``runs`` those with intervals over runs, ``verdict`` holds ``method=`` against each of ``methods=``, measure by measure. ``STUDY/held_out`` are the cases that were
held out; ``STUDY,STUDY`` are the methods of both. Numbers in a sentence stand between comments, too, with ``METHOD+temperature`` where it was repaired:

    <!-- value: STUDY METHOD MEASURE -->0.123<!-- /value -->                     a mean over runs
    <!-- gap: STUDY METHOD OTHER MEASURE -->+0.01 (-0.02 to +0.04)<!-- /gap -->  METHOD minus OTHER, with an interval over cases
    <!-- front: STUDY MEASURE,MEASURE -->11 of 24<!-- /front -->                how many no other one beats
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

from densecal.files import write_atomically
from densecal.report.drawing import svg_text
from densecal.report.measures import measure
from densecal.report.study import difference_table, mean_table
from densecal.report.study_figures import front, front_chart, length_chart, mean_of, reliability_grid, size_chart
from densecal.report.study_page import case_difference_table, study_measures
from densecal.report.study_scores import StudyScores, paired_intervals, read_scores
from densecal.report.tables import Cell, Table, markdown, number, text

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "docs" / "studies"
Methods = dict[str, list[StudyScores]]
_BLOCK = re.compile(r"(<!-- study: (\S+) (means|cases|runs|verdict)((?: \w+=\S+)*) -->\n).*?(<!-- /study -->)", re.S)
_INLINE = re.compile(r"(<!-- (value|gap|front): (\S+)((?: (?!-->)\S+)*) -->).*?(<!-- /\2 -->)")


def pages() -> list[Path]:
    """The pages that have such tables."""
    return [
        path
        for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
        if _BLOCK.search(page := path.read_text(encoding="utf-8")) or _INLINE.search(page)
    ]


def studies() -> list[str]:
    """The studies whose scores are kept, and those of cases that they held out."""
    return sorted(folder.parent.relative_to(STUDIES).as_posix() for folder in STUDIES.rglob("scores"))


@cache
def methods_of(study: str) -> Methods:
    """Name -> runs, in the order of the study's file, those as trained before those that were repaired; of several studies the first that has a method."""
    from densecal.cli.study import Study

    found: Methods = {}
    for one in study.split(","):
        order = list(Study.load(one.partition("/")[0]).runs)
        methods: Methods = {}
        for run in sorted(read_scores(STUDIES / one / "scores"), key=lambda run: (bool(run.posthoc), order.index(run.method), run.pair)):
            methods.setdefault(run.name, []).append(run)
        found |= {name: runs for name, runs in methods.items() if name not in found}
    return found


def filled(text: str) -> str:
    """A page with its tables and numbers made anew."""
    text = _BLOCK.sub(lambda block: f"{block[1]}{_table(block[2], block[3], block[4])}{block[5]}", text)
    return _INLINE.sub(lambda found: f"{found[1]}{_INLINES[found[2]](methods_of(found[3]), *found[4].split())}{found[5]}", text)


def _value(methods: Methods, method: str, key: str) -> str:
    return f"{mean_of(methods[_name(method)], key):.3f}"


def _gap(methods: Methods, method: str, other: str, key: str) -> str:
    value, *interval = paired_intervals({name: methods[name] for name in map(_name, (other, method))}, _name(other), [key])[_name(method)][key]
    return number(value, interval, signed=True).text


def _front(methods: Methods, keys: str) -> str:
    return f"{len(front(methods, keys.split(',')))} of {len(methods)}"


_INLINES = {"value": _value, "gap": _gap, "front": _front}


def _name(written: str) -> str:
    return written.replace("+", " + ")


def _table(study: str, kind: str, options: str) -> str:
    given = dict(option.split("=", 1) for option in options.split())
    methods = methods_of(study)
    keys = given["measures"].split(",") if "measures" in given else study_measures([run for runs in methods.values() for run in runs])
    if "posthoc" in given:
        methods = {name: runs for name, runs in methods.items() if (runs[0].posthoc or "none") == given["posthoc"]}
    if "without" in given:
        methods = {name: runs for name, runs in methods.items() if runs[0].method not in given["without"].split(",")}
    if "methods" in given:
        wanted = [_name(name) for name in given["methods"].split(",")]
        methods = {name: methods[name] for name in wanted}
    baseline = _name(given.get("baseline", next(iter(methods))))
    if kind == "means":
        table = mean_table(methods, keys, "")
    elif kind == "cases":
        table = case_difference_table(methods, baseline, keys)
    elif kind == "verdict":
        table = verdict({**methods_of(study), **methods}, _name(given["method"]), list(methods), keys)
    else:
        table = difference_table(methods, baseline, keys, "")
    return "\n".join(line for line in markdown(table).splitlines() if line.startswith("|")) + "\n"


def verdict(methods: Methods, mine: str, others: list[str], keys: list[str]) -> Table:
    """A method against each of the others, a row for each measure: the best of these, the difference from it, and how many are worse and better by intervals over cases."""
    shown = {name: methods[name] for name in [mine, *others]}
    gaps = paired_intervals(shown, mine, keys)
    rows = []
    for key in keys:
        sign = 1 if measure(key).better == "higher" else -1
        best = max(gaps, key=lambda name, key=key, sign=sign: sign * mean_of(shown[name], key))  # type: ignore[misc]
        gap, low, high = gaps[best][key]
        worse = sum((high < 0) if sign > 0 else (low > 0) for _, low, high in (gaps[name][key] for name in gaps))
        better = sum((low > 0) if sign > 0 else (high < 0) for _, low, high in (gaps[name][key] for name in gaps))
        means = (f"{mean_of(shown[name], key):.4f}" for name in (mine, best))
        own, theirs = (Cell(said, float(said)) for said in means)
        difference = number(-gap, (-high, -low), digits=4, signed=True)
        rows.append(
            (text(measure(key).short), own, text(best), theirs, difference, text(f"{worse} of {len(gaps)}"), text(f"{better} of {len(gaps)}"))
        )
    header = ("measure", mine, "best of the others", "its value", f"{mine} minus it", "others worse", "others better")
    return Table("verdict", f"{mine} against the others", tuple(map(text, header)), tuple(rows))


def draw(study: str, shown: str) -> None:
    """The charts of a study that ``shown``, the text of all pages, has links to, beside its scores."""
    methods = methods_of(study)
    runs = [run for some in methods.values() for run in some]
    keys = study_measures(runs)
    errors = [key for key in keys if key.startswith("ece")][:1] + [key for key in keys if key.startswith("nll")][:1]
    region = "foreground" if all("foreground" in run.diagrams for run in runs) else "all"
    trained = [name for name, some in methods.items() if not some[0].posthoc]
    lines = [name for name in ("ce", "label_smoothing", "svls", "dml", "recommended") if name in trained]
    charts = [
        front_chart(methods, keys[0], errors),
        reliability_grid(methods, region, region),
        length_chart(methods, lines, [keys[0], *errors]),
        size_chart(methods, [keys[0], *errors]),
    ]
    for chart in charts:
        if chart is not None and f"{study}/{chart.name}.svg)" in shown:
            write_atomically(STUDIES / study / f"{chart.name}.svg", svg_text(chart.figure()))


def main() -> None:
    old = [path for path in pages() if (text := path.read_text(encoding="utf-8")) != filled(text)]
    if "--check" in sys.argv[1:]:
        if old:
            raise SystemExit(f"out of date: {', '.join(str(path.relative_to(ROOT)) for path in old)}. Run docs/_site/studies.py.")
        return
    for path in old:
        write_atomically(path, filled(path.read_text(encoding="utf-8")))
        print(path.relative_to(ROOT))
    shown = "".join(path.read_text(encoding="utf-8") for path in pages())
    for study in studies():
        draw(study, shown)


if __name__ == "__main__":
    main()
