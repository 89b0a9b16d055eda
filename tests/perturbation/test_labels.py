"""Perturbed labels at one level: the formula, one family from hard to smoothed to drawn, any target and term, training mode alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import each_dimension, make_case

from densecal.losses import CompoundLoss, CrossEntropyLoss, LabelSmoothingLoss
from densecal.perturbation import AdaptivePerturbation, StochasticPerturbation, drawn_share, perturb_labels
from densecal.schedules import Linear, TwoStage
from densecal.targets import LabelSmoothingTarget, OneHotTarget, RaterMeanTarget, SVLSTarget
from densecal.terms import SCBCE, CrossEntropy, DiceSemimetric, KLDivergence


def with_terms(target):
    return CompoundLoss(target, {"ce": {"weight": 0.5, "term": CrossEntropy()}, "dml": {"weight": 0.5, "term": DiceSemimetric()}})


def ce(target, **options):
    return CompoundLoss(target, {"ce": {"weight": 1.0, "term": CrossEntropy(**options)}})


def adaptive(**options):
    perturbation = AdaptivePerturbation(case_ids=["a", "b", "c"], **options)
    perturbation.alpha.copy_(torch.tensor([0.2, 0.0, 0.05]))
    return perturbation


MAKERS = {"stochastic": lambda **options: StochasticPerturbation(alpha=0.2, **options), "adaptive": adaptive}
CONTEXT = {"case_id": ["c", "a"]}
each_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


@each_dimension
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_formula_in_loops(spatial, activation):
    case = make_case(spatial, num_classes=4)
    q, share = case.logits.softmax(1), torch.tensor([0.3, 0.1], dtype=torch.float64).reshape(2, *[1] * (len(spatial) + 1))
    made = perturb_labels(q, share, activation=activation)
    for n in range(2):
        s = share[n].item()
        for c in range(4):
            given = sum(q[n, k] * s / 3 for k in range(4) if k != c) if activation == "softmax" else s * (1 - q[n, c])
            torch.testing.assert_close(made[n, c], (1 - s) * q[n, c] + given)


def test_two_classes_are_the_binary_formula():
    y = torch.tensor([[[1.0, 0.0, 0.25]]])
    both = perturb_labels(torch.cat([1 - y, y], 1), 0.6)
    binary = perturb_labels(y, 0.6, activation="sigmoid")
    torch.testing.assert_close(both[:, 1:], binary)
    torch.testing.assert_close(binary, (1 - 2 * 0.6) * y + 0.6)


def test_hard_smoothed_and_perturbed_labels_are_one_family():
    case = make_case((5, 7))
    hard, smoothed = ce(StochasticPerturbation(alpha=0.0)), ce(StochasticPerturbation(alpha=1.0, beta=0.15))
    torch.testing.assert_close(hard(case.logits, case.label_map), CrossEntropyLoss()(case.logits, case.label_map))
    expected = LabelSmoothingLoss(smoothing=0.15, spread="others")(case.logits, case.label_map)
    torch.testing.assert_close(smoothed(case.logits, case.label_map), expected)
    torch.testing.assert_close(ce(StochasticPerturbation(alpha=0.075, beta=2.0))(case.logits, case.label_map), expected)


def test_levels_of_images_give_self_calibrating_cross_entropy():
    case = make_case((5, 7), num_classes=2)
    regions = torch.randint(0, 2, case.logits.shape)
    term = CompoundLoss(OneHotTarget(activation="sigmoid"), {"ce": {"weight": 1.0, "term": SCBCE(beta=2.0)}})
    expected = term(case.logits, regions, context={"perturbation": [0.05, 0.2]})
    torch.testing.assert_close(ce(adaptive(activation="sigmoid"))(case.logits, regions, context=CONTEXT), expected)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_mean_over_draws_is_the_expected_target(activation):
    """Cross-entropy at beta 2, where a drawn target leaves [0, 1]: of two images, each drawn or not."""
    case = make_case((5, 7), num_classes=2, ignored=0.0)
    label = case.label_map if activation == "softmax" else torch.randint(0, 2, case.logits.shape)
    expected = ce(StochasticPerturbation(alpha=0.2, activation=activation))(case.logits, label)
    drawn, mean = ce(StochasticPerturbation(alpha=0.2, expected=False, activation=activation)), 0.0
    for draw, weight in (([0.1, 0.1], 0.04), ([0.1, 0.9], 0.16), ([0.9, 0.1], 0.16), ([0.9, 0.9], 0.64)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, draw=draw, **__: torch.tensor(draw))
            mean = mean + weight * drawn(case.logits, label)
    torch.testing.assert_close(mean, expected)


def test_draws_are_one_per_image_and_follow_torchs_generator():
    perturbation, label = StochasticPerturbation(alpha=0.2, beta=1.0, expected=False), torch.zeros(400, 3, dtype=torch.long)
    torch.manual_seed(3)
    first = perturbation(label, 2).probs
    torch.manual_seed(3)
    assert torch.equal(perturbation(label, 2).probs, first)
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert (first == first[:, :, :1]).all()
    assert 50 < first[:, 1, 0].sum() < 110  # 80 of 400 in the mean, with standard deviation 8
    assert drawn_share(torch.tensor([0.5, 0.5]), 2.0, torch.tensor([0.5, 0.4999])).tolist() == [0.0, 2.0]


@each_kind
@each_dimension
@pytest.mark.parametrize("form", ["map", "soft"])
def test_any_term_of_perturbed_labels(make, spatial, form):
    case = make_case(spatial)
    logits = case.logits.requires_grad_()
    value = with_terms(make())(logits, case.label_map if form == "map" else case.soft_labels, context=CONTEXT)
    value.backward()
    assert value.isfinite()
    assert logits.grad.any()
    assert not logits.grad.movedim(1, -1)[~case.valid].any()
    dirty = torch.where(case.valid.unsqueeze(1), case.logits.detach(), torch.nan)
    assert torch.equal(with_terms(make())(dirty, case.label_map if form == "map" else case.soft_labels, context=CONTEXT), value)


@each_kind
def test_starts_from_any_target(make):
    """A distribution where valid, 0 elsewhere; class weights and absent classes count as for the labels themselves."""
    case = make_case((5, 7))
    for label_target in (None, SVLSTarget(), LabelSmoothingTarget(smoothing=0.3)):
        made = make(label_target=label_target)(case.label_map, 3, context=CONTEXT)
        start = (label_target or OneHotTarget())(case.label_map, 3)
        share = torch.tensor([0.1, 0.4]) if make is adaptive else torch.tensor([0.4, 0.4])
        expected = perturb_labels(start.probs, share.reshape(2, 1, 1, 1))
        torch.testing.assert_close(made.probs, torch.where(made.valid.unsqueeze(1), expected, 0.0))
        torch.testing.assert_close(made.probs.sum(1), made.valid.float())
        assert torch.equal(made.one_hot, start.one_hot)
        assert made.hard is start.hard


@each_kind
def test_single_foreground_channel_and_overlapping_regions(make):
    for channels in (1, 3):
        generator = torch.Generator().manual_seed(channels)
        logits = torch.randn(2, channels, 5, 7, generator=generator, requires_grad=True)
        regions = torch.randint(0, 2, (2, channels, 5, 7), generator=generator)
        regions[0, :, :2] = 255
        value = with_terms(make(activation="sigmoid", ignore_index=255))(logits, regions, context=CONTEXT)
        value.backward()
        assert value.isfinite()
        assert not logits.grad[0, :, :2].any()


@each_kind
def test_acts_in_training_alone(make):
    case = make_case((5, 7))
    loss = with_terms(make(label_target=SVLSTarget()))
    trained = loss(case.logits, case.label_map, context=CONTEXT)
    loss.eval()
    plain = with_terms(SVLSTarget())(case.logits, case.label_map)
    assert torch.equal(loss(case.logits, case.label_map, context={"case_id": ["of the", "validation"]}), plain)
    assert not torch.allclose(trained, plain)


@each_kind
def test_copies_half_precision_and_one_graph(make):
    torch._dynamo.reset()
    case = make_case((5, 7), dtype=torch.float32)
    loss = with_terms(make())
    expected = loss(case.logits, case.label_map, context=CONTEXT)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), torch.compile(copy.deepcopy(loss), fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(twin(case.logits, case.label_map, context=CONTEXT), expected)
    half = case.logits.bfloat16()
    torch.testing.assert_close(loss(half, case.label_map, context=CONTEXT), loss(half.float(), case.label_map, context=CONTEXT), rtol=1e-3, atol=1e-3)


@each_kind
def test_labels_are_perturbed_once(make):
    for label_target in (make(), RaterMeanTarget(label_target=make())):
        with pytest.raises(ValueError, match=r"labels that are perturbed once, but .* does so already\. Leave out one"):
            StochasticPerturbation(label_target=label_target)


def test_level_may_follow_a_schedule():
    perturbation = StochasticPerturbation(alpha=Linear(0.0, 0.2), beta=1.0, label_target=LabelSmoothingTarget(smoothing=TwoStage(0.1, 0.0)))
    assert perturbation.level.value == 0
    perturbation.on_epoch(4, 5)
    torch.testing.assert_close(perturbation(torch.tensor([[0]]), 2).probs.flatten(), torch.tensor([0.8, 0.2]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StochasticPerturbation(alpha=0.25), r"Expected `alpha` in \[0, 0\.25\], but got 0\.25"),
        (lambda: StochasticPerturbation(alpha=1.5, beta=0.1), r"Expected `alpha` in \[0, 1\]"),
        (lambda: StochasticPerturbation(alpha=Linear(0.3, 0.0)), r"Expected `alpha` in \[0, 0\.25\]"),
        (lambda: StochasticPerturbation(beta=0.0), "Expected `beta` to be greater than 0"),
        (lambda: StochasticPerturbation(label_target=SVLSTarget(), activation="sigmoid"), "with activation='sigmoid'"),
        (lambda: perturb_labels(torch.zeros(1, 2, 1), 0.1, activation="tanh"), "Expected `activation`"),
    ],
    ids=["bound", "probability", "schedule", "beta", "activation", "unknown-activation"],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_logarithm_of_a_drawn_target_has_no_value():
    """What the docstring warns of."""
    loss = CompoundLoss(StochasticPerturbation(alpha=0.24, expected=False), {"kl": {"weight": 1.0, "term": KLDivergence()}})
    torch.manual_seed(0)
    assert not loss(torch.randn(50, 2, 3), torch.zeros(50, 3, dtype=torch.long)).isfinite()
