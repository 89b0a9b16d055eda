"""What the measures that sort confidences keep: pixels while they fit, then the fine histogram; over batches, ranks and copies."""

import json
import math
import pickle

import pytest
import torch
from cases import make_case
from commands import run_ranks
from torchmetrics import MetricCollection

from densecal import create_metric
from densecal.metrics import AreaUnderRiskCoverage
from densecal.metrics.ordered import share_below

NAMES = {
    "adaptive_calibration_error": {},
    "smooth_calibration_error": {"kind": "classwise", "num_classes": 3},
    "aurc": {"score": "logit_norm"},
    "excess_aurc": {},
}
each_metric = pytest.mark.parametrize("name", NAMES)


def create(name, **options):
    return create_metric(name, **NAMES[name], **options)


def batches(sizes=(1, 3, 1)):
    case = make_case((5, 7), batch=sum(sizes))
    return list(zip(case.logits.softmax(1).split(sizes), case.label_map.split(sizes), strict=True))


def test_share_below_by_hand():
    # Bins of 2, 0, 3 and 1 entries: 3 entries end a third into the third bin.
    place, share = share_below(torch.tensor([2, 0, 3, 1]), torch.tensor([0.0, 1.0, 2.0, 3.0, 6.0], dtype=torch.float64))
    assert place.tolist() == [0, 0, 0, 2, 3]
    torch.testing.assert_close(share, torch.tensor([0, 0.5, 1, 1 / 3, 1], dtype=torch.float64))


def test_order_metric_passes_to_the_histogram_when_full():
    metric = AreaUnderRiskCoverage(max_exact=4 * 35)
    kept = []
    for probs, label in batches((1, 3, 1)):
        metric.update(probs, label)
        kept.append((sum(len(entry) for entry in metric.entries), int(metric.bin_count.sum())))
    valid = int(sum((label != -100).sum() for _, label in batches()))
    assert kept == [(35, 0), (140, 0), (0, valid)]
    assert metric.count == valid
    metric.reset()
    assert metric.bin_count.sum() == 0
    assert metric.entries == []


@each_metric
@pytest.mark.parametrize("max_exact", [0, 70, 1000], ids=["bins", "mixed", "exact"])
def test_order_metric_forward_is_the_batch_and_accumulates(name, max_exact):
    metric, plain = create(name, max_exact=max_exact), create(name, max_exact=max_exact)
    for probs, label in batches():
        alone = create(name, max_exact=max_exact)
        alone.update(probs, label)
        plain.update(probs, label)
        torch.testing.assert_close(metric(probs, label), alone.compute())
    torch.testing.assert_close(metric.compute(), plain.compute(), rtol=1e-9, atol=0)
    torch.testing.assert_close(metric.error_bound, plain.error_bound)


@each_metric
def test_order_metric_error_bound_changes_nothing(name):
    metric = create(name, max_exact=0)
    (first, second, *_) = batches((2, 3))
    metric.update(*first)
    value = metric.compute()
    assert 0 <= metric.error_bound <= 1
    assert torch.equal(metric.compute(), value)
    metric.update(*second)
    other = create(name, max_exact=0)
    other.update(*first)
    other.update(*second)
    assert torch.equal(metric.compute(), other.compute())


@each_metric
def test_order_metric_survives_a_copy(name):
    metric = create(name, max_exact=70)
    for probs, label in batches():
        metric.update(probs, label)
    copy = pickle.loads(pickle.dumps(metric))
    assert torch.equal(copy.compute(), metric.compute())


def test_order_metrics_share_a_collection():
    collection = MetricCollection({name: create(name) for name in ("adaptive_calibration_error", "excess_aurc")} | {"aurc": AreaUnderRiskCoverage()})
    alone = {name: create(name) for name in ("adaptive_calibration_error", "excess_aurc")} | {"aurc": AreaUnderRiskCoverage()}
    for probs, label in batches():
        collection.update(probs, label)
        for metric in alone.values():
            metric.update(probs, label)
    values = collection.compute()
    for name, metric in alone.items():
        assert torch.equal(values[name], metric.compute())


_RANK = """
import json
from metrics.test_ordered import NAMES, batches, create
results = {}
for layout, owned in {"odd": [[0, 2], [1]], "empty-rank": [[0, 1, 2], []], "nothing": [[], []]}.items():
    for name in NAMES:
        for max_exact in (70, 1000):  # at 70 a rank keeps its pixels and another counts
            metric = create(name, max_exact=max_exact)
            for i in owned[rank]:
                metric.update(*batches()[i])
            value, bound = metric.compute().item(), metric.error_bound.item()
            again = metric.compute().item()
            results[f"{layout} {name} {max_exact}"] = [value, bound, again]
json.dump(results, open(f"{folder}/{rank}.json", "w"))
"""


@pytest.mark.slow
def test_order_metrics_over_two_ranks_equal_one(tmp_path):
    run_ranks(_RANK, tmp_path)
    expected = {}
    for name in NAMES:
        exact, binned = create(name), create(name, max_exact=0)
        for batch in batches():
            exact.update(*batch)
            binned.update(*batch)
        expected[name, "1000"] = exact.compute().item(), 0.0
        expected[name, "70"] = binned.compute().item(), binned.error_bound.item()
    for found in [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]:
        assert len(found) == 3 * 2 * len(NAMES)
        for key, (value, bound, again) in found.items():
            layout, name, max_exact = key.split()
            if layout == "nothing":
                assert math.isnan(value)
            else:
                assert value == again
                assert (value, bound) == pytest.approx(expected[name, max_exact], abs=1e-9)


def test_order_metric_errors():
    with pytest.raises(ValueError, match="Expected `max_exact` to be 0 or greater"):
        AreaUnderRiskCoverage(max_exact=-1)


@pytest.mark.gpu
@each_metric
@pytest.mark.parametrize("max_exact", [0, 70, 1000], ids=["bins", "mixed", "exact"])
def test_order_metric_updates_on_a_gpu_without_a_sync(name, max_exact):
    parts = [(probs.float(), label) for probs, label in batches()]
    on_cpu, on_gpu = create(name, max_exact=max_exact), create(name, max_exact=max_exact, validate_args=False).cuda()
    moved = [(probs.cuda(), label.cuda()) for probs, label in parts]
    on_gpu.update(*moved[0])
    on_gpu.reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part in moved:
            on_gpu.update(*part)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for part in parts:
        on_cpu.update(*part)
    torch.testing.assert_close(on_gpu.compute().cpu(), on_cpu.compute(), rtol=1e-6, atol=0)
    torch.testing.assert_close(on_gpu.error_bound.cpu(), on_cpu.error_bound, rtol=1e-6, atol=0)
