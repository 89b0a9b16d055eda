"""The loss to begin with is what the studies trained."""

import torch
from cases import each_dimension, make_case

from densecal.cli.configuration import build, composed
from densecal.losses import CompoundLoss, RecommendedLoss
from densecal.targets import SVLSTarget
from densecal.terms import CrossEntropy, DiceSemimetric


@each_dimension
def test_it_is_the_sum_of_its_parts(spatial):
    case = make_case(spatial)
    terms = {"ce": {"weight": 0.25, "term": CrossEntropy()}, "dml": {"weight": 0.75, "term": DiceSemimetric()}}
    for options in ({}, {"kernel_size": 3, "sigma": 0.7, "border": "renormalize"}):
        expected = CompoundLoss(SVLSTarget(**{"kernel_size": 5, "sigma": 1.5, **options}), terms)
        torch.testing.assert_close(RecommendedLoss(**options)(case.logits, case.label_map), expected(case.logits, case.label_map), rtol=0, atol=0)


def test_it_is_smallest_at_its_own_labels():
    case = make_case((6, 7))
    loss = RecommendedLoss()
    labels = SVLSTarget(kernel_size=5, sigma=1.5)(case.label_map, num_classes=3)
    best = labels.probs.clamp_min(1e-6).log()
    value = loss(best, case.label_map)
    for seed in range(5):
        noise = torch.randn(best.shape, generator=torch.Generator().manual_seed(seed), dtype=best.dtype)
        assert loss(best + 0.3 * noise, case.label_map) > value


def test_studies_train_it():
    """The same loss by its name and by the settings that it was first tried with."""
    settings = [
        "target=svls",
        "term=[ce,dml]",
        "loss.terms.ce.weight=0.25",
        "loss.terms.dml.weight=0.75",
        "loss.target.kernel_size=5",
        "loss.target.sigma=1.5",
    ]
    case = make_case((6, 7))
    values = []
    for lines in (["loss=recommended"], ["loss=compound", *settings]):
        values.append(build(composed(lines, "train").loss, "loss", num_classes=3)(case.logits, case.label_map))
    assert values[0] == values[1]
