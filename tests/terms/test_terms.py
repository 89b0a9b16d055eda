"""Cross-entropy, overlap and neighbour penalty: arithmetic, loops, PyTorch, identities."""

import pytest
import reference
import torch
from cases import each_dimension, make_case
from torch.nn import functional as F

from densecal.targets import label_smoothing_target, neighbour_proportions_target, one_hot_target, svls_target
from densecal.terms import CrossEntropy, DiceSemimetric, JaccardMetric, NeighbourPenalty, Overlap

WEIGHTS = [0.5, 1.0, 3.0]


def hard(case, make=one_hot_target, **options):
    return make(case.label_map, 3, spatial_dims=case.label_map.ndim - 1, dtype=torch.float64, **options)


def soft(case):
    return one_hot_target(case.soft_labels, 3, spatial_dims=case.label_map.ndim - 1, dtype=torch.float64)


# --- cross-entropy ---


@each_dimension
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weighted"])
def test_cross_entropy_equals_pytorch_on_label_maps(spatial, smoothing, reduction, weights):
    case = make_case(spatial)
    value = CrossEntropy(class_weights=weights, reduction=reduction)(case.logits, hard(case, label_smoothing_target, smoothing=smoothing))
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    expected = F.cross_entropy(case.logits, case.label_map, weight=weight, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weighted"])
def test_cross_entropy_equals_pytorch_on_soft_labels(weights):
    case = make_case((5, 7), ignored=0.0)
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(
        CrossEntropy(class_weights=weights)(case.logits, soft(case)), F.cross_entropy(case.logits, case.soft_labels, weight=weight)
    )


@each_dimension
def test_cross_entropy_under_svls_matches_the_loops(spatial):
    case = make_case(spatial)
    target = hard(case, svls_target)
    expected = reference.cross_entropy(case.logits, target.probs, case.valid, WEIGHTS)
    mass = sum(WEIGHTS[label] for label in case.label_map[case.valid].tolist())
    assert CrossEntropy(class_weights=WEIGHTS)(case.logits, target).item() == pytest.approx(expected / mass, rel=1e-6)


def test_sigmoid_cross_entropy_equals_pytorch():
    case = make_case((5, 7), ignored=0.0)
    regions = (case.soft_labels > 0.4).long()
    target = one_hot_target(regions, 3, activation="sigmoid", spatial_dims=2, dtype=torch.float64)
    torch.testing.assert_close(CrossEntropy()(case.logits, target), F.binary_cross_entropy_with_logits(case.logits, regions.double()))


# --- overlap ---


@each_dimension
@pytest.mark.parametrize("region", ["batch", "image", "class"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.3, "beta": 0.7, "norm": "l2", "smooth": 1.0}, {"log": True, "gamma": 1.5}], ids=["dice", "tversky-l2", "log"]
)
def test_overlap_matches_the_loops(spatial, region, kind, options):
    case = make_case(spatial, num_classes=3)
    case.label_map[0][case.label_map[0] == 2] = 0  # a class that one image lacks
    target = hard(case) if kind == "hard" else soft(case)
    weights = {f"weight_{name}": float(name == region) for name in ("batch", "image", "class")}
    expected = reference.overlap_loss(
        case.logits.softmax(1),
        target.probs,
        case.valid,
        region=region,
        alpha=options.get("alpha", 0.5),
        beta=options.get("beta", 0.5),
        smooth=options.get("smooth", 1e-3),
        power=2 if options.get("norm") == "l2" else 1,
        log=options.get("log", False),
        gamma=options.get("gamma", 1.0),
        threshold=0.01 if kind == "hard" else None,
    )
    assert Overlap(**options, **weights)(case.logits, target).item() == pytest.approx(expected, rel=1e-9)


def test_dice_semimetric_of_hard_labels_is_soft_dice():
    case = make_case((5, 7))
    p, target = case.logits.softmax(1), hard(case)
    mask = case.valid.unsqueeze(1)
    dice = 2 * (p * target.probs).sum((0, 2, 3)) / ((p * mask).sum((0, 2, 3)) + target.probs.sum((0, 2, 3)))
    torch.testing.assert_close(DiceSemimetric(smooth=0.0)(case.logits, target), (1 - dice).mean())


def test_jaccard_metric_of_hard_labels_is_soft_jaccard():
    case = make_case((5, 7))
    p, target = case.logits.softmax(1), hard(case)
    both = (p * target.probs).sum((0, 2, 3))
    union = (p * case.valid.unsqueeze(1)).sum((0, 2, 3)) + target.probs.sum((0, 2, 3)) - both
    torch.testing.assert_close(JaccardMetric(smooth=0.0)(case.logits, target), (1 - both / union).mean())


@pytest.mark.parametrize("term", [JaccardMetric(), DiceSemimetric(norm="l2"), Overlap(log=True)], ids=["jml", "dml-l2", "log"])
def test_overlap_is_zero_at_prediction_equals_target_and_nowhere_else(term):
    case = make_case((5, 7), ignored=0.0)
    target = soft(case)
    assert abs(term(case.soft_labels.log(), target).item()) < 1e-9
    assert term(case.logits, target).item() > 0.01


def test_background_can_be_left_out():
    case = make_case((5, 7))
    without = DiceSemimetric(include_background=False)(case.logits, hard(case))
    weighted = DiceSemimetric(class_weights=[0.0, 1.0, 1.0])(case.logits, hard(case)) * 3 / 2
    torch.testing.assert_close(without, weighted)
    with pytest.raises(ValueError, match="A single foreground channel has no background"):
        DiceSemimetric(include_background=False)(torch.zeros(1, 1, 2), one_hot_target(torch.zeros(1, 1, 2), 1, activation="sigmoid"))


def test_image_without_a_valid_pixel_is_not_averaged():
    case = make_case((5, 7))
    case.label_map[1] = -100
    term = Overlap(weight_batch=0.0, weight_image=1.0, active="all")
    alone = one_hot_target(case.label_map[:1], 3, dtype=torch.float64)
    torch.testing.assert_close(term(case.logits, hard(case)), term(case.logits[:1], alone))


# --- neighbour penalty ---


@each_dimension
@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize("kernel", ["mean", "gaussian", "svls"])
def test_neighbour_penalty_matches_the_loops(spatial, distance, kernel):
    case = make_case(spatial)
    dims = len(spatial)
    plain = hard(case)
    shares = reference.neighbourhood(plain.one_hot, plain.valid, reference.window(kernel, [3] * dims, [1.0] * dims), "replicate")
    expected = reference.neighbour_penalty(case.logits, shares, case.valid, 1 if distance == "l1" else 2)
    assert NeighbourPenalty(distance=distance, kernel=kernel)(case.logits, hard(case)).item() == pytest.approx(expected, rel=1e-12)


def test_neighbour_penalty_is_zero_at_the_shares():
    case = make_case((5, 7))
    shares = neighbour_proportions_target(case.label_map, 3, dtype=torch.float64).probs
    assert NeighbourPenalty()(shares, hard(case)).item() == 0.0
    interior = shares.clamp_min(1e-300).log()
    assert NeighbourPenalty(acts_on="probs")(interior, hard(case)).item() < 1e-12


def test_neighbour_penalty_reads_the_labels_not_the_smoothed_target():
    case = make_case((5, 7))
    torch.testing.assert_close(NeighbourPenalty()(case.logits, hard(case, svls_target)), NeighbourPenalty()(case.logits, hard(case)))


def test_neighbour_penalty_reductions():
    case = make_case((5, 7))
    parts = {r: NeighbourPenalty(reduction=r)(case.logits, hard(case)) for r in ("mean", "sum", "none")}
    torch.testing.assert_close(parts["none"].sum(), parts["sum"])
    torch.testing.assert_close(parts["sum"] / case.valid.sum(), parts["mean"])


# --- all ---

TERMS = {
    "ce": CrossEntropy(class_weights=WEIGHTS),
    "jml": JaccardMetric(weight_batch=0.5, weight_image=0.25, weight_class=0.25),
    "dml-l2": DiceSemimetric(norm="l2", class_weights=WEIGHTS),
    "log": Overlap(log=True, gamma=2.0),
    "neighbour": NeighbourPenalty(),
    "neighbour-probs": NeighbourPenalty(acts_on="probs", distance="l2", kernel="svls"),
}


@pytest.mark.parametrize("kind", ["hard", "svls", "soft"])
@pytest.mark.parametrize("name", TERMS)
def test_gradient_is_right_and_zero_at_ignored_pixels(name, kind):
    case = make_case((2, 3), seed=3)
    target = {"hard": hard, "svls": lambda c: hard(c, svls_target), "soft": soft}[kind](case)
    logits = case.logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: TERMS[name](z, target), logits)
    TERMS[name](logits, target).backward()
    assert not case.valid.all()
    assert logits.grad is not None
    at_ignored = logits.grad.movedim(1, -1)[~case.valid]
    assert torch.equal(at_ignored, torch.zeros_like(at_ignored))


@pytest.mark.parametrize("name", ["ce", "jml", "neighbour"])
def test_class_permutation_leaves_the_value(name):
    case = make_case((5, 7))
    order = torch.tensor([2, 0, 1])
    term = {"ce": CrossEntropy(), "jml": JaccardMetric(), "neighbour": NeighbourPenalty()}[name]
    relabelled = torch.where(case.valid, order.argsort()[case.label_map.clamp_min(0)], -100)
    permuted = one_hot_target(relabelled, 3, dtype=torch.float64)
    torch.testing.assert_close(term(case.logits[:, order], permuted), term(case.logits, hard(case)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossEntropy(reduction="avg"), "Expected `reduction` to be one of"),
        (lambda: CrossEntropy(class_weights=[1.0, -1.0]), "Expected `class_weights` to be one number of 0 or more"),
        (lambda: Overlap(alpha=-1.0), "Expected `alpha` to be 0 or greater"),
        (lambda: Overlap(gamma=0.0), "Expected `gamma` to be greater than 0"),
        (lambda: Overlap(weight_batch=0.0), "but all are 0"),
        (lambda: Overlap(threshold=1.0), r"Expected `threshold` in \[0, 1\)"),
        (lambda: Overlap(active="some"), "Expected `active` to be one of"),
        (lambda: NeighbourPenalty(distance="l3"), "Expected `distance` to be one of"),
        (lambda: NeighbourPenalty(kernel="box"), "Expected `kernel` to be one of"),
        (
            lambda: CrossEntropy(class_weights=[1.0, 1.0])(torch.zeros(1, 3, 2), one_hot_target(torch.zeros(1, 2).long(), 3)),
            "for each of the 3 channels",
        ),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
