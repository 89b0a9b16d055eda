"""Several models side by side."""

import csv
import json
import re
from dataclasses import replace

import pytest
from evaluations import blobs, full_evaluation

from densecal.labels import LabelSchema
from densecal.metrics import paired_differences
from densecal.report import write_comparison
from densecal.report.drawing import Chart

SCHEMA = LabelSchema(("background", "a<b>", "b"))
NAMES = ("baseline", "svls & co", "50%_off")


@pytest.fixture(scope="module")
def evaluations():
    return {
        name: full_evaluation(SCHEMA, *blobs(SCHEMA, (12, 14), 3, sharpness=s, noise=n))
        for name, s, n in zip(NAMES, (3, 1, 1), (1, 1, 2), strict=True)
    }


DIFFERENCES = {
    NAMES[1]: {"dice": (0.02, -0.01, 0.05), "ece": (-0.03, -0.04, -0.02), "signed_ce": (0.2, 0.1, 0.3)},
    NAMES[2]: {"dice": (-0.03, -0.05, -0.01), "ece": (0.03, 0.02, 0.04)},
}


@pytest.fixture(scope="module")
def written(evaluations, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    page = write_comparison(
        folder, evaluations, SCHEMA, {"title": "All <three>", "seed": 1}, differences=DIFFERENCES, notes=["Careful."], case_ids=list("xyz")
    )
    assert page == folder / "report.html"
    return folder


def test_write_comparison_leaves_every_file(written):
    names = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    assert names == ["comparison.json", "figures/comparison.png", "figures/comparison.svg", "report.html", "table.csv", "table.md", "table.tex"]


def test_write_comparison_links_to_each_model(written):
    html = (written / "report.html").read_text()
    links = re.findall(r'<a href="([^"]+)">([^<]+)</a>', html)
    assert links == [("baseline/report.html", "baseline"), ("svls%20%26%20co/report.html", "svls &amp; co"), ("50%25_off/report.html", "50%_off")]
    assert "All &lt;three&gt;" in html
    assert "a<b>" not in html
    assert "Careful." in html


def test_write_comparison_says_differences_in_words(written):
    html = (written / "report.html").read_text()
    found = re.findall(r"<b>(.+?) compared with baseline, case by case\.</b> (.+?)</li>", html)
    assert found == [
        ("svls &amp; co", "Better: ECE. Differs: Mean confidence minus accuracy. No clear difference: Dice."),
        ("50%_off", "Worse: Dice; ECE."),
    ]
    table = (written / "table.md").read_text()
    assert "| svls & co | +0.020 (−0.01 to +0.05) | −0.030 (−0.04 to −0.02) (better) | +0.200 (+0.1 to +0.3) (differs) |" in table.replace(
        "+0.10 to +0.30", "+0.1 to +0.3"
    )
    assert "| 50%\\_off | −0.030 (−0.05 to −0.01) (worse) |" in table


def test_write_comparison_marks_the_best_of_each_column(written, evaluations):
    header, _, *rows = [line.strip("| ").split(" | ") for line in (written / "table.md").read_text().splitlines() if line.startswith("|")][:5]
    for name, best, values in (
        ("Dice", max, [e.mean["dice"] for e in evaluations.values()]),
        ("ECE", min, [e.pooled["all"]["ece_top_label"] for e in evaluations.values()]),
    ):
        column = [row[header.index(name)] for row in rows]
        assert [cell.startswith("**") for cell in column] == [value == best(values) for value in values]


def test_write_comparison_json_and_csv_have_all_numbers(written, evaluations):
    content = json.loads((written / "comparison.json").read_text())
    assert list(content["models"]) == list(NAMES)
    assert content["compared_with"] == "baseline"
    assert content["differences"][NAMES[2]]["ece"] == {"difference": 0.03, "low": 0.02, "high": 0.04}
    assert content["models"]["baseline"]["pooled"]["all"]["nll"] == evaluations["baseline"].pooled["all"]["nll"]
    with open(written / "table.csv", newline="") as file:
        rows = {(row["model"], row["measure"]): row for row in csv.DictReader(file)}
    row = rows[NAMES[1], "ece"]
    assert float(row["value"]) == evaluations[NAMES[1]].scalars()["ece"]
    assert (float(row["low"]), float(row["high"])) == evaluations[NAMES[1]].intervals["ece"]
    assert float(row["difference_high"]) == -0.02
    assert rows["baseline", "dice"]["difference"] == ""


@pytest.fixture
def no_charts(monkeypatch):
    monkeypatch.setattr(Chart, "save", lambda self, folder: None)
    monkeypatch.setattr(Chart, "inline", lambda self: [])


def test_write_comparison_of_scenes_leads_with_mean_iou(tmp_path, no_charts):
    schema = LabelSchema(("sky", "road", "car"), background=None)
    probs, label = blobs(schema, (12, 14), 3)
    models = {name: full_evaluation(schema, p, label, unit="voxels") for name, p in (("good", probs), ("bad", probs.roll(2, dims=-1)))}
    differences = {"bad": paired_differences(models["bad"], models["good"], replicates=20)}
    html = write_comparison(tmp_path, models, schema, {}, differences=differences).read_text()
    iou = [models[name].fine_grained["iou_dataset"] for name in ("good", "bad")]
    assert iou[0] > iou[1]
    assert "mIoU, whole data set (D): good is highest" in html
    assert re.findall(r"<h2>(\w+ per [\w, ]+)</h2>", html) == ["IoU per class, whole data set", "IoU per case"]
    header = (tmp_path / "table.md").read_text().splitlines()[2]
    assert header.startswith("| Model | mIoU D | mIoU I | mIoU C | Accuracy | ECE | ECE along boundaries | NLL | Brier | AURC |")
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["differences"]["bad"]["iou_dataset"]["difference"] == pytest.approx(iou[1] - iou[0])


def test_write_comparison_of_plain_evaluations(evaluations, tmp_path):
    plain = {name: replace(e, intervals={}, case_sums={}, curves={}) for name, e in list(evaluations.items())[:1]}
    html = write_comparison(tmp_path, plain, SCHEMA, {}).read_text()
    assert "1 model on 3 cases" in html
    assert "Difference from" not in html
    assert "bootstrap" not in html


def test_write_comparison_says_when_cases_differ(evaluations, tmp_path, no_charts):
    first, second = list(evaluations.items())[:2]
    other = {first[0]: first[1], second[0]: replace(second[1], cases=second[1].cases[1:])}
    assert "not tested on the same cases" in write_comparison(tmp_path, other, SCHEMA, {}).read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: ({}, {}), "at least one evaluation"),
        (lambda e: ({"a/b": e["baseline"]}, {}), "names that can be folders"),
        (lambda e: ({"..": e["baseline"]}, {}), "names that can be folders"),
        (lambda e: ({"a": replace(e["baseline"], class_names=("x", "y"))}, {}), "with the classes of the schema"),
        (lambda e: (e, {"baseline": {}}), "the first model"),
        (lambda e: (e, {"nobody": {}}), "nobody"),
    ],
    ids=["none", "slash", "dots", "classes", "first", "unknown"],
)
def test_write_comparison_errors(evaluations, tmp_path, change, message):
    given, differences = change(evaluations)
    with pytest.raises(ValueError, match=message):
        write_comparison(tmp_path, given, SCHEMA, {}, differences=differences)
