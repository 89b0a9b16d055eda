"""Every way to give probabilities and labels, brought into one form."""

from __future__ import annotations

import pytest
import torch

from densecal.metrics.inputs import read_pixels


def test_one_sigmoid_channel_is_two_classes():
    present = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    label = (present > 0.3).long()
    label[0, 0, 0, :3] = 255
    one = read_pixels(present, label, ignore_index=255, activation="sigmoid")
    two = read_pixels(torch.cat([1 - present, present], dim=1), label, ignore_index=255)
    for name in ("probs", "label_map", "valid"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert one.num_classes == 1
    assert torch.equal(one.negative_log_likelihood(), two.negative_log_likelihood())


def test_regions_are_asked_one_after_the_other():
    probs = torch.tensor([[[0.9, 0.2], [0.4, 0.6]]])  # two regions, two pixels
    label = torch.tensor([[[1, 0], [1, 1]]])
    pixels = read_pixels(probs, label, torch.tensor([[True, False]]), ignore_index=-100, activation="sigmoid")
    torch.testing.assert_close(pixels.probs[0, 1], torch.tensor([0.9, 0.2, 0.4, 0.6]))
    assert pixels.label_map.tolist() == [[1, 0, 1, 1]]
    assert pixels.valid.tolist() == [[True, False, True, False]]
    values, shares, valid = pixels.per_class()
    assert torch.equal(values, probs)
    assert torch.equal(shares, label.bool())
    assert valid.tolist() == [[[True, False], [True, False]]]
    confidence, prediction, correct = pixels.top_label()
    torch.testing.assert_close(confidence[0], torch.tensor([0.9, 0.8, 0.6, 0.6]))
    assert prediction.tolist() == [[1, 0, 0, 1]]
    assert correct.tolist() == [[True, True, False, True]]


def test_soft_regions_keep_their_shares():
    probs, shares = torch.tensor([[[0.9, 0.2]]]), torch.tensor([[[0.75, 0.25]]])
    pixels = read_pixels(probs, shares, ignore_index=-100, activation="sigmoid")
    assert torch.equal(pixels.per_class()[1], shares)
    assert torch.equal(pixels.shares()[0], torch.tensor([[0.25, 0.75], [0.75, 0.25]]))


def test_sigmoid_probabilities_are_checked_without_their_sum():
    label = torch.zeros(1, 2, 3, dtype=torch.long)
    read_pixels(torch.full((1, 2, 3), 0.9), label, ignore_index=-100, activation="sigmoid")
    with pytest.raises(ValueError, match=r"in \[0, 1\], but got values from 0\.9 to 3.*sigmoid\(\)"):
        read_pixels(torch.tensor([[[0.9, 1.0, 3.0], [0.9, 0.9, 0.9]]]), label, ignore_index=-100, activation="sigmoid")
