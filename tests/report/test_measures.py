"""Names in words, and tables that show what is there."""

from dataclasses import replace

import pytest
from evaluations import blobs, full_evaluation

from densecal.labels import LabelSchema
from densecal.report.measures import (
    MEASURES,
    case_table,
    class_table,
    fine_grained_table,
    further_table,
    measure,
    overlap_table,
    pooled_table,
    scalar_key,
)
from densecal.report.summary import named_cases
from densecal.report.tables import number

SCHEMA = LabelSchema(("background", "a_D", "b"))


@pytest.fixture(scope="module")
def evaluation():
    return full_evaluation(SCHEMA, *blobs(SCHEMA, (12, 14), 3))


@pytest.mark.parametrize(
    ("key", "name", "better"),
    [
        ("dice", "Dice", "higher"),
        ("hd95/left lung", "Hausdorff distance, 95 % of left lung", "lower"),
        ("ece", "ECE", "lower"),
        ("smooth_ece_boundary", "Smooth ECE along boundaries", "lower"),
        ("signed_ce_foreground", "Mean confidence minus accuracy near the structure", ""),
        ("case_nll_foreground", "Negative log-likelihood near the structure per case", "lower"),
        ("iou_dataset", "mIoU, whole data set (D)", "higher"),
        ("iou_dataset/car", "IoU, whole data set (D) of car", "higher"),
        ("dice_image_worst", "mDice, worst 10 % of images", "higher"),
        ("something_new", "something new", ""),
    ],
)
def test_measure_has_a_name_in_words(key, name, better):
    assert (measure(key).name, measure(key).better) == (name, better)


def test_scalar_key_is_that_of_scalars(evaluation):
    numbers = evaluation.scalars()
    for region, values in evaluation.pooled.items():
        for key, value in values.items():
            if key != "num_voxels":
                assert numbers[scalar_key(key, region)] == value


def rows(table):
    return {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}


def test_pooled_tables_show_every_measure_once(evaluation):
    usual, further = rows(pooled_table(evaluation, element="pixels")), rows(further_table(evaluation))
    assert [cell.text for cell in pooled_table(evaluation).header[1:]] == ["Everywhere", "In and near the structure", "Along boundaries"]
    assert not set(usual) & set(further)
    assert {MEASURES[key].name for key in evaluation.pooled["all"] if key != "num_voxels"} <= set(usual) | set(further)
    assert usual["Negative log-likelihood"][2] == number(evaluation.pooled["boundary"]["nll"], evaluation.intervals["nll_boundary"]).text
    assert usual["Number of pixels"][0] == f"{evaluation.pooled['all']['num_voxels']:,}"


def test_pooled_tables_show_measures_without_a_name_here(evaluation):
    pooled = {region: values | {"brand_new": 0.25} for region, values in evaluation.pooled.items()}
    assert rows(further_table(replace(evaluation, pooled=pooled, intervals={})))["brand new"] == ["0.250"] * 3


def test_fine_grained_table(evaluation):
    table = fine_grained_table(evaluation)
    assert [cell.text for cell in table.header[1:4]] == ["Whole data set (D)", "Per image (I)", "Worst 10 % of images"]
    shown = rows(table)
    assert list(shown) == ["Dice", "IoU", "Accuracy"]
    assert shown["IoU"][:2] == [number(evaluation.fine_grained[key], evaluation.intervals[key]).text for key in ("iou_dataset", "iou_image")]
    assert shown["IoU"][2] == f"{evaluation.fine_grained['iou_image_worst']:.3f}"
    assert fine_grained_table(replace(evaluation, fine_grained={})).rows == ()


def test_overlap_table_has_range_and_number_of_cases(evaluation):
    shown = rows(overlap_table(evaluation))
    values = [row["dice"] for row in evaluation.cases]
    assert shown["Dice"][1:] == [f"{min(values):.3f}", f"{max(values):.3f}", "3"]
    distances = [row["hd95"] for row in evaluation.cases]
    assert shown["Hausdorff distance, 95 %"][1:] == [f"{min(distances):.2f}", f"{max(distances):.2f}", "3"]
    assert "IoU, whole data set" not in shown


def test_class_table_marks_what_no_mean_counts(evaluation):
    table = class_table(evaluation, SCHEMA)
    assert [(row[0].text, row[0].remark) for row in table.rows] == [("background", "not in means"), ("a_D", ""), ("b", "")]
    assert [[cell.text for cell in row[1:3]] for row in table.rows][2] == ["–", "–"]  # never there
    correct, predicted, reference = (sum(row[f"voxels_{kind}/a_D"] for row in evaluation.cases) for kind in ("correct", "predicted", "reference"))
    assert table.rows[1][1].text == f"{correct / (predicted + reference - correct):.3f}"
    assert len({len(row) for row in (table.header, *table.rows)}) == 1


def test_case_table_has_the_columns_that_cases_have(evaluation):
    table = case_table(evaluation, named_cases(evaluation, None))
    names = [cell.text for cell in table.header]
    assert names[:4] == ["Case", "Dice", "Dice a_D", "Dice b"]
    assert {"HD95", "NSD", "AURC", "ECE near the structure"} <= set(names)
    few = case_table(evaluation, [{"case_id": "x", "dice": None}])
    assert [cell.text for cell in few.header] == ["Case", "Dice"]
    assert few.rows[0][1].text == "–"
