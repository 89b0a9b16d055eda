"""Probabilities and back, at any temperature."""

import pytest
import torch
from cases import each_dimension, make_case

from densecal.ops.activation import logits_from_probabilities, probabilities


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
