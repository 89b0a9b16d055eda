"""What a terminal and a report show of an evaluation."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from evaluations import blobs, full_evaluation

from densecal.cli.evaluation import print_scores, telling_examples
from densecal.labels import LabelSchema
from densecal.metrics import class_prior_baseline

SHARES = [0.5, 0.25, 0.25]


@pytest.fixture(scope="module", params=[0, None], ids=["structure", "scene"])
def schema(request):
    return LabelSchema(("road", "car", "tram"), background=request.param)


@pytest.mark.parametrize(("shape", "element"), [((20, 24), "pixel"), ((10, 12, 8), "voxel")], ids=["2d", "3d"])
def test_print_scores_leads_with_what_its_field_reads(schema, shape, element, capsys):
    result = full_evaluation(schema, *blobs(schema, shape, 3), unit="voxels")
    print_scores(result, "test", class_prior_baseline(result, SHARES))
    first, second = capsys.readouterr().out.splitlines()
    words = ["Dice", "ECE", "near the structure", "along boundaries", "NLL"]
    if schema.background is None:
        words = ["mIoU D", "I", "C", f"{element} accuracy", "ECE", "along boundaries", "NLL"]
    number = r"(\d\.\d{4})"
    line = re.fullmatch("test    3 cases: " + ", ".join(rf"{word} {number} \({number} to {number}\)" for word in words), first)
    assert line, first
    lead, low, high = (float(value) for value in line.groups()[:3])
    assert lead == pytest.approx(result.scalars()["dice" if schema.background == 0 else "iou_dataset"], abs=1e-4)
    assert low <= lead <= high
    assert re.fullmatch(" {8}class shares alone: " + ", ".join(rf"{word} {number}" for word in words if word != "along boundaries"), second), second
    print_scores(result, "")
    assert capsys.readouterr().out.startswith("3 cases: ")


def test_telling_examples_are_worst_median_and_best_by_overlap(schema):
    probs, label = blobs(schema, (20, 24), 5)
    result = full_evaluation(schema, probs, label, unit="voxels")

    class Cases:
        case_ids = tuple("abcde")

        def __getitem__(self, name):
            i = self.case_ids.index(name)
            return SimpleNamespace(case_id=name, label=label[i], probs=probs[i], spacing=None, axis_names=())

        def image(self, name):
            if name == "a":
                raise ValueError("a.png cannot be read.")
            return np.zeros((20, 24, 3), np.uint8)

    notes = []
    shown = [example.case_id for example in telling_examples(result, Cases(), notes)]
    key = "dice" if schema.background == 0 else "iou"
    order = ["abcde"[i] for i in np.argsort([row[key] for row in result.cases])]
    assert shown == [order[0], order[2], order[4]]
    assert notes == (["Shown without its image: a.png cannot be read."] if "a" in shown else [])
