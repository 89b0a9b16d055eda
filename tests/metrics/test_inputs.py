"""Every way to give probabilities and labels, brought into one form."""

from __future__ import annotations

import itertools

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_label_first_of_tied_classes_wins(dtype):
    generator = torch.Generator().manual_seed(0)
    probs = torch.randint(0, 4, (2, 5, 301), generator=generator).to(dtype) / 4  # a tie in most pixels
    probs[0, :, 0] = 0.0
    pixels = read_pixels(probs, torch.zeros(2, 301, dtype=torch.long), ignore_index=-100, validate_args=False)
    confidence, prediction, correct = pixels.top_label()
    for i, j in itertools.product(range(2), range(301)):
        column = probs[i, :, j].tolist()
        assert confidence[i, j] == max(column)
        assert prediction[i, j] == column.index(max(column))
    assert torch.equal(correct, prediction == 0)


@pytest.mark.parametrize("label_of", [0, 2, 4])
def test_confidence_is_the_top_label_without_its_class(label_of):
    generator = torch.Generator().manual_seed(0)
    parts = torch.randint(1, 4, (2, 5, 301), generator=generator).double()
    parts[..., 0] = torch.tensor([2.0, 0, 0, 0, 2.0])  # a tie at one half
    probs = parts / parts.sum(1, keepdim=True)
    pixels = read_pixels(probs, torch.full((2, 301), label_of), ignore_index=-100)
    confidence, _, correct = pixels.top_label()
    assert torch.equal(pixels.confidence()[0], confidence)
    assert torch.equal(pixels.confidence()[1], correct)


def test_top_label_next_float_is_larger():
    low = torch.full((1, 3, 4), 1 / 3)
    low[0, 2] = torch.nextafter(low[0, 2], torch.ones(4))
    pixels = read_pixels(low, torch.zeros(1, 4, dtype=torch.long), ignore_index=-100)
    assert pixels.top_label()[1].tolist() == [[2, 2, 2, 2]]


def test_top_label_of_many_pixels_equals_a_search():
    probs = torch.randn(2, 7, 30_001, generator=torch.Generator().manual_seed(1)).softmax(1)
    probs[1, :, 5] = torch.nan
    label = torch.zeros(2, 30_001, dtype=torch.long)
    label[1, 5] = -100
    confidence, prediction, _ = read_pixels(probs, label, ignore_index=-100).top_label()
    counted = label == 0
    torch.testing.assert_close(confidence[counted], probs.amax(1)[counted], rtol=0, atol=0)
    assert torch.equal(prediction[counted], probs.argmax(1)[counted])
    assert prediction[1, 5] in range(7)


@pytest.mark.parametrize("value", [float("nan"), -0.5, 1.5], ids=str)
def test_probabilities_are_checked_where_they_count(value):
    probs, label = torch.full((1, 2, 3), 0.5), torch.tensor([[0, 1, 255]])
    probs[0, :, 2] = value
    read_pixels(probs, label, ignore_index=255)
    with pytest.raises(ValueError, match="Expected `probs` in \\[0, 1\\] that sum to 1"):
        read_pixels(probs, label.clamp(max=1), ignore_index=255)
