"""Spatio-temporal prior: arithmetic, loops, identities, ignored pixels."""

import pytest
import reference
import reference_targets
import torch
from cases import each_dimension, make_case

from densecal.losses import CompoundLoss, DeepSupervisionLoss
from densecal.targets import SpatioTemporalTarget, neighbour_proportions_target, one_hot_target, spatio_temporal_target
from densecal.terms import CrossEntropy


def series(spatial, times=3, **options):
    """Label maps of the same place ``(N, T, *spatial)``."""
    return torch.stack([make_case(spatial, seed=t + 1, **options).label_map for t in range(times)], dim=1)


def test_blend_by_hand():
    # Of two times, one says 1: f = 1/2. Without neighbours the priors are (0 + 1/2) / 2 = 1/4 for class 1.
    probs = spatio_temporal_target(torch.tensor([[0]]), 2, torch.tensor([[[0], [1]]]), mix=0.4, kernel_size=1).probs
    torch.testing.assert_close(probs[0, :, 0], torch.tensor([0.9, 0.1]))


@each_dimension
@pytest.mark.parametrize("border", ["replicate", "renormalize"])
def test_matches_the_loops(spatial, border):
    case, dims = make_case(spatial), len(spatial)
    stack, sigma = series(spatial, ignored=0.6), [0.7, 1.0, 1.5][:dims]
    plain = one_hot_target(case.label_map, 3, spatial_dims=dims, dtype=torch.float64)
    window, known = reference.window("gaussian", [3] * dims, sigma), (stack >= 0).any(1)
    space = reference.neighbourhood(plain.one_hot, plain.valid, window, border)
    time = reference.neighbourhood(reference_targets.rater_mean(stack, 3), known, window, border)
    prior = space + time
    prior = prior / prior.sum(1, keepdim=True).clamp_min(1e-9)
    expected = torch.where(case.valid.unsqueeze(1), 0.7 * plain.one_hot + 0.3 * prior, 0.0)
    target = spatio_temporal_target(case.label_map, 3, stack, mix=0.3, sigma=sigma, border=border, spatial_dims=dims, dtype=torch.float64)
    torch.testing.assert_close(target.probs, expected)
    torch.testing.assert_close(target.probs.sum(1), case.valid.double())
    assert not known.all()


def test_limits():
    case = make_case((5, 7), ignored=0.0)
    stack = case.label_map.unsqueeze(1).expand(-1, 3, -1, -1)
    smooth = neighbour_proportions_target(case.label_map, 3, kernel="gaussian").probs
    torch.testing.assert_close(spatio_temporal_target(case.label_map, 3, stack, mix=1.0).probs, smooth)  # nothing changes with time
    unknown = torch.full_like(stack, -100)
    torch.testing.assert_close(spatio_temporal_target(case.label_map, 3, unknown, mix=1.0).probs, smooth)
    without = spatio_temporal_target(case.label_map, 3, series((5, 7)), mix=0.0)
    torch.testing.assert_close(without.probs, one_hot_target(case.label_map, 3).probs)
    assert without.hard


def test_order_of_times_does_not_matter_and_regions_blend_by_themselves():
    case, stack = make_case((5, 7)), series((5, 7))
    one, other = (spatio_temporal_target(case.label_map, 3, s).probs for s in (stack, stack.flip(1)))
    torch.testing.assert_close(one, other)
    regions = torch.tensor([[[1, 1], [0, 1]]])
    probs = spatio_temporal_target(regions, 2, regions.unsqueeze(1), activation="sigmoid", kernel_size=1, spatial_dims=1).probs
    assert torch.equal(probs, regions.float())


def test_millimetres():
    case, stack = make_case((5, 7)), series((5, 7))
    target = SpatioTemporalTarget(unit="mm")
    assert target.needs == ("label_stack", "spacing")
    probs = target(case.label_map, 3, context={"label_stack": stack, "spacing": torch.tensor([2.0, 0.5])}).probs
    torch.testing.assert_close(probs, spatio_temporal_target(case.label_map, 3, stack, sigma=(0.5, 2.0)).probs)


def test_loss_ignores_what_it_should_compiles_and_has_the_right_gradient():
    torch._dynamo.reset()
    case, stack = make_case((4, 6)), series((4, 6))
    loss, context = CompoundLoss(SpatioTemporalTarget(), {"ce": {"term": CrossEntropy()}}), {"label_stack": stack}
    logits = case.logits.requires_grad_()
    loss(logits, case.label_map, context=context).backward()
    assert not logits.grad.movedim(1, -1)[~case.valid].any()
    assert torch.autograd.gradcheck(lambda z: loss(z, case.label_map[:, :2, :3], context={"label_stack": stack[..., :2, :3]}), logits[..., :2, :3])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, case.label_map, context=context), loss(logits, case.label_map, context=context))
    assert DeepSupervisionLoss(loss)([logits, logits[..., ::2, ::2]], case.label_map, context=context).isfinite()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpatioTemporalTarget(mix=2.0), r"Expected `mix` in \[0, 1\], but got 2.0"),
        (lambda: SpatioTemporalTarget(kernel_size=2), "Expected `kernel_size` to be odd"),
        (lambda: SpatioTemporalTarget()(torch.zeros(1, 4).long(), 2), "Expected the side input 'label_stack', which SpatioTemporalTarget needs"),
        (lambda: spatio_temporal_target(torch.zeros(1, 4).long(), 2, torch.zeros(1, 2, 5).long()), "Crop and resample them together"),
    ],
)
def test_wrong_inputs_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
