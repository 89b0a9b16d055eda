"""What a label may look like, what ignore means, and the errors for what does not fit."""

import pytest
import torch
from cases import each_dimension, make_case

from densecal.targets import OneHotTarget, SVLSTarget, one_hot_target
from densecal.targets.one_hot import align_label


@each_dimension
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_integer_types_and_channel_axis_agree(spatial, dtype):
    case = make_case(spatial)
    ignore_index = 100
    label_map = torch.where(case.valid, case.label_map, ignore_index).to(dtype)
    expected = torch.nn.functional.one_hot(case.label_map.clamp_min(0), 3).movedim(-1, 1) * case.valid.unsqueeze(1)
    for label in (label_map, label_map.unsqueeze(1), label_map.unsqueeze(1).float()):
        target = one_hot_target(label, 3, ignore_index=ignore_index, spatial_dims=len(spatial))
        assert target.hard
        assert torch.equal(target.probs, expected.float())
        assert torch.equal(target.valid, case.valid)


def test_soft_labels_pass_unchanged_and_ignored_pixels_become_zero():
    case = make_case((5, 7))
    target = one_hot_target(case.soft_labels, 3, dtype=torch.float64)
    assert not target.hard
    assert target.label_map is None
    assert torch.equal(target.valid, case.valid)
    torch.testing.assert_close(target.probs, torch.where(case.valid.unsqueeze(1), case.soft_labels, 0.0), rtol=0, atol=0)


def test_zero_padding_of_soft_labels_is_ignored_under_softmax_only():
    label = torch.tensor([[[0.3, 0.0], [0.7, 0.0]]])
    assert one_hot_target(label, 2).valid.tolist() == [[True, False]]
    assert one_hot_target(label, 2, activation="sigmoid").valid.tolist() == [[True, True]]


def test_one_ignored_entry_ignores_the_pixel():
    label = torch.tensor([[[0.3, -100.0], [0.7, 0.5]]])
    assert one_hot_target(label, 2).valid.tolist() == [[True, False]]


def test_regions_may_overlap():
    label = torch.tensor([[[1, 1, 255], [0, 1, 0]]])
    target = one_hot_target(label, 2, activation="sigmoid", ignore_index=255, spatial_dims=1)
    assert target.hard
    assert target.probs.tolist() == [[[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]]
    assert target.valid.tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    "label", [torch.zeros(2, 4, 4).long(), torch.zeros(2, 1, 4, 4).long(), torch.zeros(2, 1, 4, 4)], ids=["map", "channel", "float"]
)
def test_single_foreground_channel_takes_any_form_of_map(label):
    target = OneHotTarget(activation="sigmoid")(label, 1, spatial_dims=2)
    assert target.probs.shape == (2, 1, 4, 4)


def test_the_distribution_is_made_once_and_only_when_read():
    target = SVLSTarget()(torch.zeros(1, 4, 4).long(), 2)
    assert target._probs is None
    assert target._one_hot is None
    assert target.probs is target.probs


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [
        (torch.tensor([[0, 1, 255, 7]]), {}, r"Expected labels in 0 to 1 or ignore_index=-100, but got \[7, 255\]. Set `ignore_index=255`"),
        (torch.tensor([[0, -1]]), {}, r"but got \[-1\]"),
        (torch.zeros(2, 2, 8, 8).long(), {"spatial_dims": 2}, "Pass one-hot labels as floating"),
        (torch.zeros(2, 3, 8, 8), {"spatial_dims": 2}, "Expected labels with 2 channels under softmax"),
        (torch.zeros(2, 1, 2, 2, 2, 2), {}, "Expected labels with 1 to 3 spatial dimensions"),
        (torch.full((1, 1, 3), 0.5), {}, "Expected whole class numbers"),
        (torch.full((1, 2, 3), 3.0), {}, "Expected label entries in"),
        (torch.full((1, 2, 3), 0.5), {"ignore_index": 0}, r"Expected `ignore_index` outside \[0, 1\] for soft labels"),
        (torch.zeros(1, 4), {"activation": "tanh"}, "Expected `activation` to be one of"),
    ],
)
def test_errors_say_what_was_expected(label, options, message):
    with pytest.raises(ValueError, match=message):
        one_hot_target(label, 2, **options)


def test_one_class_under_softmax_is_refused():
    with pytest.raises(ValueError, match="use activation='sigmoid'"):
        one_hot_target(torch.zeros(1, 4).long(), 1)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 8, 9), torch.long, "Resample the logits or the target"),
        ((3, 8, 8), torch.long, "2 images"),
        ((2, 5, 8, 8), torch.float32, "Expected 1 or 3 channels"),
        ((2, 8, 8), torch.float32, r"target.unsqueeze\(1\)"),
    ],
)
def test_labels_that_do_not_fit_the_logits_are_refused(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        align_label(torch.zeros(shape, dtype=dtype), torch.zeros(2, 3, 8, 8))


def test_volume_of_depth_one_keeps_its_depth():
    assert align_label(torch.zeros(2, 1, 8, 8).long(), torch.zeros(2, 3, 1, 8, 8)).shape == (2, 1, 1, 8, 8)


@pytest.mark.parametrize("label", [156, 255], ids=str)
def test_a_byte_is_not_taken_for_an_ignored_label_it_cannot_hold(label):
    # -100 in 8 bits is 156.
    with pytest.raises(ValueError, match=rf"ignore_index=-100, but got \[{label}\]"):
        one_hot_target(torch.tensor([[0, label]], dtype=torch.uint8), 3)
    assert one_hot_target(torch.tensor([[0, label]], dtype=torch.uint8), 3, ignore_index=label).valid.tolist() == [[True, False]]
