"""Kernel-density soft labels: arithmetic, loops, limits."""

import pytest
import reference_targets as reference
import torch
from cases import each_dimension, make_case

from densecal.targets import TeacherTarget, kde_soft_label


def keys(classes=3, number=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(number, classes, generator=generator, dtype=torch.float64).softmax(1)
    labels = torch.nn.functional.one_hot(torch.randint(0, classes, (number,), generator=generator), classes)
    return probs, labels


def test_equal_keys_give_the_share_of_their_labels():
    probs, key = torch.tensor([[[0.6, 0.1], [0.4, 0.9]]]), torch.tensor([[0.6, 0.4]] * 4)
    labels = torch.tensor([[1, 0], [1, 0], [1, 0], [0, 1]])
    torch.testing.assert_close(kde_soft_label(probs, key, labels), torch.tensor([[[0.75, 0.75], [0.25, 0.25]]]))


@each_dimension
@pytest.mark.parametrize("bandwidth", [0.05, 0.3])
def test_matches_the_loops(spatial, bandwidth):
    probs, (key, labels) = make_case(spatial).logits.softmax(1), keys()
    found = kde_soft_label(probs, key, labels, bandwidth=bandwidth).movedim(1, -1).flatten(0, -2)
    expected = [reference.kernel_density(p, key.tolist(), labels.tolist(), bandwidth) for p in probs.movedim(1, -1).flatten(0, -2).tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(found.sum(1), torch.ones(len(expected), dtype=torch.float64))


def test_narrow_kernels_follow_the_nearest_key_and_wide_ones_the_mean():
    key, labels = keys()
    at_keys = key.T.unsqueeze(0)
    torch.testing.assert_close(kde_soft_label(at_keys, key, labels, bandwidth=1e-6)[0].T, labels.double())
    torch.testing.assert_close(kde_soft_label(at_keys, key, labels, bandwidth=1e6)[0].T, labels.double().mean(0).expand_as(key), rtol=0, atol=1e-4)


def test_certain_probabilities_are_finite():
    key, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), torch.tensor([[1, 0], [0, 1], [1, 0]])
    probs = torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]])
    torch.testing.assert_close(kde_soft_label(probs, key, labels)[0, 0], torch.tensor([1.0, 0.0, 1.0]))


def test_its_logarithm_teaches():
    case, (key, labels) = make_case((5, 7)), keys()
    soft = kde_soft_label(case.logits.softmax(1), key, labels, bandwidth=0.1)
    target = TeacherTarget(mix=1.0)(case.label_map, 3, dtype=torch.float64, context={"teacher_logits": soft.clamp_min(1e-30).log()})
    torch.testing.assert_close(target.probs, torch.where(case.valid.unsqueeze(1), soft, 0.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kde_soft_label(torch.ones(1, 2, 3), torch.ones(4, 2), torch.ones(4, 2), bandwidth=0.0), "Expected `bandwidth` to be greater than 0"),
        (lambda: kde_soft_label(torch.ones(1, 2, 3), torch.ones(4, 3), torch.ones(4, 3)), r"of shape \(K, C\) with C = 2, but got \(4, 3\)"),
    ],
)
def test_wrong_inputs_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
