"""Probabilities and back, at any temperature, and what they say under either activation."""

import pytest
import torch
from cases import each_dimension, make_case

from densecal.ops import logits_from_probabilities, most_probable, outcome_logits, probabilities


@each_dimension
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_probabilities_are_softened_as_their_logits(spatial, activation, temperature):
    logits = make_case(spatial).logits
    known = logits_from_probabilities(probabilities(logits, activation), activation)
    torch.testing.assert_close(probabilities(known / temperature, activation), probabilities(logits / temperature, activation))


def test_shares_that_were_interpolated_need_not_sum_to_one():
    probs = torch.tensor([[[0.6], [0.2]]])
    torch.testing.assert_close(logits_from_probabilities(probs).softmax(1)[0, :, 0], torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_certainty_stays_finite(activation):
    probs = torch.tensor([[[0.0, 1.0, 0.5]]])
    logits = logits_from_probabilities(probs.expand(1, 2, 3), activation)
    assert logits.isfinite().all()
    if activation == "sigmoid":
        torch.testing.assert_close(logits.sigmoid()[0, 0], probs[0, 0], rtol=0, atol=2.0**-16)


def test_unknown_activation_is_named():
    with pytest.raises(ValueError, match="Expected `activation` to be one of"):
        logits_from_probabilities(torch.ones(1, 2, 3), "tanh")


def test_most_probable_class():
    probs = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
    label, confidence = most_probable(probs)
    assert torch.equal(label, probs.argmax(1))
    assert torch.equal(confidence, probs.max(1).values)
    assert torch.equal(most_probable(probs[0], dim=0)[0], label[0])


def test_a_region_is_a_choice_between_outside_and_inside():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label, confidence = most_probable(probabilities(logits, "sigmoid"), "sigmoid")
    inside_outside = outcome_logits(logits, "sigmoid").softmax(1)
    assert torch.equal(label, 1 - inside_outside.argmax(1))
    torch.testing.assert_close(confidence, inside_outside.amax(1))


def test_a_tie_is_outside():
    label, confidence = most_probable(torch.tensor([[0.5]]), "sigmoid")
    assert (label.item(), confidence.item()) == (0, 0.5)


def test_most_probable_error():
    with pytest.raises(ValueError, match="Expected `activation` to be one of"):
        most_probable(torch.zeros(1, 2), "relu")
