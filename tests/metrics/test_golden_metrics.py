"""Numbers of the authors' published code for calibration metrics; skips where the folder is absent."""

import json
from pathlib import Path

import pytest
import torch
from conftest import shared_folder

from densecal.metrics import expected_calibration_error
from densecal.ops.binning import accumulate_bins

FOLDER = shared_folder("DENSECAL_GOLDEN", "golden")


def cases(*strata):
    if FOLDER is None:
        return []
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    return [pytest.param(case, id=case["id"]) for case in manifest["cases"] if case["stratum"] in strata]


def load(case):
    from safetensors import safe_open

    assert FOLDER is not None
    with safe_open(Path(FOLDER) / case["file"], "pt") as file:
        return {name: file.get_tensor(f"{case['id']}/{name}") for name in case["tensors"]}


def per_image(function, probs, labels, **kwargs):
    return torch.stack([function(p[None], y[None], **kwargs) for p, y in zip(probs, labels, strict=True)]).nanmean().item()


@pytest.mark.parametrize("case", cases("ece_jdt"))
def test_ece_jdt(case):
    tensors, params = load(case), case["params"]
    options = {"num_bins": params["num_bins"], "ignore_index": -100 if params["ignore_index"] is None else params["ignore_index"]}
    probs, labels = tensors["probs"].flatten(2), tensors["labels"].long().flatten(1)
    assert 100 * expected_calibration_error(probs, labels, **options).item() == pytest.approx(case["results"]["ECED"], abs=1e-4)
    assert 100 * per_image(expected_calibration_error, probs, labels, **options) == pytest.approx(case["results"]["ECEI"], abs=1e-4)


@pytest.mark.parametrize("case", cases("sce_jdt_corrected"))
def test_sce_jdt_corrected(case):
    # Pooled over the data set; per image they average over the classes present only, a number of their own.
    tensors, params = load(case), case["params"]
    ignore_index = -100 if params["ignore_index"] is None else params["ignore_index"]
    value = expected_calibration_error(
        tensors["probs"], tensors["labels"].long(), kind="classwise", num_bins=params["num_bins"], ignore_index=ignore_index
    )
    assert 1000 * value.item() == pytest.approx(case["results"]["SCED"], abs=1e-3)


@pytest.mark.parametrize("case", cases("ece_marginloss"))
def test_ece_marginloss(case):
    tensors = load(case)
    probs, labels, num_bins = tensors["logits"].double().softmax(1), tensors["labels"].long(), case["params"]["n_bins"]
    assert expected_calibration_error(probs, labels, num_bins=num_bins).item() == pytest.approx(case["results"]["ece"], abs=1e-6)
    classwise = expected_calibration_error(probs, labels, kind="classwise", num_bins=num_bins).item()
    assert classwise == pytest.approx(case["results"]["cece"], abs=1e-6)


@pytest.mark.parametrize("case", cases("ece_svls", "ece_svls_on_edges"))
def test_ece_svls(case):
    tensors = load(case)
    probs, labels = tensors["probs"], tensors["labels"].long()
    mask = labels > case["params"]["bg_cls"]
    value = expected_calibration_error(probs, labels, num_bins=case["params"]["n_bins"], mask=mask)
    assert value.item() == pytest.approx(case["results"]["ece"], abs=1e-6)


@pytest.mark.parametrize("case", cases("calibration_binning"))
def test_calibration_binning(case):
    tensors, num_bins = load(case), case["params"]["num_bins"]
    probs = tensors["probs"].flatten(2)
    n, c = probs.shape[:2]
    labels = tensors["labels"].long().flatten(1)
    shares = labels.unsqueeze(1) == torch.arange(c).view(1, -1, 1)
    row = torch.arange(n * c).view(n, c, 1)
    bins = accumulate_bins(probs, shares, num_bins=num_bins, row=row, num_rows=n * c).view(n, c, num_bins)
    empty = bins.count == 0
    torch.testing.assert_close(bins.count.masked_fill(empty, -1).double(), tensors["counts"].double().masked_fill(empty, -1))
    for ours, theirs in ((bins.mean_confidence, "mean_p"), (bins.accuracy, "mean_gt")):
        torch.testing.assert_close(ours.masked_fill(empty, -1), tensors[theirs].double(), atol=1e-6, rtol=0)
