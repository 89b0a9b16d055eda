"""What a prediction says under either activation."""

import pytest
import torch

from densecal.ops import most_probable, outcome_logits, probabilities


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
