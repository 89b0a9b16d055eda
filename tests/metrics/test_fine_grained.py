"""Overlap over the data set, per image, per class, and of the worst images."""

import math

import pytest
import torch
from cases import each_dimension, make_case

from densecal.metrics import FINE_GRAINED_DEFINITIONS, FineGrainedOverlap, fine_grained_overlap

SCORES = {
    "accuracy": lambda i, p, r: i / r,
    "iou": lambda i, p, r: i / (p + r - i),
    "dice": lambda i, p, r: 2 * i / (p + r),
}


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def worst(values, q):
    values = sorted(values)
    return mean(values[: max(1, len(values) * q // 100)])


def by_loop(probs, label, valid, *, classes, q, num_classes):
    """The paper's section 3, image by image and class by class."""
    counts = {}
    for n in range(len(probs)):
        prediction = probs[n].argmax(0)
        for c in classes:
            a, b = (prediction == c) & valid[n], (label[n] == c) & valid[n]
            counts[n, c] = int((a & b).sum()), int(a.sum()), int(b.sum())
    images = range(len(probs))
    hits, total = sum(i for i, _, _ in counts.values()), sum(r for _, _, r in counts.values())
    numbers = {"accuracy_pooled": hits / total}
    for key, score in SCORES.items():
        has = {(n, c): score(*values) for (n, c), values in counts.items() if values[2] > 0}
        sums = {c: [sum(counts[n, c][k] for n in images) for k in range(3)] for c in classes}
        numbers[f"{key}_dataset"] = mean(score(*sums[c]) for c in classes if sums[c][2] > 0)
        of_image = [mean(has[n, c] for c in classes if (n, c) in has) for n in images if any((n, c) in has for c in classes)]
        of_class = [[has[n, c] for n in images if (n, c) in has] for c in classes if any((n, c) in has for n in images)]
        numbers[f"{key}_image"] = mean(of_image)
        numbers[f"{key}_class"] = mean(mean(values) for values in of_class)
        numbers[f"{key}_image_worst"] = worst(of_image, q)
        numbers[f"{key}_class_worst"] = mean(worst(values, q) for values in of_class)
        numbers[f"{key}_image_worst_mean"] = mean(worst(of_image, z) for z in range(10, 101, 10))
        numbers[f"{key}_class_worst_mean"] = mean(mean(worst(values, z) for values in of_class) for z in range(10, 101, 10))
    return numbers


def as_floats(numbers):
    return {name: value.item() for name, value in numbers.items()}


def test_fine_grained_overlap_by_hand():
    # Two classes in three images; the second class is in the first image only, and predicted where it is not in the third.
    intersection = torch.tensor([[4, 1], [6, 0], [3, 0]])
    predicted = torch.tensor([[5, 1], [6, 0], [3, 3]])
    reference = torch.tensor([[4, 2], [6, 0], [6, 0]])
    numbers = fine_grained_overlap(intersection, predicted, reference, worst_percent=50)
    assert numbers["accuracy_pooled"].item() == pytest.approx(14 / 18)
    assert numbers["iou_dataset"].item() == pytest.approx((13 / (14 + 16 - 13) + 1 / (4 + 2 - 1)) / 2)
    images = [(4 / 5 + 1 / 2) / 2, 1.0, 1 / 2]
    assert numbers["iou_image"].item() == pytest.approx(sum(images) / 3)
    assert numbers["iou_image_worst"].item() == pytest.approx(1 / 2)  # half of three is one
    assert numbers["iou_class"].item() == pytest.approx(((4 / 5 + 1 + 1 / 2) / 3 + 1 / 2) / 2)
    assert numbers["iou_class_worst"].item() == pytest.approx((1 / 2 + 1 / 2) / 2)
    # 10 to 60 %: the lowest; 70 to 90 %: the two lowest; 100 %: all three.
    lowest = sorted(images)
    expected = (6 * lowest[0] + 3 * (lowest[0] + lowest[1]) / 2 + sum(images) / 3) / 10
    assert numbers["iou_image_worst_mean"].item() == pytest.approx(expected)


@each_dimension
@pytest.mark.parametrize("background", [None, 0, 2], ids=["all", "without-first", "without-last"])
def test_fine_grained_overlap_equals_a_loop(spatial, background):
    case = make_case(spatial, num_classes=4, batch=11)
    probs, label = case.logits.softmax(1), case.label_map
    label[label == 3] = 1  # a class that never occurs, but is predicted
    for n in (2, 5):
        label[n][label[n] == 2] = 0
    classes = [c for c in range(4) if c != background]
    metric = FineGrainedOverlap(4, background=background, worst_percent=30)
    metric.update(probs[:4], label[:4])
    metric.update(probs[4:], label[4:])
    assert metric.count == 11
    expected = by_loop(probs, label, case.valid, classes=classes, q=30, num_classes=4)
    assert as_floats(metric.compute()) == pytest.approx(expected)
    assert set(expected) == {key for key in FINE_GRAINED_DEFINITIONS if "<class>" not in key}


def test_fine_grained_overlap_soft_reference_and_regions():
    case = make_case((5, 7), batch=4)
    by_share, by_class = FineGrainedOverlap(3), FineGrainedOverlap(3)
    by_share.update(case.logits.softmax(1), case.soft_labels)
    by_class.update(case.logits.softmax(1), case.soft_labels.argmax(1).masked_fill(~case.valid, -100))
    assert as_floats(by_share.compute()) == as_floats(by_class.compute())
    # One region is the foreground of two classes.
    probs, label = torch.rand(4, 1, 5, 7, generator=torch.Generator().manual_seed(0)), (case.label_map > 0).long()
    region, two = FineGrainedOverlap(1, activation="sigmoid"), FineGrainedOverlap(2, background=0)
    region.update(probs, label)
    two.update(torch.cat([1 - probs, probs], 1), label)
    assert as_floats(region.compute()) == as_floats(two.compute())


def test_fine_grained_overlap_nothing_there_is_nan():
    metric = FineGrainedOverlap(2)
    with pytest.warns(UserWarning, match="was called before"):
        assert all(value.isnan() for value in metric.compute().values())
    assert metric.count == 0
    metric.update(torch.full((1, 2, 3), 0.5), torch.full((1, 3), -100))
    numbers = metric.compute()
    assert len(numbers) == 22
    assert all(value.isnan() and value.dtype == torch.float64 for value in numbers.values())
    metric.reset()
    assert metric.count == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fine_grained_overlap_in_every_type(dtype):
    probs = torch.tensor([[[0.75, 0.75, 0.25], [0.25, 0.25, 0.75]]], dtype=dtype)
    metric = FineGrainedOverlap(2)
    metric.update(probs, torch.tensor([[0, 1, 1]]))
    assert metric.compute()["dice_image"].item() == pytest.approx(2 / 3)


def test_fine_grained_overlap_ranks_without_an_image():
    ranks = [FineGrainedOverlap(2, sync_on_compute=False) for _ in range(2)]
    ranks[0].update(torch.tensor([[[0.9, 0.8, 0.3], [0.1, 0.2, 0.7]]]), torch.tensor([[0, 1, 1]]))
    expected = as_floats(ranks[0].compute())

    def gather(state, group=None):
        assert state.dtype == torch.int64
        assert state.shape[1:] == (3, 2)
        return [rank._all_counts() for rank in ranks]

    for rank in ranks:
        rank.sync(dist_sync_fn=gather, distributed_available=lambda: True)
        assert as_floats(fine_grained_overlap(*rank._all_counts().unbind(1))) == expected
        rank.unsync()
    assert ranks[1].count == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 1}, "`num_classes` of at least 2"),
        ({"num_classes": 3, "background": 3}, "`background` to be a class of 0 to 2"),
        ({"num_classes": 3, "worst_percent": 0}, "`worst_percent` to be a whole number of 1 to 100, but got 0"),
        ({"num_classes": 3, "worst_percent": 12.5}, "`worst_percent` to be a whole number of 1 to 100, but got 12.5"),
    ],
    ids=["classes", "background", "none", "fraction"],
)
def test_fine_grained_overlap_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FineGrainedOverlap(**kwargs)


def test_fine_grained_overlap_errors_of_counts():
    counts = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"of one shape \(N, C\), but got \(2, 3\), \(2, 3\), \(2, 2\)"):
        fine_grained_overlap(counts, counts, counts[:, :2])
    with pytest.raises(ValueError, match="`background` to be a class of 0 to 2"):
        fine_grained_overlap(counts, counts, counts, background=-1)
    with pytest.raises(ValueError, match="Expected `probs` with 4 classes, but got 3"):
        FineGrainedOverlap(4).update(torch.full((1, 3, 2), 1 / 3), torch.zeros(1, 2, dtype=torch.long))
