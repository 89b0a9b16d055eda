"""Mean of raters: arithmetic, loops, linearity of smoothing, ignored pixels, the loss around it."""

import pytest
import reference_targets as reference
import torch
from cases import each_dimension, make_case

from densecal.losses import CompoundLoss, DeepSupervisionLoss
from densecal.targets import OneHotTarget, RaterMeanTarget, SVLSTarget, one_hot_target, rater_mean_target, svls_target
from densecal.terms import CrossEntropy, DiceSemimetric


def panel(spatial, raters=4, **options):
    """Label maps of several raters ``(N, R, *spatial)``, each with ignored pixels of its own."""
    return torch.stack([make_case(spatial, seed=r, **options).label_map for r in range(raters)], dim=1)


def test_two_raters_by_hand():
    target = rater_mean_target(torch.tensor([[[0, 1, 1, -100], [0, 0, -100, -100]]]), 2)
    assert target.probs[0].tolist() == [[1.0, 0.5, 0.0, 0.0], [0.0, 0.5, 1.0, 0.0]]
    assert target.valid.tolist() == [[True, True, True, False]]
    assert not target.hard


@each_dimension
def test_matches_the_loops(spatial):
    raters = panel(spatial, ignored=0.8)
    target = rater_mean_target(raters, 3, dtype=torch.float64)
    torch.testing.assert_close(target.probs, reference.rater_mean(raters, 3))
    assert torch.equal(target.valid, (raters >= 0).any(1))
    assert not target.valid.all()


def test_one_rater_is_the_labels_and_the_order_of_raters_does_not_matter():
    raters = panel((5, 7))
    first = raters[:, :1]
    assert torch.equal(rater_mean_target(first, 3).probs, one_hot_target(first[:, 0], 3).probs)
    torch.testing.assert_close(rater_mean_target(raters.flip(1), 3).probs, rater_mean_target(raters, 3).probs)


@each_dimension
def test_smoothing_the_mean_is_the_mean_of_the_smoothed(spatial):
    raters = panel(spatial, ignored=0.0)
    target = RaterMeanTarget(label_target=SVLSTarget(sigma=0.8))
    mean = target(raters[:, 0], 3, spatial_dims=len(spatial), dtype=torch.float64, context={"rater_labels": raters}).probs
    each = [svls_target(r, 3, sigma=0.8, spatial_dims=len(spatial), dtype=torch.float64).probs for r in raters.unbind(1)]
    torch.testing.assert_close(mean, torch.stack(each).mean(0))


def test_regions_of_several_raters():
    raters = torch.tensor([[[[0, 1], [1, 1]], [[0, 0], [1, 0]]]])  # (1, 2, 2, 2): two raters, two regions
    probs = rater_mean_target(raters, 2, activation="sigmoid", spatial_dims=1).probs
    assert probs[0].tolist() == [[0.0, 0.5], [1.0, 0.5]]
    single = rater_mean_target(torch.tensor([[[0, 1], [1, 1]]]), 1, activation="sigmoid").probs
    assert single[0].tolist() == [[0.5, 1.0]]


def test_pixels_that_the_labels_ignore_stay_ignored():
    case, raters = make_case((5, 7)), panel((5, 7), ignored=0.3)
    target = RaterMeanTarget()(case.label_map, 3, context={"rater_labels": raters})
    assert torch.equal(target.valid, case.valid & (raters >= 0).any(1))
    assert not target.probs.movedim(1, -1)[~target.valid].any()


def test_loss_ignores_what_it_should_and_its_gradient_is_right():
    case, raters = make_case((3, 4)), panel((3, 4), ignored=0.5)
    loss = CompoundLoss(
        RaterMeanTarget(label_target=SVLSTarget()), {"ce": {"term": CrossEntropy()}, "dml": {"term": DiceSemimetric()}}, ignore_index=255
    )
    assert loss.needs == ("rater_labels",)
    as_255, context = case.label_map.masked_fill(~case.valid, 255), {"rater_labels": raters.masked_fill(raters < 0, 255)}
    logits = case.logits.requires_grad_()
    loss(logits, as_255, context=context).backward()
    valid = case.valid & (raters >= 0).any(1)
    assert not logits.grad.movedim(1, -1)[~valid].any()
    assert logits.grad.movedim(1, -1)[valid].any(-1).all()
    assert torch.autograd.gradcheck(lambda z: loss(z, as_255, context=context), logits)


def test_compiles_into_one_graph_and_follows_the_resolution():
    torch._dynamo.reset()
    raters = panel((8, 8))
    loss = CompoundLoss(RaterMeanTarget(), {"ce": {"term": CrossEntropy()}})
    logits, context = torch.randn(2, 3, 8, 8), {"rater_labels": raters}
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, raters[:, 0], context=context), loss(logits, raters[:, 0], context=context))
    assert DeepSupervisionLoss(loss)([logits, logits[..., ::2, ::2]], raters[:, 0], context=context).isfinite()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RaterMeanTarget(label_target="svls"), TypeError, "Expected `label_target` to be a densecal.targets.Target or None, but got str"),
        (lambda: RaterMeanTarget(label_target=OneHotTarget(activation="sigmoid")), ValueError, "Expected `label_target` with activation='softmax'"),
        (lambda: RaterMeanTarget(label_target=OneHotTarget(ignore_index=7)), ValueError, "`label_target` ignores 7 and the target around it -100"),
        (lambda: RaterMeanTarget()(torch.zeros(1, 4).long(), 2), ValueError, "Expected the side input 'rater_labels', which RaterMeanTarget needs"),
        (lambda: rater_mean_target(torch.zeros(1, 4).long(), 2, spatial_dims=1), ValueError, r"Expected label maps \(N, R, \*spatial\)"),
        (
            lambda: RaterMeanTarget()(torch.zeros(1, 4).long(), 2, context={"rater_labels": torch.zeros(1, 2, 5).long()}),
            ValueError,
            "Crop and resample them together",
        ),
    ],
)
def test_wrong_inputs_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
