"""A study from the scores of its runs: figures of resamples against evaluations of the resampled cases, the files, the page."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from evaluations import blobs, full_evaluation
from matplotlib.figure import Figure

from densecal.labels import LabelSchema
from densecal.metrics import CaseBootstrap
from densecal.report import study_figures
from densecal.report.drawing import DARK_ON_LIGHT
from densecal.report.study_page import study_measures, study_tables, write_study
from densecal.report.study_scores import StudyScores, paired_intervals, read_scores

SCHEMA = LabelSchema(("background", "a<b>", "b"))
STREET = LabelSchema(("road", "car", "sky"), background=None)
SUBJECTS = ("p", "p", "q", "r", "r")
IDS = tuple("abcde")


def case_set(seed: int, schema: LabelSchema, **options):
    return blobs(schema, (12, 14), 5, seed=seed, **options)


def scored(method: str, probs, label, *, seed: int = 0, ids=IDS, schema: LabelSchema = SCHEMA, posthoc: str = "", history=()) -> StudyScores:
    return StudyScores.of(
        full_evaluation(schema, probs, label),
        method,
        posthoc=posthoc,
        replicate={"seed": seed, "data.fold": seed},
        data="blobs (background, a<b>, b)",
        case_ids=ids,
        subjects=SUBJECTS,
        background=schema.background is not None,
        facts={"settings": [f"loss={method}"]},
        history=history,
    )


@pytest.fixture(scope="module")
def runs() -> list[StudyScores]:
    """Two methods, one over-confident and repaired, two seeds each on cases of their own."""
    found = []
    for seed in (0, 1):
        ids = tuple(f"{letter}{seed}" for letter in IDS)
        history = [{"epoch": e, "val/dice": 0.1 * e, "val/ece_foreground": 0.5 / e} for e in (1, 2, 3)]
        found.append(scored("ce", *case_set(seed, SCHEMA, sharpness=3), seed=seed, ids=ids, history=history))
        found.append(scored("ce", *case_set(seed, SCHEMA, sharpness=1.2), seed=seed, ids=ids, posthoc="temperature"))
        found.append(scored("svls & co", *case_set(seed, SCHEMA, noise=1.5), seed=seed, ids=ids, history=history))
    return found


@pytest.mark.parametrize("schema", [SCHEMA, STREET], ids=["structure", "street"])
def test_figures_of_all_cases_are_those_of_the_evaluation(schema):
    run = scored("ce", *case_set(0, schema), schema=schema)
    figures = run.cases.figures(torch.ones(1, 5, dtype=torch.float64))
    assert {"dice", "iou_dataset", "dice_dataset", "ece", "ece_classwise", "nll", "brier", "accuracy", "ece_boundary"} <= figures.keys()
    assert ("ece_foreground" in figures) == (schema is SCHEMA)
    for key, value in figures.items():
        assert value.item() == pytest.approx(run.scores[key], rel=1e-5, nan_ok=True), key


def test_figures_of_a_resample_are_those_of_an_evaluation_of_its_cases():
    probs, label = case_set(0, SCHEMA)
    weights = torch.tensor([[2, 0, 1, 0, 2]], dtype=torch.float64)
    drawn = torch.tensor([0, 0, 2, 4, 4])
    expected = full_evaluation(SCHEMA, probs[drawn], label[drawn]).scalars()
    for key, value in scored("ce", probs, label).cases.figures(weights).items():
        assert value.item() == pytest.approx(expected[key], rel=1e-5, nan_ok=True), key


def test_paired_intervals_are_those_of_evaluations_of_resampled_persons(runs):
    """Slowly: for each resample, every run is evaluated anew on the cases drawn, as often as they were drawn."""
    keys, count = ["dice", "ece_foreground", "nll"], 12
    methods = {"ce": [runs[0], runs[3]], "svls": [runs[2], runs[5]]}
    data = {
        "ce": [case_set(seed, SCHEMA, sharpness=3) for seed in (0, 1)],
        "svls": [case_set(seed, SCHEMA, noise=1.5) for seed in (0, 1)],
    }
    bootstrap = CaseBootstrap(10, replicates=count, groups=[0, 0, 1, 2, 2] * 2)
    expected = {key: [] for key in keys}
    for row in bootstrap.weights.tolist():
        means = {name: dict.fromkeys(keys, 0.0) for name in data}
        for name, sets in data.items():
            for seed, (probs, label) in enumerate(sets):
                drawn = torch.tensor([i for i in range(5) for _ in range(row[5 * seed + i])], dtype=torch.long)
                scores = full_evaluation(SCHEMA, probs[drawn], label[drawn]).scalars()
                for key in keys:
                    means[name][key] += scores[key] / 2
        for key in keys:
            expected[key].append(means["svls"][key] - means["ce"][key])
    found = paired_intervals(methods, "ce", keys, replicates=count)
    assert found.keys() == {"svls"}
    for key in keys:
        ordered = torch.tensor(expected[key], dtype=torch.float64)
        ends = ordered.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        gap = sum(runs[i].scores[key] / 2 * sign for i, sign in ((2, 1), (5, 1), (0, -1), (3, -1)))
        assert found["svls"][key] == pytest.approx((gap, *ends), rel=1e-4, abs=1e-9), key


def test_pairs_are_of_one_seed_on_the_same_cases(runs):
    elsewhere = replace(runs[5], replicate={"seed": 0, "data.fold": 0})  # the cases of the other seed
    found = paired_intervals({"ce": runs[:1], "a": [elsewhere], "b": [runs[5]]}, "ce", ["dice"], replicates=4)
    assert found == {}


def test_scores_come_back_from_their_files(runs, tmp_path):
    for run in runs:
        run.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir())[:2] == ["ce_seed0_fold0.json", "ce_seed0_fold0_temperature.json"]
    back = {(run.name, run.pair): run for run in read_scores(tmp_path)}
    assert len(back) == 6
    ones = torch.ones(1, 5, dtype=torch.float64)
    for run in runs:
        other = back[run.name, run.pair]
        assert (other.data, other.posthoc, dict(other.replicate), dict(other.facts)) == (run.data, run.posthoc, run.replicate, dict(run.facts))
        assert (other.cases.case_ids, other.cases.subjects) == (run.cases.case_ids, run.cases.subjects)
        for key, value in run.cases.figures(ones).items():
            assert other.cases.figures(ones)[key].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-6, nan_ok=True), key
            assert other.scores[key] == pytest.approx(run.scores[key], rel=1e-4, nan_ok=True)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema_version": 99}', '{"schema_version": 1, "cases": {}}'], ids=["cut", "list", "version", "empty"]
)
def test_a_damaged_file_is_named(content, tmp_path):
    (tmp_path / "ce.json").write_text(content)
    with pytest.raises(ValueError, match=r"ce\.json: cannot be read as the scores of a study") as error:
        read_scores(tmp_path)
    assert "\n" not in str(error.value)


def test_no_scores_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No scores in .*leaves those of its runs in scores/"):
        read_scores(tmp_path)


def test_front_holds_who_no_other_beats(runs):
    def made(**scores):
        return [replace(runs[0], scores=scores)]

    methods = {
        "sharp": made(dice=0.9, ece=0.3, nll=2.0),
        "calm": made(dice=0.8, ece=0.1, nll=2.0),
        "beaten": made(dice=0.8, ece=0.2, nll=2.0),
        "likely": made(dice=0.7, ece=0.2, nll=1.0),
        "undefined": made(dice=math.nan, ece=0.0, nll=0.0),
    }
    assert study_figures.front(methods, ("dice", "ece")) == ["sharp", "calm"]
    assert study_figures.front(methods, ("dice", "ece", "nll")) == ["sharp", "calm", "likely"]


def test_page_and_tables(runs, tmp_path):
    page, printed = write_study(tmp_path, "A <study>", runs, notes=["Careful."])
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.suffix != ".svg")
    assert names == [
        *[
            "comparison.json",
            "comparison.md",
            "figures",
            *(f"figures/{one}.png" for one in ("boundary_distance", "classes", "front", "length", "reliability")),
        ],
        *["report.html", "table.csv", "table.tex"],
    ]
    assert printed == (tmp_path / "comparison.md").read_text() == study_tables(runs)
    html = page.read_text()
    assert "A &lt;study&gt;" in html
    assert "a<b>" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.S)
    assert "10 test cases of 3 persons or scenes" in html
    assert html.count("<svg") == 2 + 1 + 1 + 2 + 2
    for caption in ("Mean and standard deviation over runs", "paired over cases", "paired by seed and fold"):
        assert caption in printed
    header = next(line for line in printed.splitlines() if line.startswith("| method"))
    assert [cell.strip() for cell in header.split("|")[3:6]] == ["Dice ↑", "ECE near the structure ↓", "ECE, classwise near the structure ↓"]
    mean = (runs[0].scores["ece_foreground"] + runs[3].scores["ece_foreground"]) / 2
    assert re.search(rf"\| ce \| 2 \|[^|]+\| {mean:.4f} ± ", printed)
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert {(row["method"], row["posthoc"], row["seed"], row["fold"]) for row in rows} == {
        ("ce", "", "0", "0"), ("ce", "", "1", "1"), ("ce", "temperature", "0", "0"), ("ce", "temperature", "1", "1"), ("svls & co", "", "0", "0"), ("svls & co", "", "1", "1")
    }  # fmt: skip
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content[1]["posthoc"] == "temperature"
    assert content[1]["scores"]["dice"] == runs[1].scores["dice"]


def test_data_sets_have_sections_of_their_own(runs, tmp_path):
    other = [replace(run, data="others (background, a<b>, b)") for run in runs[:3]]
    page, printed = write_study(tmp_path, "Two", [*runs, *other])
    assert printed.count("Mean and standard deviation over runs") == 2
    assert (tmp_path / "figures" / "set2" / "front.png").is_file()
    assert page.read_text().count("Can the confidence be believed?") == 2


def test_methods_that_differ_in_data_and_trainer_alone_are_a_line_by_size(runs, tmp_path):
    def sized(method, count, *settings):
        return replace(runs[0], method=method, facts={**runs[0].facts, "settings": ["loss=ce", *settings], "training_cases": count})

    methods = {
        run.method: [run]
        for run in (
            sized("half", 20, "data.train_fraction=0.5"),
            sized("all", 40),
            sized("tenth", 4, "data.train_fraction=0.1", "trainer.check_val_every_n_epoch=10"),
        )
    }
    (panel,) = study_figures.size_chart(methods, ["dice"]).panels
    figure = Figure()
    panel.draw(figure, DARK_ON_LIGHT)
    (axes,) = figure.axes
    assert axes.lines[0].get_xdata().tolist() == [4, 20, 40]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "20", "40"]
    assert axes.get_legend_handles_labels()[1] == ["all"]
    assert study_figures.size_chart({"ce": [runs[0]], "svls": [runs[2]]}, ["dice"]) is None


def test_one_method_has_no_differences(runs, tmp_path):
    _, printed = write_study(tmp_path, "One", [runs[0]])
    assert "minus" not in printed


def test_measures_are_those_of_the_data(runs):
    assert study_measures(runs)[:2] == ["dice", "ece_foreground"]
    assert study_measures([scored("ce", *case_set(0, STREET), schema=STREET)])[:2] == ["iou_dataset", "accuracy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"baseline": "cee"}, "baseline: no method 'cee'. Did you mean 'ce'"), ({"measures": ["ecee"]}, "measures: .* has no 'ecee'")],
)
def test_what_is_not_there_is_said_and_nothing_written(options, message, runs, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_study(tmp_path, "x", runs, **options)
    assert list(tmp_path.iterdir()) == []
