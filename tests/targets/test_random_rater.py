"""A rater drawn per image: how often, who has not rated, ignored pixels, what the drawn labels become."""

import pytest
import torch
from cases import each_dimension, make_case

from densecal.losses import CompoundLoss
from densecal.targets import RandomRaterTarget, SVLSTarget, draw_rater, rater_mean_target, svls_target
from densecal.terms import CrossEntropy


def panel(spatial, raters=3, **options):
    """Label maps of several raters ``(N, R, *spatial)``, each with ignored pixels of its own."""
    return torch.stack([make_case(spatial, seed=r, **options).label_map for r in range(raters)], dim=1)


@each_dimension
def test_each_image_has_one_of_its_raters(spatial):
    raters = panel(spatial)
    torch.manual_seed(0)
    drawn = {draw_rater(raters)[n].numpy().tobytes() for n in [0] for _ in range(40)}
    assert drawn == {rater.numpy().tobytes() for rater in raters[0]}


def test_mean_over_many_draws_is_the_mean_of_the_raters():
    raters = torch.tensor([[[0, 1, 1], [0, 0, 1], [0, 0, 1]]]).expand(6000, -1, -1)
    shares = draw_rater(raters, generator=torch.Generator().manual_seed(0)).double().mean(0)
    torch.testing.assert_close(shares, rater_mean_target(raters[:1], 2, dtype=torch.float64).probs[0, 1], atol=0.02, rtol=0)  # 3 standard errors


def test_images_of_a_batch_are_drawn_apart():
    raters = torch.arange(4).view(1, 4, 1).expand(50, -1, -1)
    assert draw_rater(raters, generator=torch.Generator().manual_seed(0)).unique().tolist() == [0, 1, 2, 3]


def test_who_has_not_rated_an_image_is_never_drawn():
    raters = torch.full((2, 5, 4), 255)
    raters[0, 3] = torch.tensor([0, 255, 1, 1])
    for seed in range(20):
        drawn = draw_rater(raters, ignore_index=255, generator=torch.Generator().manual_seed(seed))
        assert drawn.tolist() == [[0, 255, 1, 1], [255] * 4]


def test_the_generator_says_the_draw():
    raters = panel((5, 7))
    torch.manual_seed(3)
    first = draw_rater(raters)
    torch.manual_seed(3)
    assert torch.equal(draw_rater(raters), first)


@each_dimension
def test_target_smooths_the_drawn_labels(spatial):
    raters = panel(spatial, ignored=0.3)
    label = torch.zeros(2, *spatial, dtype=torch.long)
    torch.manual_seed(1)
    target = RandomRaterTarget(label_target=SVLSTarget())(label, 3, spatial_dims=len(spatial), context={"rater_labels": raters})
    torch.manual_seed(1)
    expected = svls_target(draw_rater(raters), 3, spatial_dims=len(spatial))
    assert torch.equal(target.probs, expected.probs)
    assert torch.equal(target.valid, expected.valid)
    assert target.hard == expected.hard


def test_pixels_that_the_labels_ignore_stay_ignored_and_get_no_gradient():
    case, raters = make_case((5, 7)), panel((5, 7), ignored=0.0)
    loss = CompoundLoss(RandomRaterTarget(), {"ce": {"term": CrossEntropy()}})
    assert loss.needs == ("rater_labels",)
    logits = case.logits.requires_grad_()
    loss(logits, case.label_map, context={"rater_labels": raters}).backward()
    assert not logits.grad.movedim(1, -1)[~case.valid].any()
    assert logits.grad.movedim(1, -1)[case.valid].any(-1).all()


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    raters = panel((8, 8), ignored=0.0)[:, :1].expand(-1, 3, -1, -1)  # three who agree: any draw gives the same
    loss = CompoundLoss(RandomRaterTarget(), {"ce": {"term": CrossEntropy()}})
    logits, context = torch.randn(2, 3, 8, 8), {"rater_labels": raters}
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, raters[:, 0], context=context), loss(logits, raters[:, 0], context=context))


@pytest.mark.parametrize(
    "raters", [torch.zeros(1, 2, 5).long(), torch.zeros(3, 2, 4).long(), torch.zeros(1, 4).long()], ids=["size", "batch", "axes"]
)
def test_raters_on_another_grid_are_named(raters):
    with pytest.raises(ValueError, match="Crop and resample them together"):
        RandomRaterTarget()(torch.zeros(1, 4).long(), 2, context={"rater_labels": raters})


def test_no_raters_are_named():
    with pytest.raises(ValueError, match=r"label maps \(N, R, \*spatial\)"):
        draw_rater(torch.zeros(1, 0, 4).long())
