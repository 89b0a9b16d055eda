"""Numbers of training cases: a row for each, the cases at both ends, how they are spread."""

import csv
import io

import pytest
import torch
from cases import make_case
from matplotlib.figure import Figure

from densecal.labels import LabelSchema
from densecal.metrics import SegmentationEvaluation
from densecal.report import write_report
from densecal.report.drawing import Chart, Theme
from densecal.report.training_cases import levels_chart, levels_rows, levels_table

LEVELS = {"perturbation": {f"case {n}": n / 100 for n in range(12)}}


def test_table_shows_the_ends_highest_first():
    table = levels_table(LEVELS)
    assert [row[0].text for row in table.rows] == [f"case {n}" for n in (11, 10, 9, 8, 7, 4, 3, 2, 1, 0)]
    assert [cell.text for cell in table.rows[0]] == ["case 11", "Level of label perturbation", "0.1100"]
    assert "training_cases.csv has all of them" in table.note
    few = levels_table({"perturbation": {"a": 0.0, "b": 0.2}, "own": {"a": 1.0}})
    assert [[cell.text for cell in row] for row in few.rows] == [
        ["b", "Level of label perturbation", "0.2000"],
        ["a", "Level of label perturbation", "0.0000"],
        ["a", "own", "1.0000"],
    ]
    assert few.note == ""
    assert levels_table({}).rows == ()


def test_a_case_has_one_row():
    assert levels_rows({"perturbation": {"a": 0.0, "b": 0.2}, "own": {"b": 1.0}}) == [
        {"case_id": "a", "perturbation": 0.0},
        {"case_id": "b", "perturbation": 0.2, "own": 1.0},
    ]


@pytest.mark.parametrize("levels", [LEVELS, {"perturbation": {"a": 0.0, "b": 0.0}}], ids=["spread", "all-zero"])
def test_chart_counts_every_case(levels):
    (panel,) = levels_chart(levels).panels
    figure = Figure()
    panel.draw(figure, Theme())
    (axes,) = figure.axes
    assert sum(bar.get_height() for bar in axes.patches) == len(levels["perturbation"])


def test_a_report_without_them_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Chart, "save", lambda self, folder: None)
    monkeypatch.setattr(Chart, "inline", lambda self: [])
    case, schema = make_case((6, 7)), LabelSchema(("background", "anterior", "posterior"))
    evaluation = SegmentationEvaluation(schema)
    evaluation.update(case.logits.softmax(1), case.label_map, torch.arange(2))
    result = evaluation.compute()
    assert "Training cases" not in write_report(tmp_path / "without", result, schema, {}).read_text()
    assert not (tmp_path / "without" / "training_cases.csv").exists()
    write_report(tmp_path / "with", result, schema, {}, case_levels=LEVELS)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "with" / "training_cases.csv").read_text())))
    assert {row["case_id"]: float(row["perturbation"]) for row in rows} == LEVELS["perturbation"]
