"""What every registered metric keeps: copies, batches, ranks, nothing seen, ignored pixels, half precision, no waiting for the device."""

import copy
import dataclasses
import inspect
import itertools
import json
import math
import pickle
import sys

import pytest
import torch
from cases import make_case
from commands import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from densecal.labels import LabelSchema
from densecal.registry import METRICS
from densecal.targets import one_hot

# Beside every registered metric by its defaults, what else a name stands for.
VARIANTS = {
    "calibration_error": [
        {"kind": "classwise", "num_classes": 3, "measure": "debiased_mean_square"},
        {"pooling": "image", "measure": "average"},
        {"kind": "classwise", "num_classes": 3, "pooling": "image", "threshold": 0.05, "average": "none"},
    ],
    "evaluation": [{"detail": True, "boundary_width": 2.0, "replicates": 5}],
}
ENTRIES = [(name, options) for name in METRICS.list() for options in [{}, *VARIANTS.get(name, [])]]
each_metric = pytest.mark.parametrize(("name", "options"), ENTRIES, ids=lambda value: value if isinstance(value, str) else ",".join(value) or "-")


def make(name, options):
    """The metric for three classes."""
    known = {"num_classes": 3, "schema": LabelSchema(("background", "anterior", "posterior")), "tolerance": 1.0}
    required = {key for key, parameter in inspect.signature(METRICS[name]).parameters.items() if parameter.default is inspect.Parameter.empty}
    return METRICS.create(name, **{key: value for key, value in known.items() if key in required} | {"validate_args": False} | options)


def update(metric, probs, label, cases):
    """Feed some cases of a batch."""
    index = torch.tensor(cases, dtype=torch.long)
    more = {"case_index": index} if "case_index" in inspect.signature(metric.update).parameters else {}
    metric.update(probs[index], label[index], **more)


def numbers(result):
    """A result as floats, whatever holds them."""
    if isinstance(result, torch.Tensor):
        return result.flatten().tolist()
    if dataclasses.is_dataclass(result):
        result = vars(result)
    if isinstance(result, dict):
        return list(itertools.chain.from_iterable(numbers(result[key]) for key in sorted(result)))
    if isinstance(result, (list, tuple)):
        return list(itertools.chain.from_iterable(numbers(value) for value in result))
    return [float(result)] if isinstance(result, (int, float)) else []


def same(result, tolerance=1e-12):
    return pytest.approx(numbers(result), abs=tolerance, nan_ok=True)


def seen(name, options, probs, label, cases=range(5)):
    metric = make(name, options)
    update(metric, probs, label, list(cases))
    return metric.compute()


def five_cases(dtype=torch.float64):
    case = make_case((5, 7), batch=5, dtype=dtype)
    return case.logits.softmax(1), case


@each_metric
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_batch_by_batch_equals_at_once(name, options, soft):
    probs, case = five_cases()
    label = case.soft_labels if soft else case.label_map
    metric = make(name, options)
    for part in ([0], [1, 2, 3], [4]):
        update(metric, probs, label, part)
    whole = seen(name, options, probs, label)
    assert any(not math.isnan(value) for value in numbers(whole))
    assert numbers(metric.compute()) == same(whole)


@each_metric
def test_copies_go_on_alike(name, options):
    probs, case = five_cases()
    metric = make(name, options)
    update(metric, probs, case.label_map, [0, 1])
    twins = [copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))]
    for twin in [*twins, metric]:
        update(twin, probs, case.label_map, [2, 3, 4])
    expected = same(seen(name, options, probs, case.label_map))
    for twin in [*twins, metric]:
        assert numbers(twin.compute()) == expected


@each_metric
def test_after_reset_it_is_new(name, options):
    probs, case = five_cases()
    metric = make(name, options)
    update(metric, probs, case.label_map, [0, 1])
    metric.compute()
    metric.reset()
    update(metric, probs, case.label_map, [2, 3])
    assert numbers(metric.compute()) == same(seen(name, options, probs, case.label_map, [2, 3]))


@each_metric
def test_ignored_pixels_have_no_influence(name, options):
    probs, case = five_cases()
    other = probs.masked_fill(~case.valid.unsqueeze(1), torch.nan)
    for label in (case.label_map, case.soft_labels):
        assert numbers(seen(name, options, other, label)) == same(seen(name, options, probs, label), tolerance=0)


@each_metric
def test_nothing_that_counts_is_nan(name, options):
    probs, case = five_cases()
    result = seen(name, options, probs, torch.full_like(case.label_map, -100))
    if hasattr(result, "scalars"):
        result = result.scalars()
    if hasattr(result, "best_threshold"):
        result = [result.overlap, result.best_threshold, result.best_overlap]
    values = numbers(result)
    assert values
    assert all(math.isnan(value) for value in values)


@each_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_as_the_single_precision_it_is(name, options, dtype):
    probs, case = five_cases(torch.float32)
    rounded = probs.to(dtype)
    assert numbers(seen(name, options, rounded, case.label_map)) == same(seen(name, options, rounded.float(), case.label_map), tolerance=1e-6)


@each_metric
def test_state_does_not_grow_with_pixels(name, options):
    small, large = (make_case(spatial, batch=2) for spatial in ((5, 7), (15, 21)))
    sizes = []
    # Metrics of order keep pixels while they fit; here none do.
    full = {"max_exact": 0} if "max_exact" in inspect.signature(METRICS[name]).parameters else {}
    for case in (small, large):
        metric = make(name, options | full)
        update(metric, case.logits.softmax(1), case.label_map, [0, 1])
        sizes.append([sum(t.numel() for t in state) if isinstance(state, list) else state.numel() for state in metric.metric_state.values()])
    assert sizes[0] == sizes[1]


class NoWaiting(TorchDispatchMode):
    """Refuses what would make a GPU's host wait: a number on the host, or a result whose size depends on values."""

    REFUSED = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal", "aten::is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name() not in self.REFUSED, f"{func.name()} waits for the device"
        indices = args[1] if func.name().startswith(("aten::index.", "aten::index_put")) else []
        assert not any(index is not None and index.dtype == torch.bool for index in indices), "picking by a mask waits for the device"
        return func(*args, **(kwargs or {}))


@each_metric
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_update_does_not_wait_for_the_device(name, options, soft, monkeypatch):
    if name in ("hd95", "nsd") or options.get("detail"):
        pytest.skip("distances between surfaces, and what needs the order of one case's confidences, are measured on the host, as the docstrings say")
    # On a CPU labels are looked at, which costs nothing; here nobody may look, as on a GPU.
    for module in (one_hot, *(module for key, module in sys.modules.items() if key.startswith("densecal.") and hasattr(module, "may_look"))):
        monkeypatch.setattr(module, "may_look", lambda tensor: False)
    probs, case = five_cases()
    metric = make(name, options)
    index = torch.arange(5)
    more = {"case_index": index} if "case_index" in inspect.signature(metric.update).parameters else {}
    with NoWaiting():
        metric.update(probs, case.soft_labels if soft else case.label_map, **more)


def test_no_waiting_sees_what_waits():
    for wait in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool((x > 0).any()), lambda x: x.nonzero()):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            wait(torch.ones(3))


_RANK = """
import json, warnings
from metrics.test_promises import ENTRIES, five_cases, make, numbers, update

warnings.filterwarnings("ignore", message="The ``compute``")
probs, case = five_cases()
results = []
for owned in ([[0, 2, 4], [1, 3]], [[0, 1, 2, 3, 4], []], [[], []]):
    for name, options in ENTRIES:
        metric = make(name, options)
        if owned[rank]:
            update(metric, probs, case.label_map, owned[rank])
        results.append(numbers(metric.compute()))
json.dump(results, open(f"{folder}/{rank}.json", "w"))
"""


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    run_ranks(_RANK, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    probs, case = five_cases()
    for i, (name, options) in enumerate(ENTRIES):
        expected = same(seen(name, options, probs, case.label_map))
        for rank in found:
            assert rank[i] == expected, name
            assert rank[i + len(ENTRIES)] == expected, name
            if name not in ("evaluation", "uncertainty_error_overlap"):  # they say 0 voxels, their settings and thresholds even so
                assert all(math.isnan(value) for value in rank[i + 2 * len(ENTRIES)]), name
