"""Temporal label smoothing: arithmetic, loops, limits, ignored steps."""

import copy
import math
import pickle

import pytest
import reference_targets as reference
import torch

from densecal.losses import CompoundLoss
from densecal.targets import TemporalSmoothingTarget, temporal_share, temporal_smoothing_target, time_to_next_event
from densecal.terms import CrossEntropy

FORMS = ["exponential", "sigmoid", "linear", "step", "hard", "constant"]
HORIZONS = {"h_true": 7.0, "h_min": 2.0, "h_max": 15.0}


def times(n=60):
    return torch.cat([torch.linspace(0.0, 20.0, n, dtype=torch.float64) + 1e-3, torch.tensor([math.inf], dtype=torch.float64)])


def events(n=3, c=1, length=40):
    return (torch.rand(n, c, length, generator=torch.Generator().manual_seed(2)) < 0.15).long()


def test_time_by_hand():
    found = time_to_next_event(torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    assert found.tolist() == [[1, 3, 2, 1, math.inf, math.inf], [math.inf] * 6]


def test_time_matches_the_loops():
    sequences = events(n=8)[:, 0]
    expected = torch.tensor([reference.time_to_next(s) for s in sequences.tolist()])
    assert torch.equal(time_to_next_event(sequences.float()), expected)


@pytest.mark.parametrize(("gamma", "per_hour"), [(0.1, 1.0), (0.5, 1.0), (0.2, 4.0)])
@pytest.mark.parametrize("form", FORMS)
def test_forms_match_the_loops(form, gamma, per_hour):
    share = temporal_share(times(), form=form, gamma=gamma, steps_per_hour=per_hour, **HORIZONS)
    expected = [reference.temporal_share(t, form, *HORIZONS.values(), gamma, per_hour) for t in times().tolist()]
    torch.testing.assert_close(share, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", ["exponential", "sigmoid", "linear", "step"])
@pytest.mark.parametrize("gamma", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forms_fall_from_one_to_zero_and_stay_finite(form, gamma, dtype):
    share = temporal_share(times().to(dtype), form=form, gamma=gamma, **HORIZONS)
    assert share.dtype == dtype
    assert share.isfinite().all()
    assert (share[times() <= 2] == 1).all()
    assert (share[times() > 15] == 0).all()
    assert (share.diff() <= 1e-6).all()


@pytest.mark.parametrize("gamma", [1e-3, 0.1, 1.0])
def test_sigmoid_is_one_half_at_the_true_horizon(gamma):
    share = temporal_share(torch.tensor([7.0], dtype=torch.float64), form="sigmoid", gamma=gamma, **HORIZONS)
    torch.testing.assert_close(share.item(), 0.5)


def test_limits():
    linear = temporal_share(times(), form="linear", **HORIZONS)
    torch.testing.assert_close(temporal_share(times(), form="exponential", gamma=1e-9, **HORIZONS), linear)
    torch.testing.assert_close(temporal_share(times(), form="step", gamma=1e-7, **HORIZONS), linear, rtol=0, atol=1e-7)
    hard = temporal_share(times(), form="hard", **HORIZONS)
    torch.testing.assert_close(temporal_share(times(), form="sigmoid", gamma=1e-4, **HORIZONS), hard)
    torch.testing.assert_close(temporal_share(times(), form="constant", gamma=0.2, **HORIZONS), 0.8 * hard + 0.2 * (1 - hard))


@pytest.mark.parametrize("channels", [1, 3])
def test_target_is_the_share_of_the_time_of_each_channel(channels):
    sequences = events(c=channels)
    probs = TemporalSmoothingTarget(form="exponential", h_max=9.0)(sequences, channels, spatial_dims=1).probs
    expected = [
        [[reference.temporal_share(t, "exponential", 12, 0, 9, 0.1, 1) for t in reference.time_to_next(s)] for s in x] for x in sequences.tolist()
    ]
    torch.testing.assert_close(probs, torch.tensor(expected))


def test_ignored_steps_hold_no_event_and_get_no_gradient():
    sequences = torch.tensor([[0, 0, -100, 0, 0, 1, 0, -100]])
    as_zero = sequences.clamp_min(0)
    target, plain = (temporal_smoothing_target(s, form="linear", h_max=5.0) for s in (sequences, as_zero))
    torch.testing.assert_close(target.probs, torch.where(sequences >= 0, plain.probs, 0.0))
    loss = CompoundLoss(TemporalSmoothingTarget(form="linear", h_max=5.0), {"ce": {"term": CrossEntropy()}})
    logits = torch.randn(1, 1, 8, dtype=torch.float64, requires_grad=True)
    loss(logits, sequences).backward()
    assert (logits.grad[0, 0] == 0).tolist() == (sequences[0] < 0).tolist()
    assert torch.autograd.gradcheck(lambda z: loss(z, sequences), logits)


@pytest.mark.parametrize("form", ["exponential", "sigmoid"])
def test_loss_compiles_into_one_graph_and_copies_give_the_same(form):
    torch._dynamo.reset()
    loss = CompoundLoss(TemporalSmoothingTarget(form=form), {"ce": {"term": CrossEntropy()}})
    sequences, logits = events(c=2), torch.randn(3, 2, 40)
    expected = loss(logits, sequences)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, sequences), expected)
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(loss)))(logits, sequences), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TemporalSmoothingTarget(form="cubic"), "Expected `form` to be one of"),
        (lambda: TemporalSmoothingTarget(h_min=5.0, h_max=5.0), "Expected 0 <= `h_min` < `h_max`, but got 5.0 and 5.0"),
        (lambda: TemporalSmoothingTarget(gamma=0.0), "Expected `gamma` to be greater than 0"),
        (lambda: TemporalSmoothingTarget(form="constant", gamma=2.0), r"Expected `gamma` in \(0, 1\]"),
        (lambda: TemporalSmoothingTarget(form="sigmoid", h_true=1.0, gamma=30.0), "Move `h_true` towards the middle, or lower `gamma`"),
        (lambda: TemporalSmoothingTarget(form="sigmoid", h_true=30.0), "Move `h_true` towards the middle"),
        (
            lambda: CompoundLoss(TemporalSmoothingTarget(), {"ce": {"term": CrossEntropy()}})(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4).long()),
            "Expected sequences",
        ),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
