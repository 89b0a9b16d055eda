"""Calibration errors and their bins against the authors' numbers."""

from __future__ import annotations

import pytest
import torch
from golden import handles, ignore

from densecal.metrics import (
    CalibrationError,
    calibration_error,
    classwise_calibration_error,
    expected_calibration_error,
    negative_log_likelihood,
)
from densecal.ops.binning import Bins, accumulate_bins


@handles("ece_jdt")
def ece_jdt(case, tensors):
    options = {"num_bins": case["params"]["num_bins"], "ignore_index": ignore(case)}
    probs, labels = tensors["probs"], tensors["labels"].long()
    for key, pooling in (("ECED", "dataset"), ("ECEI", "image")):
        value = expected_calibration_error(probs, labels, pooling=pooling, **options)
        assert 100 * value.item() == pytest.approx(case["results"][key], abs=1e-4)


@handles("sce_jdt_corrected")
def sce_jdt(case, tensors):
    """Per image they average over the classes that are there, with the last one wherever a pixel is ignored."""
    options = {"num_bins": case["params"]["num_bins"], "ignore_index": ignore(case), "average": "none"}
    probs, labels = tensors["probs"], tensors["labels"].long()
    pooled = classwise_calibration_error(probs, labels, **options)
    assert 1000 * pooled.mean().item() == pytest.approx(case["results"]["SCED"], abs=1e-3)
    present = [labels[i].clamp(max=probs.shape[1] - 1).unique() for i in range(len(labels))]
    images = [classwise_calibration_error(probs[i : i + 1], labels[i : i + 1], **options)[there].mean() for i, there in enumerate(present)]
    assert 1000 * torch.stack(images).mean().item() == pytest.approx(case["results"]["SCEI"], abs=1e-3)


@handles("ece_marginloss", "cece_missing_top_class")
def ece_marginloss(case, tensors):
    """Their classwise error is the mean over the classes up to the largest label."""
    probs, labels = tensors["logits"].double().softmax(1), tensors["labels"].long()
    num_bins, results = case["params"]["n_bins"], case["results"]
    for key, measure in (
        ("ece", "expected"),
        ("ece_binned", "expected"),
        ("mce", "maximum"),
        ("average_calibration_error", "average"),
        ("l2_error", "root_mean_square"),
    ):
        assert calibration_error(probs, labels, measure=measure, num_bins=num_bins).item() == pytest.approx(results[key], abs=1e-6), key
    per_class = classwise_calibration_error(probs, labels, num_bins=num_bins, average="none")
    assert per_class[: labels.max() + 1].mean().item() == pytest.approx(results["cece"], abs=1e-6)


@handles("evaluator_foreground")
def evaluator_foreground(case, tensors):
    """The mean over batches, weighted by their foreground pixels, of what the batches give on those."""
    num_bins = case["params"]["n_bins"]
    values, weights = [], []
    for logits, labels in zip(tensors["logits"].double(), tensors["labels"].long(), strict=True):
        foreground = (labels != 0) & (labels != 255)
        options = {"mask": foreground, "ignore_index": 255}
        nll = negative_log_likelihood(logits.softmax(1), labels, **options)
        ece = expected_calibration_error(logits.softmax(1), labels, num_bins=num_bins, **options)
        per_class = classwise_calibration_error(logits.softmax(1), labels, num_bins=num_bins, average="none", **options)
        values.append(torch.stack([nll, ece, per_class[: labels[foreground].max() + 1].mean()]))
        weights.append(foreground.sum())
    weight = torch.stack(weights).double()
    found = (torch.stack(values) * weight[:, None]).sum(0) / weight.sum()
    assert found.tolist() == pytest.approx([case["results"][key] for key in ("nll", "ece", "cece")], abs=1e-6)


@handles("ece_svls", "ece_svls_on_edges")
def ece_svls(case, tensors):
    probs, labels = tensors["probs"], tensors["labels"].long()
    metric = CalibrationError(num_bins=case["params"]["n_bins"])
    metric.update(probs, labels, labels > case["params"]["bg_cls"])
    assert metric.compute().item() == pytest.approx(case["results"]["ece"], abs=1e-6)
    bins = metric.bins[0]
    assert torch.equal(bins.count.float(), tensors["bin_count"])
    for ours, theirs in ((bins.accuracy, "bin_acc"), (bins.mean_confidence, "bin_conf")):
        torch.testing.assert_close(ours.nan_to_num(), tensors[theirs].double(), atol=1e-6, rtol=0)


@handles("calibration_error_metric_ace", "calibration_error_metric_monai")
def calibration_error_metric(case, tensors):
    params = case["params"]
    options = {"measure": params["calibration_reduction"], "num_bins": params["num_bins"], "pooling": "image"}
    probs, labels = tensors["probs"], tensors["labels"].long()
    if params["metric_reduction"] == "mean_batch":
        value = classwise_calibration_error(probs, labels, average="none", **options)
        torch.testing.assert_close(value, tensors["value"].double(), atol=1e-6, rtol=0)
    else:
        background = None if params["include_background"] else 0
        value = classwise_calibration_error(probs, labels, background=background, **options)
        assert value.item() == pytest.approx(case["results"]["value"], abs=1e-6)


@handles("calibration_binning")
def calibration_binning(case, tensors):
    num_bins, probs = case["params"]["num_bins"], tensors["probs"].flatten(2)
    n, c = probs.shape[:2]
    shares = tensors["labels"].long().flatten(1).unsqueeze(1) == torch.arange(c).view(1, -1, 1)
    row = torch.arange(n * c).view(n, c, 1)
    bins = accumulate_bins(probs, shares, num_bins=num_bins, row=row, num_rows=n * c).view(n, c, num_bins)
    empty = bins.count == 0
    torch.testing.assert_close(bins.count.masked_fill(empty, -1).double(), tensors["counts"].double().masked_fill(empty, -1))
    for ours, theirs in ((bins.mean_confidence, "mean_p"), (bins.accuracy, "mean_gt")):
        torch.testing.assert_close(ours.masked_fill(empty, -1), tensors[theirs].double(), atol=1e-6, rtol=0)


@handles("aslp_ece_uint8")
def aslp_ece(case, tensors):
    """One channel of 8-bit probabilities. Their debiased error subtracts conf (1 - conf) / (n - 1) in each bin; ours, acc (1 - acc) / (n - 1)."""
    results, num_bins = case["results"], case["params"]["n_bins"]
    probs, labels = tensors["pred_uint8"].double().div(255).unsqueeze(1), (tensors["label_uint8"] >= 128).long()
    metric = CalibrationError(num_bins=num_bins, activation="sigmoid")
    metric.update(probs, labels)
    bins: Bins = metric.bins[0]
    assert (bins.correct.sum() / bins.count.sum()).item() == pytest.approx(results["accuracy"], abs=1e-6)
    for key, measure in (("signed_ece", "signed"), ("ece", "expected"), ("overconfidence_error", "overconfidence_error")):
        assert bins.calibration_error(measure).item() == pytest.approx(results[key], abs=1e-6), key
    filled = bins.count > 0
    count, confidence, accuracy = (x[filled] for x in (bins.count, bins.mean_confidence, bins.accuracy))
    theirs = (count * ((accuracy - confidence) ** 2 - confidence * (1 - confidence) / (count - 1))).sum() / count.sum()
    assert theirs.item() == pytest.approx(results["ece_debiased"], abs=1e-6)
    expected = (count * ((accuracy - confidence) ** 2 - accuracy * (1 - accuracy) / (count - 1))).sum() / count.sum()
    torch.testing.assert_close(bins.calibration_error("debiased_mean_square"), expected)
