"""The evaluator of validation and test runs."""

import json
import math

import pytest
import torch
from cases import each_dimension, make_case
from commands import run_ranks

from densecal.labels import LabelSchema
from densecal.metrics import (
    DEFINITIONS,
    CaseBootstrap,
    SegmentationEvaluation,
    adaptive_calibration_error,
    area_under_risk_coverage,
    boundary_band,
    boundary_distance,
    brier_decomposition,
    brier_score,
    calibration_error,
    dice_score,
    excess_area_under_risk_coverage,
    expected_calibration_error,
    fine_grained_overlap,
    foreground_region,
    hausdorff_distance_95,
    jaccard_index,
    negative_log_likelihood,
    normalized_surface_distance,
    overlap_counts,
    paired_differences,
    smooth_calibration_error,
)
from densecal.metrics.inputs import read_pixels
from densecal.metrics.results import RegionSums

SCHEMA = LabelSchema(("background", "anterior", "posterior"))


def evaluate(probs, label, *, split=None, schema=SCHEMA, **kwargs):
    evaluation = SegmentationEvaluation(schema, foreground_radius=1, **kwargs)
    index = torch.arange(len(probs))
    split = split or [len(probs)]
    for part in zip(probs.split(split), label.split(split), index.split(split), strict=True):
        evaluation.update(*part)
    return evaluation.compute()


def assert_same(a, b, tolerance=1e-12):
    """Nested results, NaN equal to NaN."""
    assert type(a) is type(b)
    if isinstance(a, RegionSums):
        a, b = ([part.tolist() for part in sums.tensors()] for sums in (a, b))
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], tolerance)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, tolerance)
    else:
        assert a == b or (isinstance(a, float) and a == pytest.approx(b, abs=tolerance, nan_ok=True))


DETAILS = {"boundary_width": 2, "detail": True, "surface_tolerance": 1.0}


@each_dimension
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_segmentation_evaluation_agrees_with_the_functions(spatial, soft):
    case = make_case(spatial, batch=4)
    probs, label = case.logits.softmax(1), case.soft_labels if soft else case.label_map
    result = evaluate(probs, label)
    near = foreground_region(label, radius=1)
    for region, mask, suffix in (("all", None, ""), ("foreground", near, "_foreground")):
        pooled = result.pooled[region]
        assert pooled["ece_top_label"] == pytest.approx(expected_calibration_error(probs, label, mask=mask).item())
        assert pooled["ece_classwise"] == pytest.approx(expected_calibration_error(probs, label, kind="classwise", mask=mask).item())
        assert pooled["nll"] == pytest.approx(negative_log_likelihood(probs, label, mask=mask).item())
        assert pooled["brier"] == pytest.approx(brier_score(probs, label, mask=mask).item())
        assert pooled["num_voxels"] == (case.valid if mask is None else mask).sum()
        for i, row in enumerate(result.cases):
            one = {"mask": None if mask is None else mask[i : i + 1]}
            pair = probs[i : i + 1], label[i : i + 1]
            assert row[f"case_ece{suffix}"] == pytest.approx(expected_calibration_error(*pair, **one).item(), nan_ok=True)
            assert row[f"case_ece_classwise{suffix}"] == pytest.approx(expected_calibration_error(*pair, kind="classwise", **one).item(), nan_ok=True)
            assert row[f"case_nll{suffix}"] == pytest.approx(negative_log_likelihood(*pair, **one).item(), nan_ok=True)
            assert row[f"case_brier{suffix}"] == pytest.approx(brier_score(*pair, **one).item(), nan_ok=True)
    for key, scores in (("dice", dice_score(probs, label)), ("iou", jaccard_index(probs, label))):
        assert [row[key] for row in result.cases] == pytest.approx(scores[:, 1:].nanmean(1).tolist(), nan_ok=True)
        assert result.mean[key] == pytest.approx(scores[:, 1:].nanmean(1).nanmean().item())
        assert result.mean[f"{key}/posterior"] == pytest.approx(scores[:, 2].nanmean().item(), nan_ok=True)
    assert ("soft_dice" in result.mean) == soft


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_segmentation_evaluation_does_not_depend_on_batches_or_order(soft):
    case = make_case((5, 7), batch=5)
    probs, label = case.logits.softmax(1), case.soft_labels if soft else case.label_map
    whole = evaluate(probs, label)
    assert_same(vars(whole), vars(evaluate(probs, label, split=[1, 3, 1])))
    backwards = SegmentationEvaluation(SCHEMA, foreground_radius=1)
    for i in reversed(range(5)):
        backwards.update(probs[i : i + 1], label[i : i + 1], torch.tensor([i]))
    assert_same(vars(whole), vars(backwards.compute()))


def test_segmentation_evaluation_ignored_voxels_have_no_influence():
    case = make_case((5, 7))
    probs = case.logits.softmax(1)
    other = probs.masked_fill(~case.valid.unsqueeze(1), torch.nan)
    assert_same(vars(evaluate(probs, case.label_map)), vars(evaluate(other, case.label_map)), tolerance=0)
    assert_same(vars(evaluate(probs, case.soft_labels)), vars(evaluate(other, case.soft_labels)), tolerance=0)


def test_segmentation_evaluation_padding_changes_nothing():
    case = make_case((5, 7), ignored=0.0)
    probs = case.logits.softmax(1)
    padded = evaluate(
        torch.nn.functional.pad(probs, (2, 1, 0, 3), value=1 / 3), torch.nn.functional.pad(case.label_map, (2, 1, 0, 3), value=SCHEMA.ignore_index)
    )
    assert_same(vars(evaluate(probs, case.label_map)), vars(padded))


def test_segmentation_evaluation_absent_class_is_nan_and_counted():
    label = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
    probs = torch.nn.functional.one_hot(torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]), 3).movedim(-1, 1).float()
    result = evaluate(probs, label)
    assert result.cases[0]["dice/anterior"] == pytest.approx(2 * 2 / (3 + 2))
    assert math.isnan(result.cases[0]["dice/posterior"])
    assert math.isnan(result.cases[1]["dice"])
    assert result.mean["dice"] == pytest.approx(4 / 5)
    assert result.num_defined["dice"] == 1
    assert math.isnan(result.mean["dice/posterior"])
    assert result.num_defined["dice/posterior"] == 0
    assert math.isnan(result.cases[1]["case_ece_foreground"])
    assert result.cases[1]["num_voxels_foreground"] == 0
    assert result.pooled["foreground"]["num_voxels"] == 4


def test_segmentation_evaluation_soft_dice_is_one_at_the_reference():
    soft = make_case((5, 7), ignored=0.0).soft_labels
    assert evaluate(soft, soft).mean["soft_dice"] == pytest.approx(1.0)


def test_segmentation_evaluation_without_cases():
    evaluation = SegmentationEvaluation(SCHEMA)
    with pytest.warns(UserWarning, match="compute"):
        result = evaluation.compute()
    assert result.cases == []
    assert math.isnan(result.scalars()["dice"])
    assert result.pooled["all"]["num_voxels"] == 0
    assert all(math.isnan(value) for value in result.scalars().values())


def test_segmentation_evaluation_without_a_background_has_one_region():
    case = make_case((5, 7))
    result = evaluate(case.logits.softmax(1), case.label_map, schema=LabelSchema(("road", "car", "tree"), background=None))
    assert list(result.pooled) == ["all"]
    assert "ece_foreground" not in result.scalars()
    assert result.foreground == (0, 1, 2)


def test_segmentation_evaluation_bins_give_the_error():
    case = make_case((9, 11))
    result = evaluate(case.logits.softmax(1), case.label_map, num_bins=10)
    for region in ("all", "foreground"):
        bins = result.bins[region]["top_label"]
        assert len(bins["edges"]) == 11
        n = sum(bins["count"])
        gaps = (c / n * abs(a - p) for c, a, p in zip(bins["count"], bins["accuracy"], bins["mean_confidence"], strict=True) if c)
        assert sum(gaps) == pytest.approx(result.pooled[region]["ece_top_label"])
        assert torch.tensor(result.bins[region]["classwise"]["count"]).sum(1).tolist() == [n] * 3


def test_segmentation_evaluation_every_number_is_defined():
    case = make_case((5, 7))
    result = evaluate(case.logits.softmax(1), case.soft_labels, replicates=20, **DETAILS)
    for key in [*result.scalars(), *result.mean, *result.intervals]:
        text = result.definitions.get(key) or result.definitions[f"{key.split('/')[0]}/<class>"]
        assert text.endswith(".")
        assert "{" not in text
    assert set(DEFINITIONS) == set(result.definitions)


def test_segmentation_evaluation_after_reset_is_new():
    case = make_case((5, 7))
    evaluation = SegmentationEvaluation(SCHEMA, foreground_radius=1)
    for _ in range(2):
        evaluation.update(case.logits.softmax(1), case.label_map, torch.arange(2))
        result = evaluation.compute()
        evaluation.reset()
    assert_same(vars(result), vars(evaluate(case.logits.softmax(1), case.label_map)))


@pytest.mark.parametrize(
    ("classes", "index", "message"),
    [(4, [0, 1], "with 3 classes"), (3, [0], "Expected `case_index` of shape"), (3, [5, 5], "Expected every case once, but got case_index \\[5\\]")],
    ids=["classes", "shape", "twice"],
)
def test_segmentation_evaluation_errors(classes, index, message):
    evaluation = SegmentationEvaluation(SCHEMA)

    def run():
        evaluation.update(torch.full((2, classes, 4), 1 / classes), torch.zeros(2, 4, dtype=torch.long), torch.tensor(index))
        evaluation.compute()

    with pytest.raises(ValueError, match=message):
        run()


@each_dimension
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_details_agree_with_the_functions(spatial, soft):
    case = make_case(spatial, batch=3)
    probs, label = case.logits.softmax(1), case.soft_labels if soft else case.label_map
    result = evaluate(probs, label, **(DETAILS if len(spatial) > 1 else DETAILS | {"surface_tolerance": None}))
    masks = {"all": None, "foreground": foreground_region(label, radius=1), "boundary": boundary_band(label, width=2)}
    assert list(result.pooled) == list(masks)
    functions = {
        "mce": lambda *a, **k: calibration_error(*a, measure="maximum", **k),
        "signed_ce": lambda *a, **k: calibration_error(*a, measure="signed", **k),
        "debiased_ce": lambda *a, **k: calibration_error(*a, measure="debiased_root_mean_square", **k),
        "overconfidence": lambda *a, **k: calibration_error(*a, measure="overconfidence", **k),
        "brier_calibration": lambda *a, **k: brier_decomposition(*a, kind="classwise", **k).calibration,
        "brier_refinement": lambda *a, **k: brier_decomposition(*a, kind="classwise", **k).refinement,
        "ece_equal_mass": adaptive_calibration_error,
        "smooth_ece": smooth_calibration_error,
        "aurc": area_under_risk_coverage,
        "eaurc": excess_area_under_risk_coverage,
        "aurc_normalised": lambda *a, **k: area_under_risk_coverage(*a, score="logit_norm", **k),
    }
    # Fine bins keep the order of confidences up to 0.8 % of their distance to 0 or 1; of so few pixels one that changes its bin is seen.
    tolerance = {"ece_equal_mass": 1e-2, "smooth_ece": 2e-3, "aurc": 2e-3, "eaurc": 2e-3, "aurc_normalised": 2e-3}
    for region, mask in masks.items():
        suffix = "" if region == "all" else f"_{region}"
        for key, function in functions.items():
            assert result.pooled[region][key] == pytest.approx(function(probs, label, mask=mask).item(), abs=tolerance.get(key, 1e-9)), (region, key)
            for i, row in enumerate(result.cases):
                one = None if mask is None else mask[i : i + 1]
                expected = function(probs[i : i + 1], label[i : i + 1], mask=one).item()
                assert row[f"case_{key}{suffix}"] == pytest.approx(expected, abs=tolerance.get(key, 1e-9), nan_ok=True), (region, key, i)
    distance = boundary_distance(label, reach=10)
    profile = result.curves["boundary_distance"]
    right = probs.argmax(1) == (label.argmax(1) if soft else label)
    for step in range(10):
        there = case.valid & (distance >= step) & (distance < step + 1)
        assert profile["count"][step] == there.sum()
        if not soft and there.any():
            assert profile["accuracy"][step] == pytest.approx(right[there].double().mean().item())
            assert profile["mean_confidence"][step] == pytest.approx(probs.amax(1)[there].mean().item(), abs=1e-6)
    if len(spatial) > 1:
        for key, values in (
            ("hd95", hausdorff_distance_95(probs, label)),
            ("nsd", normalized_surface_distance(probs, label, tolerance=1.0)),
        ):
            assert [row[f"{key}/posterior"] for row in result.cases] == pytest.approx(values[:, 2].tolist(), nan_ok=True)
            assert result.mean[key] == pytest.approx(values[:, 1:].nanmean(1).nanmean().item(), nan_ok=True)


def test_details_do_not_depend_on_batches_or_order():
    case = make_case((9, 7), batch=5)
    probs = case.logits.softmax(1)
    whole = evaluate(probs, case.label_map, replicates=20, **DETAILS)
    assert_same(vars(whole), vars(evaluate(probs, case.label_map, split=[1, 3, 1], replicates=20, **DETAILS)), tolerance=1e-9)


def test_millimetres_follow_the_spacing():
    case = make_case((9, 11), batch=2, ignored=0.0)
    probs, spacing = case.logits.softmax(1), torch.tensor([0.5, 2.0])
    evaluation = SegmentationEvaluation(SCHEMA, boundary_width=1.5, boundary_unit="mm", surface_tolerance=1.0)
    evaluation.update(probs, case.label_map, torch.arange(2), spacing=spacing)
    result = evaluation.compute()
    band = boundary_band(case.label_map, width=1.5, spacing=spacing)
    assert result.pooled["boundary"]["num_voxels"] == band.sum()
    assert result.cases[0]["hd95/posterior"] == pytest.approx(hausdorff_distance_95(probs, case.label_map, spacing=spacing)[0, 2].item(), nan_ok=True)
    with pytest.raises(ValueError, match=r"Expected `spacing`.*boundary_unit='mm'"):
        evaluation.update(probs, case.label_map, torch.arange(2))


def test_a_mask_holds_for_surfaces_too():
    case = make_case((9, 11), batch=2, ignored=0.0)
    probs, mask = case.logits.softmax(1), torch.zeros(2, 9, 11, dtype=torch.bool)
    mask[:, :5, 2:] = True
    evaluation = SegmentationEvaluation(SCHEMA, surface_tolerance=1.0)
    evaluation.update(probs, case.label_map, torch.arange(2), mask)
    rows = evaluation.compute().cases
    expected, unmasked = (hausdorff_distance_95(probs, case.label_map, mask=one)[:, 1] for one in (mask, None))
    assert [row["hd95/anterior"] for row in rows] == pytest.approx(expected.tolist(), nan_ok=True)
    assert expected.tolist() != unmasked.tolist()


def test_a_sigmoid_channel_counts_as_two_classes():
    present = torch.rand(3, 1, 7, 9, generator=torch.Generator().manual_seed(0))
    label = (torch.rand(3, 7, 9, generator=torch.Generator().manual_seed(1)) < 0.7 * present[:, 0]).long()
    two = evaluate(torch.cat([1 - present, present], 1), label, schema=LabelSchema(("rest", "tumour"), background=None), **DETAILS)
    regions = evaluate(present, label.unsqueeze(1), schema=LabelSchema(("a",), background=None, activation="sigmoid"), **DETAILS)
    for key in ("ece_top_label", "ece_classwise", "nll", "brier", "brier_calibration", "accuracy", "mce", "smooth_ece"):
        assert regions.pooled["all"][key] == pytest.approx(two.pooled["all"][key], abs=1e-6), key
        assert regions.pooled["boundary"][key] == pytest.approx(two.pooled["boundary"][key], abs=1e-6), key
    for key in ("dice", "iou", "hd95", "nsd"):
        assert regions.mean[f"{key}/a"] == pytest.approx(two.mean[f"{key}/tumour"], nan_ok=True)
    assert "foreground" in regions.pooled


def test_intervals_hold_their_numbers_and_shrink_with_the_cases():
    case = make_case((9, 11), batch=12)
    probs = case.logits.softmax(1)
    few, many = (evaluate(probs.repeat(k, 1, 1, 1), case.label_map.repeat(k, 1, 1), replicates=200, detail=True) for k in (1, 4))
    scalars = few.scalars()
    for key in ("dice", "nll", "brier", "accuracy", "signed_ce", "nll_foreground", "iou_dataset", "iou_image", "dice_class"):
        low, high = few.intervals[key]
        assert low < scalars[key] < high
        assert many.intervals[key][1] - many.intervals[key][0] < high - low
    assert evaluate(probs[:1], case.label_map[:1], replicates=20).intervals["nll"] == pytest.approx((math.nan, math.nan), nan_ok=True)
    assert evaluate(probs, case.label_map).intervals == {}


def test_groups_are_resampled_whole():
    """Each case twice: as cases of their own the interval is too narrow; as pairs it is that of the cases."""
    case = make_case((9, 11), batch=8)
    probs, label = case.logits.softmax(1), case.label_map
    alone = evaluate(probs, label, replicates=2000).intervals["nll"]
    twice = {"replicates": 2000, "groups": [i // 2 for i in range(16)]}
    pairs = evaluate(probs.repeat_interleave(2, 0), label.repeat_interleave(2, 0), **twice).intervals["nll"]
    assert pairs == pytest.approx(alone, rel=1e-6)
    naive = evaluate(probs.repeat_interleave(2, 0), label.repeat_interleave(2, 0), replicates=2000).intervals["nll"]
    assert naive[1] - naive[0] < 0.85 * (alone[1] - alone[0])


def test_paired_differences_are_differences_over_common_cases():
    case = make_case((9, 11), batch=6)
    label = case.label_map
    a, b = (evaluate((scale * case.logits).softmax(1), label, detail=True) for scale in (1.0, 1.5))
    differences = paired_differences(b, a, replicates=200)
    for key in ("ece", "nll", "dice", "mce", "nll_foreground", "iou/posterior"):
        gap, low, high = differences[key]
        assert gap == pytest.approx(b.scalars()[key] - a.scalars()[key], abs=1e-12)
        assert low <= gap + 1e-12
        assert high >= gap - 1e-12
    assert differences["dice"] == pytest.approx((0, 0, 0))  # another temperature, the same classes
    fewer = SegmentationEvaluation(SCHEMA, foreground_radius=1)
    fewer.update(case.logits[2:].softmax(1), label[2:], torch.arange(2, 6))
    gap = paired_differences(fewer.compute(), b, replicates=20)["nll"][0]
    expected = [negative_log_likelihood((s * case.logits[2:]).softmax(1), label[2:]).item() for s in (1.0, 1.5)]
    assert gap == pytest.approx(expected[0] - expected[1])
    other = SegmentationEvaluation(SCHEMA, foreground_radius=1)
    other.update(case.logits[:1].softmax(1), label[:1], torch.tensor([77]))
    with pytest.raises(ValueError, match="share none"):
        paired_differences(other.compute(), a)
    with pytest.raises(ValueError, match="same settings"):
        paired_differences(evaluate(case.logits.softmax(1), label, num_bins=7), a)


def test_overlap_in_three_senses_has_intervals_and_paired_differences():
    """Against resamples of whole cases drawn in a loop, each scored by the function."""
    case, other = make_case((9, 11), batch=5), make_case((9, 11), batch=5, seed=1)
    a, b = (evaluate(logits.softmax(1), case.label_map, replicates=40) for logits in (case.logits, other.logits))
    bootstrap = CaseBootstrap(5, replicates=40)
    counts = [overlap_counts(read_pixels(logits.softmax(1), case.label_map, ignore_index=-100)) for logits in (case.logits, other.logits)]
    drawn = [torch.arange(5).repeat_interleave(weights.long()) for weights in bootstrap.weights]
    first, second = ([fine_grained_overlap(*(n[rows] for n in some), background=0) for rows in drawn] for some in counts)
    differences = paired_differences(b, a, replicates=40)
    for key in ("accuracy_pooled", *(f"{score}_{sense}" for score in ("accuracy", "iou", "dice") for sense in ("dataset", "image", "class"))):
        values = torch.stack([numbers[key] for numbers in first])
        gaps = torch.stack([numbers[key] for numbers in second]) - values
        assert a.intervals[key] == pytest.approx(values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()), key
        assert differences[key][0] == pytest.approx(b.scalars()[key] - a.scalars()[key])
        assert differences[key][1:] == pytest.approx(gaps.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()), key
    assert not [key for key in a.fine_grained if "worst" in key]  # with details


_RANK = """
import json, warnings
import torch
from cases import make_case
from densecal.labels import LabelSchema
from densecal.metrics import SegmentationEvaluation

warnings.filterwarnings("ignore", message="The ``compute``")
results = {}
for name, owned in {"odd": [[0, 2, 4], [1, 3]], "empty-rank": [[0, 1, 2, 3, 4], []], "nothing": [[], []]}.items():
    for soft in (False, True):
        case = make_case((5, 7), batch=5)
        label = case.soft_labels if soft else case.label_map
        evaluation = SegmentationEvaluation(
            LabelSchema(("background", "anterior", "posterior")), foreground_radius=1, detail=True, boundary_width=2, replicates=20
        )
        for i in owned[rank]:
            evaluation.update(case.logits.softmax(1)[i : i + 1], label[i : i + 1], torch.tensor([i]))
        result = vars(evaluation.compute())
        del result["case_sums"], result["settings"]
        results[f"{name}-{'soft' if soft else 'hard'}"] = result
        evaluation.reset()
json.dump(results, open(f"{folder}/{rank}.json", "w"))
"""


@pytest.mark.slow
def test_segmentation_evaluation_over_two_ranks_equals_one(tmp_path):
    run_ranks(_RANK, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    case = make_case((5, 7), batch=5)
    for kind, label in (("hard", case.label_map), ("soft", case.soft_labels)):
        expected = vars(evaluate(case.logits.softmax(1), label, detail=True, boundary_width=2, replicates=20))
        del expected["case_sums"], expected["settings"]
        expected = json.loads(json.dumps(expected))
        for rank in found:
            assert_same(rank[f"odd-{kind}"], expected)
            assert_same(rank[f"empty-rank-{kind}"], expected)
            assert rank[f"nothing-{kind}"]["cases"] == []


@pytest.mark.gpu
def test_segmentation_evaluation_on_a_gpu_equals_cpu():
    case = make_case((5, 7), dtype=torch.float32)
    evaluation = SegmentationEvaluation(SCHEMA, foreground_radius=1, validate_args=False).cuda()
    inputs = case.logits.softmax(1).cuda(), case.label_map.cuda(), torch.arange(2).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluation.update(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(vars(evaluation.compute()), vars(evaluate(case.logits.softmax(1), case.label_map)), tolerance=1e-6)
