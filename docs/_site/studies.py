"""Tables and figures of the studies in README.md and docs/, from the scores kept in docs/studies/STUDY/scores:

    uv run docs/_site/studies.py            # write them anew
    uv run docs/_site/studies.py --check    # say which are out of date

A table stands between two comments, which say what it holds:

    <!-- study: hippocampus_small means methods=ce,svls measures=dice,ece_foreground -->
    <!-- /study -->

``posthoc=temperature`` chooses the methods that were repaired by one, ``posthoc=none`` those that were not. ``means`` has means and standard deviations over runs, ``cases`` differences from ``baseline=`` with intervals over cases, ``runs`` those with intervals over runs.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

from densecal.files import write_atomically
from densecal.report.drawing import svg_text
from densecal.report.study import difference_table, mean_table
from densecal.report.study_figures import front_chart, length_chart, reliability_grid
from densecal.report.study_page import case_difference_table, study_measures
from densecal.report.study_scores import StudyScores, read_scores
from densecal.report.tables import markdown

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "docs" / "studies"
_BLOCK = re.compile(r"(<!-- study: (\S+) (means|cases|runs)((?: \w+=\S+)*) -->\n).*?(<!-- /study -->)", re.S)


def pages() -> list[Path]:
    """The pages that have such tables."""
    return [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if _BLOCK.search(path.read_text(encoding="utf-8"))]


def studies() -> list[str]:
    """The studies whose scores are kept."""
    return sorted(folder.parent.name for folder in STUDIES.glob("*/scores"))


@cache
def methods_of(study: str) -> dict[str, list[StudyScores]]:
    """Name -> runs, in the order of the study's file, those as trained before those that were repaired."""
    from densecal.cli.study import Study

    order = list(Study.load(study).runs)
    found: dict[str, list[StudyScores]] = {}
    for run in sorted(read_scores(STUDIES / study / "scores"), key=lambda run: (bool(run.posthoc), order.index(run.method), run.pair)):
        found.setdefault(run.name, []).append(run)
    return found


def filled(text: str) -> str:
    """A page with its tables made anew."""
    return _BLOCK.sub(lambda block: f"{block[1]}{_table(block[2], block[3], block[4])}{block[5]}", text)


def _table(study: str, kind: str, options: str) -> str:
    given = dict(option.split("=", 1) for option in options.split())
    methods = methods_of(study)
    keys = given["measures"].split(",") if "measures" in given else study_measures([run for runs in methods.values() for run in runs])
    if "posthoc" in given:
        methods = {name: runs for name, runs in methods.items() if (runs[0].posthoc or "none") == given["posthoc"]}
    if "methods" in given:
        wanted = [name.replace("+", " + ") for name in given["methods"].split(",")]
        methods = {name: methods[name] for name in wanted}
    baseline = given.get("baseline", next(iter(methods))).replace("+", " + ")
    if kind == "means":
        table = mean_table(methods, keys, "")
    elif kind == "cases":
        table = case_difference_table(methods, baseline, keys)
    else:
        table = difference_table(methods, baseline, keys, "")
    return "\n".join(line for line in markdown(table).splitlines() if line.startswith("|")) + "\n"


def draw(study: str) -> None:
    """The charts of a study, beside its scores."""
    methods = methods_of(study)
    runs = [run for some in methods.values() for run in some]
    keys = study_measures(runs)
    errors = [key for key in keys if key.startswith("ece")][:1] + [key for key in keys if key.startswith("nll")][:1]
    region = "foreground" if all("foreground" in run.diagrams for run in runs) else "all"
    trained = [name for name, some in methods.items() if not some[0].posthoc]
    shown = [name for name in ("ce", "label_smoothing", "svls", "dml", "svls_dml") if name in trained]
    for chart in (front_chart(methods, keys[0], errors), reliability_grid(methods, region, region), length_chart(methods, shown, [keys[0], *errors])):
        if chart is not None:
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
    for study in studies():
        draw(study)


if __name__ == "__main__":
    main()
