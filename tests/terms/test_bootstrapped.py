"""Bootstrapped cross-entropy: its target, its sample of losses, its state."""

import copy
import pickle

import pytest
import torch
from cases import each_dimension, make_case
from torch.nn import functional as F

from densecal.losses import CompoundLoss, CrossEntropyLoss
from densecal.ops import beta_mixture_posterior, fit_beta_mixture
from densecal.targets import OneHotTarget, one_hot_target
from densecal.terms import BootstrappedCrossEntropy, CrossEntropy

WEIGHTS = [0.5, 1.0, 3.0]
MIXTURE = torch.tensor([[2.0, 8.0, 0.7], [6.0, 2.0, 0.3]])


def fitted(**options):
    """A term with a mixture of its own; losses of 0 to 4 become 0 to 1."""
    term = BootstrappedCrossEntropy(**options)
    term.mixture.copy_(MIXTURE)
    term.bounds.copy_(torch.tensor([0.0, 4.0]))
    term.fitted.fill_(True)
    return term


def compound(term, activation="softmax"):
    return CompoundLoss(OneHotTarget(activation=activation), {"bootstrapped": {"weight": 1.0, "term": term}})


def targets(case, activation="softmax"):
    options = {"spatial_dims": case.label_map.ndim - 1, "dtype": torch.float64}
    soft = one_hot_target(case.soft_labels, 3, activation=activation, **options)
    return [soft] if activation == "sigmoid" else [one_hot_target(case.label_map, 3, **options), soft]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_before_the_first_fit_it_is_cross_entropy(activation):
    case = make_case((5, 7))
    for target in targets(case, activation):
        value = BootstrappedCrossEntropy(class_weights=WEIGHTS)(case.logits, target)
        torch.testing.assert_close(value, CrossEntropy(class_weights=WEIGHTS)(case.logits, target))


@each_dimension
@pytest.mark.parametrize("form", ["soft", "hard"])
def test_target_is_mixed_pixel_by_pixel(spatial, form):
    case = make_case(spatial)
    for target in targets(case):
        values = fitted(form=form, reduction="none")(case.logits, target)
        log_p, q = case.logits.log_softmax(1), target.probs
        losses = -(q * log_p).sum(1, keepdim=True)
        w = beta_mixture_posterior(losses / 4, MIXTURE)
        guess = log_p.exp() if form == "soft" else F.one_hot(log_p.argmax(1), 3).movedim(-1, 1)
        expected = (1 - w[:, 0]) * losses[:, 0] - w[:, 0] * (guess * log_p).sum(1)
        torch.testing.assert_close(values, torch.where(case.valid, expected, 0.0))


@pytest.mark.parametrize("form", ["soft", "hard"])
def test_sigmoid_channels_are_mixed_by_themselves(form):
    case = make_case((5, 7))
    (target,) = targets(case, "sigmoid")
    values = fitted(form=form, reduction="none")(case.logits, target)
    expected = 0.0
    for c in range(3):
        z, q = case.logits[:, c], target.probs[:, c]
        loss = F.binary_cross_entropy_with_logits(z, q, reduction="none")
        w, guess = beta_mixture_posterior(loss / 4, MIXTURE), z.sigmoid() if form == "soft" else (z > 0).double()
        expected = expected + F.binary_cross_entropy_with_logits(z, (1 - w) * q + w * guess, reduction="none")
    torch.testing.assert_close(values, torch.where(case.valid, expected, 0.0))


@pytest.mark.parametrize("form", ["soft", "hard"])
def test_gradient_is_that_of_a_fixed_target_and_zero_at_ignored_pixels(form):
    case = make_case((5, 7))
    for target in targets(case):
        logits = case.logits.clone().requires_grad_()
        fitted(form=form)(logits, target).backward()
        p = case.logits.softmax(1)
        w = beta_mixture_posterior(-(target.probs * p.log()).sum(1, keepdim=True) / 4, MIXTURE)
        guess = p if form == "soft" else F.one_hot(p.argmax(1), 3).movedim(-1, 1)
        expected = torch.where(case.valid.unsqueeze(1), p - ((1 - w) * target.probs + w * guess), 0.0) / case.valid.sum()
        torch.testing.assert_close(logits.grad, expected)
        assert logits.grad is not None
        assert not logits.grad.movedim(1, -1)[~case.valid].any()


def test_wrong_labels_get_a_large_weight():
    torch.manual_seed(0)
    label_map = torch.randint(0, 3, (4, 16, 16))
    logits = 3 * F.one_hot(label_map, 3).movedim(-1, 1).float() + torch.randn(4, 3, 16, 16)
    wrong = torch.rand(label_map.shape) < 0.3
    noisy = torch.where(wrong, (label_map + 1) % 3, label_map)
    term = BootstrappedCrossEntropy(form="hard", reduction="none")
    loss = compound(term)
    loss(logits, noisy)
    term.on_epoch(1, 10)
    assert term.fitted
    assert 0.15 < term.mixture[1, 2] < 0.35  # the share of wrong labels, of which the largest losses were trimmed
    plain = CrossEntropyLoss(reduction="none")(logits, noisy)
    assert loss(logits, noisy)[wrong].mean() < 0.3 * plain[wrong].mean()
    assert loss(logits, noisy)[~wrong].mean() > 0.8 * plain[~wrong].mean()


def test_fit_is_that_of_the_trimmed_losses():
    case = make_case((9, 11), batch=4)
    term = BootstrappedCrossEntropy(num_samples=512, capacity=512)
    term(case.logits, targets(case)[0])
    losses = term.losses[term.keys >= 0].double()
    low, high = losses.quantile(0.05), losses.quantile(0.95)
    term.on_epoch(1, 10)
    inside = losses[(losses >= low) & (losses <= high)]
    torch.testing.assert_close(term.mixture, fit_beta_mixture((inside - low) / (high - low)).float())
    torch.testing.assert_close(term.bounds, torch.stack([low, high]).float())
    assert (term.keys == -1).all()


def test_sample_holds_losses_of_valid_pixels_of_the_whole_epoch():
    torch.manual_seed(0)
    term = BootstrappedCrossEntropy(num_samples=64, capacity=128)
    for step in range(40):
        # Step s has the loss log(1 + exp(s)) at its valid pixel; the ignored one would have that of step 50.
        logits = torch.tensor([[[float(step), 50.0], [0.0, 0.0]]])
        term(logits, one_hot_target(torch.tensor([[1, -100]]), 2))
    assert (term.keys >= 0).all()
    steps = term.losses.double().expm1().log().round()
    assert steps.max() <= 39
    early = (steps < 20).double().mean().item()
    assert 0.35 < early < 0.65  # 5 standard deviations of a fair half would be 0.28 to 0.72


def test_warm_up_and_too_few_losses_leave_it_plain():
    case = make_case((5, 7))
    term = BootstrappedCrossEntropy(warm_up=3)
    for epoch in range(1, 4):
        term(case.logits, targets(case)[0])
        term.on_epoch(epoch, 10)
        assert bool(term.fitted) == (epoch == 3)
    mixture = term.mixture.clone()
    term.on_epoch(4, 10)  # nothing collected
    assert torch.equal(term.mixture, mixture)
    few = BootstrappedCrossEntropy(num_samples=20)
    few(case.logits, targets(case)[0])
    few.on_epoch(1, 10)
    assert not few.fitted


def test_all_losses_equal_leave_it_plain():
    term = BootstrappedCrossEntropy()
    term(torch.zeros(1, 2, 9), one_hot_target(torch.zeros(1, 9, dtype=torch.long), 2))
    term.on_epoch(1, 10)
    assert not term.fitted


def test_evaluation_collects_nothing_and_the_seed_says_what_is_drawn():
    case = make_case((5, 7))
    term = BootstrappedCrossEntropy().eval()
    term(case.logits, targets(case)[0])
    assert (term.keys == -1).all()
    drawn = []
    for _ in range(2):
        term = BootstrappedCrossEntropy()
        torch.manual_seed(5)
        term(case.logits, targets(case)[0])
        drawn.append(term.losses)
    assert torch.equal(*drawn)


def test_ignored_pixels_leave_no_trace():
    case = make_case((5, 7))
    states = []
    for logits in (case.logits, torch.where(case.valid.unsqueeze(1), case.logits, torch.nan)):
        term = fitted()
        torch.manual_seed(0)
        value = compound(term)(logits, case.label_map)
        term.on_epoch(2, 10)
        states.append([value, *term.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_no_valid_pixel_is_zero_on_the_graph():
    case = make_case((5, 7), ignored=1.1)
    logits = case.logits.requires_grad_()
    term = fitted()
    value = compound(term)(logits, case.label_map)
    value.backward()
    assert value.item() == 0.0
    assert (term.keys == -1).all()


def test_state_survives_checkpoints_and_copies():
    case = make_case((5, 7), dtype=torch.float32)
    loss = compound(BootstrappedCrossEntropy())
    loss(case.logits, case.label_map)
    resumed = compound(BootstrappedCrossEntropy())
    resumed.load_state_dict(loss.state_dict())
    twins = [resumed, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    loss.on_epoch(1, 10)
    expected = loss(case.logits, case.label_map)
    assert expected != CrossEntropyLoss()(case.logits, case.label_map)
    for twin in twins:
        twin.on_epoch(1, 10)
        assert torch.equal(twin(case.logits, case.label_map), expected)


@pytest.mark.parametrize("form", ["soft", "hard"])
def test_compiles_into_one_graph(form):
    torch._dynamo.reset()
    case = make_case((5, 7), dtype=torch.float32)
    term = fitted(form=form)
    expected = compound(copy.deepcopy(term))(case.logits, case.label_map)
    value = torch.compile(compound(term), fullgraph=True, backend="aot_eager")(case.logits, case.label_map)
    torch.testing.assert_close(value, expected)
    assert (term.keys >= 0).any()
    assert term.losses[term.keys >= 0].max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_certain_and_wrong_is_finite(dtype):
    logits = torch.full((1, 3, 4, 4), -50.0, dtype=dtype)
    logits[:, 2] = 50.0
    logits.requires_grad_()
    value = compound(fitted())(logits, torch.zeros(1, 4, 4, dtype=torch.long))
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "medium"}, "Expected `form` to be one of"),
        ({"warm_up": 0}, "Expected `warm_up` of at least 1, but got 0"),
        ({"capacity": 10}, "Expected `capacity` of at least 100, but got 10"),
        ({"num_samples": 0}, "Expected `num_samples` of at least 1"),
        ({"em_steps": 0}, "Expected `em_steps` of at least 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        BootstrappedCrossEntropy(**options)
