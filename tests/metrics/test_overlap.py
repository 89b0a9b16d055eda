"""Dice and Jaccard per case and class."""

import pytest
import torch
from cases import each_dimension, make_case

from densecal.metrics import DiceScore, JaccardIndex, dice_score, jaccard_index


def as_probs(label_map, num_classes):
    return torch.nn.functional.one_hot(label_map, num_classes).movedim(-1, 1).float()


def test_dice_score_and_jaccard_index_by_hand():
    # predicted 0 1 1 2 2, there 0 1 2 2 -, the last ignored
    probs = as_probs(torch.tensor([[0, 1, 1, 2, 2]]), 4)
    label = torch.tensor([[0, 1, 2, 2, -100]])
    expected = torch.tensor([[1, 2 * 1 / (2 + 1), 2 * 1 / (1 + 2), torch.nan]], dtype=torch.float64)
    torch.testing.assert_close(dice_score(probs, label), expected, equal_nan=True)
    torch.testing.assert_close(jaccard_index(probs, label), torch.tensor([[1, 1 / 2, 1 / 2, torch.nan]], dtype=torch.float64), equal_nan=True)


@each_dimension
def test_dice_score_equals_a_loop_and_gives_the_jaccard_index(spatial):
    case = make_case(spatial, num_classes=4)
    probs = case.logits.softmax(1)
    dice = dice_score(probs, case.label_map)
    for n in range(2):
        for c in range(4):
            predicted, there = ((m[n] == c) & case.valid[n] for m in (probs.argmax(1), case.label_map))
            size = int(predicted.sum() + there.sum())
            expected = 2 * int((predicted & there).sum()) / size if size else float("nan")
            assert dice[n, c].item() == pytest.approx(expected, nan_ok=True)
    torch.testing.assert_close(jaccard_index(probs, case.label_map), dice / (2 - dice), equal_nan=True)


def test_dice_score_equals_monai():
    from monai.metrics import DiceMetric

    case = make_case((9, 11), num_classes=4, ignored=0.0)
    one_hot = as_probs(case.logits.argmax(1), 4)
    theirs = DiceMetric(include_background=True, reduction="none")
    theirs(y_pred=one_hot, y=as_probs(case.label_map, 4))
    torch.testing.assert_close(dice_score(case.logits.softmax(1), case.label_map).float(), theirs.aggregate())


def test_dice_score_soft_reference_takes_the_largest_share():
    case = make_case((5, 7))
    label_map = case.soft_labels.argmax(1).masked_fill(~case.valid, -100)
    assert torch.equal(dice_score(case.logits.softmax(1), case.soft_labels), dice_score(case.logits.softmax(1), label_map))


@pytest.mark.parametrize("metric_class", [DiceScore, JaccardIndex], ids=["dice", "iou"])
def test_overlap_metrics_mean_over_cases_leaves_out_what_is_undefined(metric_class):
    function = dice_score if metric_class is DiceScore else jaccard_index
    label = torch.tensor([[0, 1, 1, 2], [0, 1, 1, 1], [0, 0, 0, 0]])
    probs = as_probs(torch.tensor([[0, 1, 0, 2], [0, 1, 1, 0], [0, 0, 0, 0]]), 3)
    scores = function(probs, label)
    assert scores[1, 2].isnan()
    assert scores[2, 1:].isnan().all()
    macro, per_class = metric_class(3), metric_class(3, average="none")
    for i in range(3):
        macro.update(probs[i : i + 1], label[i : i + 1])
    per_class.update(probs, label)
    torch.testing.assert_close(macro.compute(), (scores[0, 1:].mean() + scores[1, 1]) / 2)
    assert macro.count == 2
    torch.testing.assert_close(per_class.compute(), scores.nanmean(0))
    assert per_class.class_count.tolist() == [3, 2, 1]


def test_overlap_metrics_nothing_there_is_nan():
    metric = DiceScore(2)
    metric.update(as_probs(torch.tensor([[0, 0]]), 2), torch.tensor([[0, -100]]))
    assert metric.compute().isnan()
    assert metric.count == 0


def regions_case(spatial, *, soft=False, regions=3):
    """Probabilities and 0/1 or soft maps of overlapping regions, with ignored pixels."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(2, regions, *spatial, generator=generator)
    label = torch.rand(2, regions, *spatial, generator=generator)
    label = label if soft else (label > 0.5).long()
    valid = torch.rand(2, *spatial, generator=generator) > 0.2
    return probs, label.masked_fill(~valid.unsqueeze(1), -100), valid


@each_dimension
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_dice_score_of_regions_equals_a_loop(spatial, soft):
    probs, label, valid = regions_case(spatial, soft=soft)
    dice, iou = dice_score(probs, label, activation="sigmoid"), jaccard_index(probs, label, activation="sigmoid")
    assert dice.shape == (2, 3)
    for n in range(2):
        for r in range(3):
            predicted, there = (probs[n, r] > 0.5) & valid[n], (label[n, r] > 0.5) & valid[n]
            both, either = int((predicted & there).sum()), int((predicted | there).sum())
            assert dice[n, r].item() == pytest.approx(2 * both / (both + either))
            assert iou[n, r].item() == pytest.approx(both / either)


def test_dice_score_one_sigmoid_channel_is_the_foreground_of_two_classes():
    probs, label, valid = regions_case((5, 7), regions=1)
    two = torch.cat([1 - probs, probs], dim=1)
    expected = dice_score(two, label.squeeze(1))[:, 1:]
    assert torch.equal(dice_score(probs, label, activation="sigmoid"), expected)
    assert torch.equal(dice_score(probs, label.squeeze(1), activation="sigmoid", mask=valid), expected)


def test_dice_score_a_half_is_not_inside():
    assert dice_score(torch.tensor([[[0.5, 0.6]]]), torch.tensor([[[1, 1]]]), activation="sigmoid").item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric_class", [DiceScore, JaccardIndex], ids=["dice", "iou"])
def test_overlap_metrics_of_regions_mean_over_all_of_them(metric_class):
    function = dice_score if metric_class is DiceScore else jaccard_index
    probs, label, _ = regions_case((5, 7))
    label[0, 1], probs[0, 1] = 0, 0.0  # the second region is nowhere in the first case
    scores = function(probs, label, activation="sigmoid")
    assert scores[0, 1].isnan()
    macro, per_region = metric_class(3, activation="sigmoid"), metric_class(3, activation="sigmoid", average="none")
    for i in range(2):
        macro.update(probs[i : i + 1], label[i : i + 1])
        per_region.update(probs[i : i + 1], label[i : i + 1])
    torch.testing.assert_close(macro.compute(), (scores[0, [0, 2]].mean() + scores[1].mean()) / 2)
    torch.testing.assert_close(per_region.compute(), scores.nanmean(0))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 1}, "`num_classes` of at least 2"),
        ({"num_classes": 2, "background": 2}, "`background` to be a class"),
        ({"num_classes": 2, "average": "micro"}, "`average` to be one of"),
        ({"num_classes": 2, "activation": "tanh"}, "`activation` to be one of"),
        ({"num_classes": 0, "activation": "sigmoid"}, "`num_classes` of at least 1 region"),
        ({"num_classes": 2, "activation": "sigmoid", "background": 1}, "Expected no `background` with activation='sigmoid'"),
    ],
    ids=["classes", "background", "average", "activation", "regions", "regions-background"],
)
def test_overlap_metrics_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DiceScore(**kwargs)
