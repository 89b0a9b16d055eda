"""Constraints with multipliers: penalty functions, loops, updates, ignored pixels, state."""

import copy
import pickle

import pytest
import reference
import reference_penalties as penalties
import torch
from cases import each_dimension, make_case
from commands import run_ranks

from densecal.losses import CompoundLoss, CRaCLoss, DeepSupervisionLoss
from densecal.ops import boundary_region, mean_kernel, normalized_convolution
from densecal.targets import OneHotTarget, one_hot_target, svls_target
from densecal.terms import NeighbourConstraint
from densecal.terms.crac import constraint_penalty, constraint_slope


def hard(case, make=one_hot_target):
    return make(case.label_map, 3, spatial_dims=case.label_map.ndim - 1, dtype=torch.float64)


def with_state(**options) -> NeighbourConstraint:
    """A term in the middle of a training."""
    term = NeighbourConstraint(num_classes=3, **options)
    generator = torch.Generator().manual_seed(5)
    term.multiplier.copy_(0.1 + torch.rand(term.multiplier.shape, generator=generator))
    term.rho.copy_(1.0 + torch.rand(term.rho.shape, generator=generator))
    return term


def shares_and_boundary(case):
    one_hot = torch.where(case.valid.unsqueeze(1), torch.nn.functional.one_hot(case.label_map.clamp_min(0), 3).movedim(-1, 1), 0).double()
    dims = case.label_map.ndim - 1
    shares = reference.neighbourhood(one_hot, case.valid, reference.window("mean", [3] * dims, [1.0] * dims), "replicate")
    return shares, boundary_region(case.label_map.unsqueeze(1).double(), case.valid)[:, 0]


# --- penalty functions ---


@pytest.mark.parametrize("kind", ["phr", "p2", "p3"])
def test_penalty_function_and_its_slope(kind):
    h = torch.linspace(-3, 3, 25, dtype=torch.float64).requires_grad_()  # 0 is one of them
    for lam, rho in ((1e-6, 1.0), (0.5, 1.2), (3.0, 10.0)):
        a, b = torch.tensor(lam, dtype=torch.float64), torch.tensor(rho, dtype=torch.float64)
        value = constraint_penalty(h, a, b, kind)
        torch.testing.assert_close(value, torch.tensor([penalties.constraint(kind, x, lam, rho) for x in h.tolist()], dtype=torch.float64))
        (slope,) = torch.autograd.grad(value.sum(), h)
        torch.testing.assert_close(constraint_slope(h, a, b, kind), slope)


# --- the term ---


@each_dimension
@pytest.mark.parametrize("per_region", [True, False], ids=["regions", "one-region"])
@pytest.mark.parametrize("per_class", [True, False], ids=["classes", "shared"])
@pytest.mark.parametrize(("penalty", "constraint"), [("phr", "abs"), ("p2", "relu"), ("p3", "abs")])
def test_term_and_update_match_the_loops(spatial, per_region, per_class, penalty, constraint):
    case = make_case(spatial)
    term = with_state(margin=2.0, penalty=penalty, constraint=constraint, per_class=per_class, per_region=per_region)
    shares, boundary = shares_and_boundary(case)
    h = penalties.gaps(case.logits, shares, boundary if per_region else None, 2.0, relu=constraint == "relu")

    def state(buffer, region, c):
        return buffer[region, c if per_class else 0].item()

    counted = {key: gap for key, gap in h.items() if case.valid[(key[1], *key[3:])]}
    values = [penalties.constraint(penalty, gap, state(term.multiplier, r, c), state(term.rho, r, c)) for (r, _, c, *_), gap in counted.items()]
    assert term(case.logits, hard(case)).item() == pytest.approx(sum(values) / len(values), rel=1e-9)

    before = copy.deepcopy(term)
    term.last_gap.fill_(1.0)
    for image in range(2):  # batch by batch is all at once
        one = one_hot_target(case.label_map[image : image + 1], 3, spatial_dims=len(spatial), dtype=torch.float64)
        term.on_validation_batch(case.logits[image : image + 1], one)
    term.on_validation({})
    for region in range(2 if per_region else 1):
        for k in range(3 if per_class else 1):
            mine = [gap for (r, _, c, *_), gap in counted.items() if r == region and (c == k or not per_class)]
            lam, rho = before.multiplier[region, k].item(), before.rho[region, k].item()
            step = 1e-6
            slopes = [(penalties.constraint(penalty, g + step, lam, rho) - penalties.constraint(penalty, g, lam, rho)) / step for g in mine]
            mean_gap = sum(mine) / len(mine)
            assert term.multiplier[region, k].item() == pytest.approx(sum(slopes) / len(slopes), rel=1e-4)
            assert term.last_gap[region, k].item() == pytest.approx(mean_gap, rel=1e-6)
            assert term.rho[region, k].item() == pytest.approx(min(1.2 * rho, 10) if mean_gap > 0.9 else rho, rel=1e-6)


def test_term_by_hand():
    # Labels 0 0 1, windows of three with replicated border: shares of class 0 are 1, 2/3, 1/3; the last two pixels are boundary.
    logits, target = torch.zeros(1, 2, 3), one_hot_target(torch.tensor([[0, 0, 1]]), 2)
    term = NeighbourConstraint(num_classes=2, margin=5.0, multiplier_min=2.0)
    interior, boundary = 2 * 5 + 25 / 2, 2 * (2 * (1 / 3 + 2 / 3) + (1 / 9 + 4 / 9) / 2)
    assert term(logits, target).item() == pytest.approx((interior + boundary) / (3 * 2 * 2))
    one = NeighbourConstraint(num_classes=2, margin=5.0, multiplier_min=2.0, per_region=False)
    shares = [1, 2 / 3, 1 / 3, 0, 1 / 3, 2 / 3]
    assert one(logits, target).item() == pytest.approx(sum(2 * 5 * s + (5 * s) ** 2 / 2 for s in shares) / 6)


def test_logits_at_the_constraints_cost_nothing():
    case = make_case((5, 7))
    shares, boundary = shares_and_boundary(case)
    logits = torch.where(boundary.unsqueeze(1), shares, 4.0 * shares)
    assert with_state(margin=4.0)(logits, hard(case)).item() < 1e-12
    below = logits - 1.0
    assert with_state(margin=4.0, constraint="relu")(below, hard(case)).item() == 0.0
    assert with_state(margin=4.0)(below, hard(case)).item() > 0.1
    probs = with_state(margin=1.0, acts_on="probs")
    assert probs(shares.clamp_min(1e-300).log(), hard(case)).item() < 1e-9


@pytest.mark.parametrize("border", ["replicate", "renormalize", "zeros", "background"])
def test_borders(border):
    case = make_case((5, 7), ignored=0.0)
    term, target = with_state(border=border), hard(case)
    gaps = term._gaps(case.logits, target)
    labels = case.label_map
    if border == "background":  # labels in a frame of class 0
        labels = torch.nn.functional.pad(labels, (1, 1, 1, 1))
    framed = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).double()
    valid = torch.ones_like(labels, dtype=torch.bool)
    shares = normalized_convolution(framed, valid, mean_kernel(3, 2), border="replicate" if border == "background" else border)
    boundary = boundary_region(labels.unsqueeze(1).double(), valid)
    if border == "background":
        shares, boundary = shares[..., 1:-1, 1:-1], boundary[..., 1:-1, 1:-1]
    torch.testing.assert_close(gaps[0], torch.where(boundary, (case.logits - shares).abs(), 0.0))
    torch.testing.assert_close(gaps[1], torch.where(boundary, 0.0, (case.logits - 10 * shares).abs()))


@pytest.mark.parametrize("options", [{}, {"penalty": "p2", "per_region": False}, {"penalty": "p3", "acts_on": "probs", "border": "background"}])
@pytest.mark.parametrize("kind", ["hard", "soft", "sigmoid"])
def test_gradient_is_right_and_zero_at_ignored_pixels(options, kind):
    case = make_case((2, 3), seed=3)
    term = with_state(**options)
    if kind == "sigmoid":
        labels = torch.where(case.valid.unsqueeze(1), (case.soft_labels > 0.3).long(), -100)
        target = one_hot_target(labels, 3, activation="sigmoid", spatial_dims=2, dtype=torch.float64)
    else:
        target = hard(case) if kind == "hard" else one_hot_target(case.soft_labels, 3, dtype=torch.float64)
    logits = case.logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: term(z, target), logits)
    term(logits, target).backward()
    assert not case.valid.all()
    assert logits.grad is not None
    at_ignored = logits.grad.movedim(1, -1)[~case.valid]
    assert torch.equal(at_ignored, torch.zeros_like(at_ignored))


def test_sigmoid_holds_a_region_to_the_margin_on_both_sides():
    term = NeighbourConstraint(num_classes=1, margin=4.0)
    there = one_hot_target(torch.ones(1, 1, 3), 1, activation="sigmoid")
    nowhere = one_hot_target(torch.zeros(1, 1, 3), 1, activation="sigmoid")
    assert term(torch.full((1, 1, 3), 4.0), there).item() == 0.0
    assert term(torch.full((1, 1, 3), -4.0), nowhere).item() == 0.0
    assert term(torch.zeros(1, 1, 3), nowhere).item() == pytest.approx(4**2 / 2 / 2, rel=1e-5)


def test_shares_are_of_the_labels_not_of_the_smoothed_target():
    case = make_case((5, 7))
    torch.testing.assert_close(with_state()(case.logits, hard(case, svls_target)), with_state()(case.logits, hard(case)))


def test_class_permutation_leaves_the_value():
    case = make_case((5, 7))
    term, order = with_state(), torch.tensor([2, 0, 1])
    relabelled = torch.where(case.valid, order.argsort()[case.label_map.clamp_min(0)], -100)
    permuted = copy.deepcopy(term)
    permuted.multiplier.copy_(term.multiplier[:, order])
    permuted.rho.copy_(term.rho[:, order])
    value = permuted(case.logits[:, order], one_hot_target(relabelled, 3, dtype=torch.float64))
    torch.testing.assert_close(value, term(case.logits, hard(case)))


# --- the update ---


def validate(term, logits, labels):
    loss = CompoundLoss(OneHotTarget(), {"crac": {"term": term}})
    loss.on_validation_batch(logits, labels)
    loss.on_validation({})


def test_absent_class_keeps_its_multipliers():
    case = make_case((5, 7))
    labels = case.label_map.masked_fill(case.label_map == 2, 0)
    term = with_state()
    before = copy.deepcopy(term)
    validate(term, case.logits, labels)
    for name in ("multiplier", "rho", "last_gap"):
        new, old = getattr(term, name), getattr(before, name)
        assert new.isfinite()[:, :2].all()
        assert torch.equal(new[:, 2], old[:, 2])
    assert not torch.equal(term.multiplier[:, :2], before.multiplier[:, :2])


@pytest.mark.parametrize("per_class", [True, False])
def test_validation_without_pixels_changes_nothing(per_class):
    case = make_case((5, 7), ignored=1.1)
    term = with_state(per_class=per_class)
    before = {name: value.clone() for name, value in term.state_dict().items()}
    validate(term, case.logits, case.label_map)
    term.on_validation({"dice": 0.5})  # nobody showed it a batch
    for name, value in term.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_junk_at_ignored_pixels_does_not_reach_the_multipliers():
    case = make_case((5, 7))
    clean, dirty = with_state(), with_state()
    validate(clean, case.logits, case.label_map)
    validate(dirty, torch.where(case.valid.unsqueeze(1), case.logits, torch.nan), case.label_map)
    assert torch.equal(clean.multiplier, dirty.multiplier)


def test_bounds_and_growth():
    case = make_case((5, 7))
    term = NeighbourConstraint(num_classes=3, multiplier_max=2.0, rho_growth=4.0, rho_max=10.0, rho_every=2, margin=20.0)
    rhos = []
    for _ in range(7):
        validate(term, case.logits, case.label_map)
        rhos.append(term.rho[0, 0].item())
        assert (term.multiplier <= 2.0).all()
    # The first validation has nothing to compare with; every second one may raise rho.
    assert rhos == [1.0, 4.0, 4.0, 10.0, 10.0, 10.0, 10.0]
    calm = NeighbourConstraint(num_classes=3, progress=1.5)
    for _ in range(3):
        validate(calm, case.logits, case.label_map)
    assert (calm.rho == 1.0).all()


def test_state_is_in_checkpoints_and_copies():
    case = make_case((5, 7))
    term = with_state()
    validate(term, case.logits, case.label_map)
    assert set(term.state_dict()) == {"multiplier", "rho", "last_gap", "updates"}
    fresh = NeighbourConstraint(num_classes=3)
    fresh.load_state_dict(term.state_dict())
    for twin in (fresh, copy.deepcopy(term), pickle.loads(pickle.dumps(term))):
        assert torch.equal(twin(case.logits, hard(case)), term(case.logits, hard(case)))


def test_update_under_inference_mode_leaves_a_trainable_state():
    case = make_case((5, 7))
    term = with_state()
    with torch.inference_mode():
        validate(term, case.logits.clone(), case.label_map)
    logits = case.logits.requires_grad_()
    term(logits, hard(case)).backward()
    assert logits.grad is not None
    validate(term, case.logits.detach(), case.label_map)


_RANK = """
import torch
from cases import make_case
from densecal.losses import CRaCLoss

case = make_case((5, 7), batch=3)
states = []
for owned in ([[0, 2], [1]], [[0, 1, 2], []], [[], []]):
    loss = CRaCLoss(num_classes=3)
    for i in owned[rank]:
        loss.on_validation_batch(case.logits[i : i + 1], case.label_map[i : i + 1])
    loss.on_validation({})
    states.append(loss.state_dict())
torch.save(states, f"{folder}/{rank}.pt")
"""


@pytest.mark.slow
def test_two_ranks_come_to_the_multipliers_of_one(tmp_path):
    run_ranks(_RANK, tmp_path)
    case, one = make_case((5, 7), batch=3), CRaCLoss(num_classes=3)
    nothing = {name: value.clone() for name, value in one.state_dict().items()}
    one.on_validation_batch(case.logits, case.label_map)
    one.on_validation({})
    for rank in range(2):
        odd, empty_rank, none = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(odd[name], value)
            torch.testing.assert_close(empty_rank[name], value)
            torch.testing.assert_close(none[name], nothing[name])


# --- the loss ---


@pytest.mark.parametrize("form", ["map", "soft"])
@pytest.mark.parametrize("border", ["replicate", "background"])
def test_preset_compiles_and_sees_new_multipliers(form, border):
    torch._dynamo.reset()
    case = make_case((5, 7), dtype=torch.float32)
    target = case.label_map if form == "map" else case.soft_labels
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    loss = CRaCLoss(num_classes=3, border=border)
    compiled = torch.compile(loss, fullgraph=True, backend=count)
    values = []
    for _ in range(3):
        torch.testing.assert_close(compiled(case.logits, target), loss(case.logits, target))
        values.append(loss(case.logits, target).item())
        loss.on_validation_batch(case.logits, target)
        loss.on_validation({})
    assert len(set(values)) == 3
    assert len(graphs) == 1


def test_preset_promises():
    case = make_case((5, 7), dtype=torch.float32)
    loss = CRaCLoss(num_classes=3, class_weights=[0.5, 1.0, 2.0])
    clean, dirty = case.logits.clone().requires_grad_(), torch.where(case.valid.unsqueeze(1), case.logits, torch.inf).requires_grad_()
    a, b = loss(clean, case.label_map), loss(dirty, case.label_map)
    a.backward()
    b.backward()
    assert torch.equal(a, b)
    assert torch.equal(clean.grad, dirty.grad)
    half = loss(case.logits.half(), case.label_map)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(case.logits.half().float(), case.label_map))
    assert CRaCLoss(num_classes=3)(case.logits, torch.full_like(case.label_map, -100)).item() == 0.0
    values = CRaCLoss(num_classes=3, reduction="none")(case.logits, case.label_map)
    assert values.shape == case.label_map.shape
    torch.testing.assert_close(values.sum() / case.valid.sum(), CRaCLoss(num_classes=3)(case.logits, case.label_map))
    assert loss.wants_validation_logits
    assert DeepSupervisionLoss(loss).wants_validation_logits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeighbourConstraint(num_classes=0), "Expected `num_classes` to be greater than 0"),
        (lambda: NeighbourConstraint(num_classes=2, margin=0.0), "Expected `margin` to be greater than 0"),
        (lambda: NeighbourConstraint(num_classes=2, penalty="p4"), "Expected `penalty` to be one of"),
        (lambda: NeighbourConstraint(num_classes=2, constraint="l2"), "Expected `constraint` to be one of"),
        (lambda: NeighbourConstraint(num_classes=2, border="reflect"), "Expected `border` to be one of"),
        (lambda: NeighbourConstraint(num_classes=2, kernel_size=4), "Expected `kernel_size` to be odd"),
        (lambda: NeighbourConstraint(num_classes=2, rho=20.0), "Expected `rho_max` to be 20 or greater, but got 10.0"),
        (lambda: NeighbourConstraint(num_classes=2, rho_growth=0.5), "Expected `rho_growth` to be 1 or greater"),
        (lambda: NeighbourConstraint(num_classes=2, multiplier_max=1e-9), "Expected `multiplier_max` to be 1e-06 or greater"),
        (lambda: CRaCLoss(num_classes=2)(torch.zeros(1, 3, 4), torch.zeros(1, 4).long()), "Expected logits of num_classes=2 channels, but got 3"),
        (lambda: constraint_penalty(torch.zeros(1), torch.ones(1), torch.ones(1), "p4"), "Expected `kind` to be one of"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.gpu
def test_gpu_and_cpu_agree():
    case = make_case((5, 7), dtype=torch.float32)
    here, there = CRaCLoss(num_classes=3), CRaCLoss(num_classes=3).cuda()
    for _ in range(3):
        for loss, logits, labels in ((here, case.logits, case.label_map), (there, case.logits.cuda(), case.label_map.cuda())):
            loss.on_validation_batch(logits, labels)
            loss.on_validation({})
        torch.testing.assert_close(there(case.logits.cuda(), case.label_map.cuda()).cpu(), here(case.logits, case.label_map))
