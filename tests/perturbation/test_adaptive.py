"""Levels of each image's own: what is seen of an image, when and how its level changes, and that none is lost."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from cases import each_dimension, make_case
from commands import run_ranks
from torch import nn

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses import ASLPLoss, CompoundLoss, DeepSupervisionLoss, SVLSLoss
from densecal.perturbation import (
    Accuracy,
    AdaptivePerturbation,
    CalibrationRule,
    ConfidenceRule,
    EntropyRule,
    ImageStatistics,
    LossRule,
    image_sums,
    perturb_labels,
)
from densecal.targets import OneHotTarget, SVLSTarget, TeacherTarget
from densecal.terms import CrossEntropy, Term

IDS = ["a", "b", "c", "d"]
RULES = {
    "calibration": CalibrationRule(eta=0.01, accuracy_weight=3.0),
    "entropy": EntropyRule(eta=0.01, accuracy_weight=3.0),
    "loss": LossRule(maximum=0.3),
    "confidence": ConfidenceRule(maximum=0.3),
}


def make_loss(*, ids=IDS, **options):
    target = AdaptivePerturbation(case_ids=ids, **{"rule": RULES["calibration"], "alpha": 0.1, "warmup": 0, "beta": 1.5, **options})
    return CompoundLoss(target, {"ce": {"weight": 1.0, "term": CrossEntropy()}})


def batches(epochs=3, spatial=(5, 7), **options):
    """Two batches an epoch, four draws of three of the images; each epoch other predictions."""
    for epoch in range(epochs):
        for step, ids in enumerate((["a", "c"], ["a", "b"])):
            case = make_case(spatial, seed=10 * epoch + step, **options)
            yield epoch, case, ids


def train(loss, accuracies=(0.9, 0.8, 0.85), **options):
    history, now = [], -1
    for epoch, case, ids in batches(**options):
        if epoch != now:
            if now >= 0:
                finish(loss, accuracies[now])
                history.append(loss.target.alpha.clone())
            loss.on_epoch(epoch, 3)
            now = epoch
        loss(case.logits, case.label_map, context={"case_id": ids})
    finish(loss, accuracies[now])
    return torch.stack([*history, loss.target.alpha.clone()])


def finish(loss, accuracy):
    if accuracy is not None:
        loss.on_validation({"accuracy": accuracy})
    loss.on_epoch_end()


def statistics_in_loops(case, image, q=None):
    """(sum of CE, of -sum log p, of confidence, number) over an image's valid pixels."""
    totals = [0.0] * 4
    p = case.logits.softmax(1).clamp(1e-7, 1 - 1e-7)
    for x in torch.cartesian_prod(*map(torch.arange, case.label_map.shape[1:])).reshape(-1, case.label_map.ndim - 1).tolist():
        label = case.label_map[(image, *x)].item()
        if label == DEFAULT_IGNORE_INDEX:
            continue
        probs = [p[(image, k, *x)].item() for k in range(p.shape[1])]
        target = [float(k == label) for k in range(len(probs))] if q is None else [q[(image, k, *x)].item() for k in range(len(probs))]
        totals[0] -= sum(t * math.log(pk) for t, pk in zip(target, probs, strict=True))
        totals[1] -= sum(math.log(pk) for pk in probs)
        totals[2] += max(probs)
        totals[3] += 1
    return totals


def next_level(name, alpha, ce, cal, confidence, k, beta, last, best):
    push = (cal - k * ce) / ((k - 1) * beta)
    new = {
        "calibration": alpha + 0.01 * (push + 3.0 * min((1 - last) - beta * alpha, 0)),
        "entropy": alpha + 0.01 * (push + 3.0 * min(last - best, 0)),
        "loss": 0.3 * (1 - math.exp(-ce)) / beta,
        "confidence": 0.3 * (1 - confidence) / (1 - 1 / k) / beta,
    }[name]
    if new < 0:
        return 0.0
    return new if new < 0.5 / beta else 0.5 / beta - 0.01


@each_dimension
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("label_target", [OneHotTarget, SVLSTarget], ids=["one_hot", "svls"])
def test_levels_match_the_loops(spatial, name, label_target):
    """Three classes, ignored pixels, an image drawn twice in an epoch and one never."""
    accuracies, levels, best = (0.9, 0.8, 0.85), dict.fromkeys(IDS, 0.1), 0.0
    expected = []
    for epoch in range(3):
        best = max(best, accuracies[epoch])
        sums = {}
        for e, case, ids in batches(spatial=spatial):
            if e == epoch:
                q = label_target()(case.label_map, 3, dtype=torch.float64).probs
                for image, case_id in enumerate(ids):
                    found = statistics_in_loops(case, image, q)
                    sums[case_id] = [a + b for a, b in zip(sums.get(case_id, [0.0] * 4), found, strict=True)]
        for case_id, (*values, count) in sums.items():
            levels[case_id] = next_level(name, levels[case_id], *(v / count for v in values), 3, 1.5, accuracies[epoch], best)
        expected.append(list(levels.values()))
    history = train(make_loss(rule=RULES[name], alpha=0.1, label_target=label_target()), accuracies, spatial=spatial)
    torch.testing.assert_close(history, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert (history[:, 3] == torch.tensor(0.1)).all()
    assert history[0, 0] != history[1, 0]


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_push_is_the_derivative_of_the_loss(num_classes):
    case = make_case((5, 7), num_classes=num_classes)
    target = OneHotTarget()(case.label_map, num_classes, dtype=torch.float64)
    share = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss = torch.where(target.valid, -(perturb_labels(target.one_hot, share) * case.logits.log_softmax(1)).sum(1), 0.0)
    loss[0].sum().backward()
    ce, cal, _, count = image_sums(case.logits, target.one_hot, target.valid)[0]
    seen = ImageStatistics((ce / count)[None], (cal / count)[None], torch.ones(1), num_classes)
    before = torch.zeros(1, dtype=torch.float64)
    pushed = CalibrationRule(eta=1.0, accuracy_weight=0.0)(before, seen, beta=0.5, accuracy=Accuracy(0.9, 0.9))
    assert share.grad is not None
    torch.testing.assert_close(pushed[0], share.grad / count / 0.5)  # ds = beta d alpha, and the rule has 1 / beta


def test_two_classes_push_as_one_channel():
    case = make_case((5, 7), num_classes=1, ignored=0.0)
    y = torch.randint(0, 2, (2, 1, 5, 7)).double()
    both, valid = torch.cat([torch.zeros_like(case.logits), case.logits], 1), torch.ones(2, 5, 7, dtype=torch.bool)
    torch.testing.assert_close(image_sums(both, torch.cat([1 - y, y], 1), valid), image_sums(case.logits, y, valid, activation="sigmoid"))
    p = case.logits.sigmoid()
    bce, cal = nn.functional.binary_cross_entropy(p, y, reduction="none"), -(p * (1 - p)).log()
    torch.testing.assert_close(image_sums(case.logits, y, valid, activation="sigmoid")[:, 0], bce.flatten(1).sum(1))
    torch.testing.assert_close(image_sums(case.logits, y, valid, activation="sigmoid")[:, 1], cal.flatten(1).sum(1))


def test_levels_stay_between_their_bounds():
    """Down to 0 where labels are contradicted; from the upper bound on a step back, as published, and no other value is moved."""
    loss = make_loss(rule=CalibrationRule(eta=1.0, accuracy_weight=0.0), beta=2.0)
    for margin, expected in ((-9.0, 0.0), (9.0, 0.24), (0.1, 0.05)):  # push of +-margin / 2
        loss.target.alpha.zero_()
        logits = torch.zeros(1, 2, 4)
        logits[:, 0] = margin
        loss(logits, torch.zeros(1, 4, dtype=torch.long), context={"case_id": ["a"]})
        finish(loss, 0.5)
        assert loss.target.alpha.tolist() == pytest.approx([expected, 0, 0, 0], abs=1e-6)


def test_ignored_pixels_leave_no_trace():
    case = make_case((5, 7))
    clean, dirty = make_loss(), make_loss()
    clean(case.logits, case.label_map, context={"case_id": ["a", "b"]})
    dirty(torch.where(case.valid.unsqueeze(1), case.logits, torch.nan), case.label_map, context={"case_id": ["a", "b"]})
    assert torch.equal(clean.target._sums, dirty.target._sums)
    nothing = make_loss(alpha=0.1, rule=LossRule())
    label_map = case.label_map.clone()
    label_map[0] = DEFAULT_IGNORE_INDEX
    nothing(case.logits, label_map, context={"case_id": ["a", "b"]})
    nothing.on_epoch_end()
    assert nothing.target.alpha[0] == 0.1
    assert nothing.target.alpha[1] != 0.1


# When.


def test_warmup_counts_epochs():
    history = train(make_loss(warmup=2))
    assert (history[:2] == torch.tensor(0.1)).all()
    assert (history[2, :3] != torch.tensor(0.1)).all()


@pytest.mark.parametrize(
    ("accuracies", "same"), [((0.9, None, 0.85), (0.9, 0.9, 0.85)), ((0.9, math.nan, None), (0.9, 0.9, 0.9))], ids=["every-second", "nan"]
)
def test_the_last_validation_counts_however_long_ago(accuracies, same):
    assert torch.equal(train(make_loss(), accuracies), train(make_loss(), same))
    assert not torch.equal(train(make_loss(), same), train(make_loss(), (0.9, 0.3, 0.3)))


def test_without_a_validation_only_rules_of_the_image_change_levels():
    start = torch.tensor(0.1)
    assert (train(make_loss(), (None, None, None)) == start).all()
    late = train(make_loss(), (None, 0.8, 0.85))
    assert (late[0] == start).all()
    assert (late[1] != start).any()
    assert (train(make_loss(rule=ConfidenceRule()), (None, None, None))[0] != start).any()
    assert make_loss().needs_validation
    assert make_loss(rule=LossRule()).needs_validation is False
    assert SVLSLoss().needs_validation is False


def test_a_loop_without_the_end_of_epochs_is_caught_up_with():
    told, untold = make_loss(), make_loss()
    for loss in (told, untold):
        for epoch, case, ids in list(batches())[:2]:
            loss.on_epoch(epoch, 3)
            loss(case.logits, case.label_map, context={"case_id": ids})
            loss.on_validation({"accuracy": 0.9})
            if loss is told:
                loss.on_epoch_end()
    assert not torch.equal(untold.target.alpha, told.target.alpha)
    untold.on_epoch(1, 3)
    told.on_epoch(1, 3)
    assert torch.equal(untold.target.alpha, told.target.alpha)


def test_evaluation_shows_nothing():
    loss = make_loss().eval()
    _, case, _ = next(batches())
    loss(case.logits, case.label_map, context={"case_id": ["x", "y"]})
    assert not loss.target._sums.any()


@pytest.mark.parametrize("sizes", [(8, 4), (8, 8)], ids=["coarser", "auxiliary"])
def test_deep_supervision_shows_the_first_output(sizes):
    torch.manual_seed(0)
    levels = [torch.randn(2, 3, size, size) for size in sizes]
    label_map, context = torch.randint(0, 3, (2, 8, 8)), {"case_id": ["a", "b"]}
    one, deep = make_loss(), make_loss()
    one(levels[0], label_map, context=context)
    for call in (DeepSupervisionLoss(deep), DeepSupervisionLoss(deep).terms):
        deep.target._sums.zero_()
        call(levels, label_map, context=context)
        assert torch.equal(deep.target._sums, one.target._sums)


class Watcher(Term):
    """Remembers what it was shown."""

    wants_training_logits = True

    def __init__(self):
        super().__init__()
        self.seen, self.ended = [], 0

    def forward(self, logits, target, *, context=None):
        return logits.mean()

    def on_batch(self, logits, target, *, context=None):
        self.seen.append((tuple(logits.shape), torch.is_grad_enabled(), context))

    def on_epoch_end(self):
        self.ended += 1

    def numbers(self):
        return {"seen": float(len(self.seen))}


def test_terms_are_shown_batches_as_well():
    watcher = Watcher()
    loss = CompoundLoss(OneHotTarget(), {"watcher": {"weight": 1.0, "term": watcher}})
    deep = DeepSupervisionLoss(loss)
    levels = [torch.randn(2, 3, size, size, requires_grad=True) for size in (8, 4)]
    deep(levels, torch.zeros(2, 8, 8, dtype=torch.long)).backward()
    loss.eval()
    loss(levels[0], torch.zeros(2, 8, 8, dtype=torch.long))
    deep.on_epoch_end()
    assert watcher.seen == [((2, 3, 8, 8), False, {})]
    assert (watcher.ended, loss.numbers()) == (1, {"seen": 1.0})


def test_hooks_go_through_targets_around_it():
    """What a teacher adds to the labels is no part of what is perturbed."""
    inner, outer = make_loss(), make_loss()
    outer.replace_target(TeacherTarget(mix=0.5, label_target=outer.target))
    assert outer.needs == ("teacher_logits", "case_id")
    for epoch, case, ids in batches():
        for loss in (inner, outer):
            loss.on_epoch(epoch, 3)
            loss(case.logits, case.label_map, context={"case_id": ids, "teacher_logits": case.logits.flip(0)})
            finish(loss, 0.9)
    levels = inner.case_levels()
    assert outer.case_levels() == levels
    assert outer.numbers() == inner.numbers()
    values = list(levels["perturbation"].values())
    assert list(levels["perturbation"]) == IDS
    assert inner.numbers()["perturbation_mean"] == pytest.approx(sum(values) / 4)
    assert (inner.numbers()["perturbation_min"], inner.numbers()["perturbation_max"]) == (min(values), max(values))


# State.


def through_a_file(loss):
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_is_of_names_not_of_places():
    loss = make_loss()
    train(loss)
    other = make_loss(ids=["new", "c", "a"], alpha=0.07)
    other.load_state_dict(through_a_file(loss))
    old, now = loss.case_levels()["perturbation"], other.case_levels()["perturbation"]
    assert now == {"new": pytest.approx(0.07), "c": old["c"], "a": old["a"]}
    assert len({0.0, *old.values()}) == 5


@pytest.mark.parametrize("cut", [1, 2, 3], ids=["within-an-epoch", "between", "within-the-next"])
def test_training_goes_on_from_a_state_to_the_same_levels(cut):
    whole, half = make_loss(), make_loss()
    everything = list(batches(epochs=2))

    def run(loss, steps):
        for step in steps:
            epoch, case, ids = everything[step]
            if step % 2 == 0:
                loss.on_epoch(epoch, 2)
            loss(case.logits, case.label_map, context={"case_id": ids})
            if step % 2 == 1:
                loss.on_validation({"accuracy": 0.9 - 0.1 * epoch})

    run(whole, range(4))
    run(half, range(cut))
    resumed = make_loss()
    resumed.load_state_dict(through_a_file(half))
    run(resumed, range(cut, 4))
    for loss in (whole, resumed):
        loss.on_epoch_end()
    assert torch.equal(resumed.target.alpha, whole.target.alpha)
    assert (whole.target.alpha[:3] != torch.tensor(0.1)).all()


def test_levels_move_with_the_module_and_its_copies():
    loss = make_loss()
    train(loss)
    assert torch.equal(copy.deepcopy(loss).target.alpha, loss.target.alpha)
    assert torch.equal(loss.double().target.alpha, loss.target.alpha)
    assert loss.target.alpha.dtype == torch.float64


class Step(nn.Module):
    """A network of three numbers and its loss."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1, dtype=torch.float64))
        self.loss = ASLPLoss(case_ids=["a", "b", "c", "d", "e"], warmup=1, eta=0.01, accuracy_weight=3.0)
        self.loss.target.alpha.fill_(0.1)

    def forward(self, logits, labels, names):
        return self.loss(self.scale * logits, labels, context={"case_id": names})


def fit(step, model, rank=0, world=1):
    """Four epochs of two batches, of which each process has its part."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(4):
        step.loss.on_epoch(epoch, 4)
        for batch, names in enumerate((["a", "b", "c", "d"], ["e", "a", "c", "a"])):
            case = make_case((5, 7), batch=4, ignored=0.0, seed=10 * epoch + batch)
            mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
            optimizer.zero_grad()
            model(case.logits[mine], case.label_map[mine], names[mine]).backward()
            optimizer.step()
        step.loss.on_validation({"accuracy": 0.9 - 0.05 * epoch})
        step.loss.on_epoch_end()
    return {"alpha": step.loss.target.alpha, "scale": step.scale.detach()}


_RANK = """
import torch
from perturbation.test_adaptive import Step, fit
from torch.nn.parallel import DistributedDataParallel

step = Step()
torch.save(fit(step, DistributedDataParallel(step), rank, 2), f"{folder}/{rank}.pt")  # which broadcasts the buffers of rank 0
"""


def test_two_processes_come_to_the_levels_of_one(tmp_path):
    """The same batches, split: trained by DistributedDataParallel, with images that one process sees, both, or one of them twice."""
    run_ranks(_RANK, tmp_path)
    step = Step()
    one = fit(step, step)
    two = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert one["alpha"].unique().numel() == 5
    assert not (one["alpha"] == 0.1).any()
    assert torch.equal(two[0]["alpha"], two[1]["alpha"])
    for rank in two:
        torch.testing.assert_close(rank["alpha"], one["alpha"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(rank["scale"], one["scale"])


# What is refused.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: make_loss(ids=[]), ValueError, "name each training image once, but got none"),
        (lambda: make_loss(ids=["a", "b", "a"]), ValueError, "name each training image once, but got 'a' twice"),
        (lambda: make_loss(alpha=0.25, beta=2.0), ValueError, r"Expected `alpha` in \[0, 1 / \(2 beta\)\) = \[0, 0.25\)"),
        (lambda: make_loss(warmup=-1), ValueError, "Expected `warmup` of 0 epochs or more"),
        (lambda: make_loss(rule="calibration"), TypeError, "Expected `rule` to be a densecal.perturbation.LevelRule, but got str"),
        (lambda: CalibrationRule(eta=0.0), ValueError, "Expected `eta` to be greater than 0"),
        (lambda: EntropyRule(accuracy_weight=-1.0), ValueError, "Expected `accuracy_weight` to be 0 or greater"),
        (lambda: EntropyRule(tolerance=-0.1), ValueError, r"Expected `tolerance` in \[0, 1\)"),
        (lambda: LossRule(maximum=0.5), ValueError, r"Expected `maximum` in \[0, 0.5\), but got 0.5"),
        (lambda: ConfidenceRule(maximum=-0.1), ValueError, r"Expected `maximum` in \[0, 0.5\)"),
    ],
    ids=["no-ids", "twice", "alpha", "warmup", "rule", "eta", "weight", "tolerance", "loss-maximum", "confidence-maximum"],
)
def test_options_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_unknown_images_are_named():
    loss, (_, case, _) = ASLPLoss(case_ids=IDS), next(batches())
    with pytest.raises(ValueError, match="Expected images out of the 4 that `case_ids` names, but got 'x'"):
        loss(case.logits, case.label_map, context={"case_id": ["a", "x"]})
    with pytest.raises(ValueError, match="Expected 'case_id' to name the 2 images of the batch, but got 1 names"):
        loss(case.logits, case.label_map, context={"case_id": ["a"]})
    with pytest.raises(ValueError, match="Expected the side input 'case_id', which AdaptivePerturbation needs"):
        loss(case.logits, case.label_map)


@pytest.mark.gpu
def test_gpu_and_cpu_agree():
    here, there = make_loss(), make_loss().cuda()
    for epoch, case, ids in batches(dtype=torch.float32):
        for loss, device in ((here, "cpu"), (there, "cuda")):
            loss.on_epoch(epoch, 3)
            loss(case.logits.to(device), case.label_map.to(device), context={"case_id": ids})
            finish(loss, 0.9)
    torch.testing.assert_close(there.target.alpha.cpu(), here.target.alpha)


def test_file_names_of_monai_are_names_of_images():
    monai_data = pytest.importorskip("monai.data")
    items = [{"label": monai_data.MetaTensor(torch.zeros(1, 4, 4), meta={"filename_or_obj": f"{name}.nii.gz"})} for name in "ab"]
    labels, logits = monai_data.list_data_collate(items)["label"], torch.randn(2, 3, 4, 4)
    loss = make_loss(ids=["b.nii.gz", "a.nii.gz"], rule=LossRule())
    loss(logits, labels, context={"case_id": labels.meta["filename_or_obj"]})
    loss.on_epoch_end()
    expected = make_loss(ids=["b", "a"], rule=LossRule())
    expected(logits, torch.zeros(2, 4, 4, dtype=torch.long), context={"case_id": ["a", "b"]})
    expected.on_epoch_end()
    assert torch.equal(loss.target.alpha, expected.target.alpha)
