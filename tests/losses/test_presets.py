"""Promises that every preset keeps: shapes, types, ignored pixels, empty batches, copies, compilation."""

import copy
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from cases import each_dimension, make_case
from losses_by_name import NAMES, evaluate, make_loss, takes

import densecal
from densecal.losses import CrossEntropyLoss, DiceCELoss, NACLLoss, SVLSLoss

each_preset = pytest.mark.parametrize("name", NAMES)
with_activation = pytest.mark.parametrize("name", [name for name in NAMES if takes(name, "activation")])


@each_preset
@each_dimension
@pytest.mark.parametrize("form", ["map", "channel", "soft"])
def test_preset_gives_a_scalar_and_a_gradient(name, spatial, form):
    case = make_case(spatial)
    target = {"map": case.label_map, "channel": case.label_map.unsqueeze(1).float(), "soft": case.soft_labels}[form]
    logits = case.logits.requires_grad_()
    value = evaluate(make_loss(name), logits, target)
    value.backward()
    assert value.shape == ()
    assert type(value) is torch.Tensor
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.any()


@each_preset
@pytest.mark.parametrize("form", ["map", "soft"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e4])
def test_nothing_at_an_ignored_pixel_has_influence(name, form, junk):
    case = make_case((5, 7))
    target = case.label_map if form == "map" else case.soft_labels
    loss = make_loss(name, class_weights=[0.5, 1.0, 2.0])
    clean, dirty = case.logits.clone().requires_grad_(), torch.where(case.valid.unsqueeze(1), case.logits, junk).requires_grad_()
    a, b = evaluate(loss, clean, target), evaluate(loss, dirty, target)
    a.backward()
    b.backward()
    assert torch.equal(a, b)
    assert clean.grad is not None
    assert dirty.grad is not None
    assert torch.equal(clean.grad, dirty.grad)
    assert not dirty.grad.movedim(1, -1)[~case.valid].any()


@each_preset
def test_ignore_index_and_default_agree(name):
    case = make_case((5, 7))
    as_255 = case.label_map.masked_fill(~case.valid, 255).to(torch.uint8)
    torch.testing.assert_close(
        evaluate(make_loss(name, ignore_index=255), case.logits, as_255), evaluate(make_loss(name), case.logits, case.label_map)
    )


@each_preset
@pytest.mark.parametrize("form", ["map", "soft"])
def test_no_valid_pixel_is_zero_on_the_graph(name, form):
    case = make_case((5, 7), ignored=1.1)
    logits = case.logits.requires_grad_()
    value = evaluate(make_loss(name), logits, case.label_map if form == "map" else case.soft_labels)
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


@each_preset
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_near_single(name, dtype):
    case = make_case((5, 7), dtype=torch.float32)
    logits = (case.logits * 10).to(dtype).requires_grad_()
    loss = make_loss(name)
    value = evaluate(loss, logits, case.label_map)
    value.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, evaluate(loss, logits.detach().float(), case.label_map))
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    assert logits.grad.isfinite().all()


@each_preset
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_certain_and_wrong_is_finite(name, dtype):
    logits = torch.full((1, 3, 4, 4), -50.0, dtype=dtype)
    logits[:, 2] = 50.0
    logits.requires_grad_()
    value = evaluate(make_loss(name), logits, torch.zeros(1, 4, 4, dtype=torch.long))
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@each_preset
def test_logits_at_the_end_of_half_precision_are_finite(name):
    """The largest that 16 bits hold, as a network under autocast gives them before it overflows."""
    case = make_case((5, 7))
    logits = (case.logits.sign() * 65504).half().requires_grad_()
    value = evaluate(make_loss(name), logits, case.label_map)
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@each_preset
def test_autocast_changes_nothing(name):
    case = make_case((5, 7), dtype=torch.float32)
    loss = make_loss(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = evaluate(loss, case.logits, case.label_map)
    torch.testing.assert_close(value, evaluate(loss, case.logits, case.label_map))


@each_preset
def test_memory_layout_does_not_matter(name):
    case = make_case((6, 7))
    loss = make_loss(name)
    expected = evaluate(loss, case.logits, case.label_map)
    strided = torch.stack([case.logits, case.logits], -1)[..., 0]
    for logits in (case.logits.contiguous(memory_format=torch.channels_last), strided):
        torch.testing.assert_close(evaluate(loss, logits, case.label_map.transpose(1, 2).contiguous().transpose(1, 2)), expected)


@each_preset
def test_copies_give_the_same(name):
    case = make_case((5, 7))
    loss = make_loss(name, class_weights=[0.5, 1.0, 2.0])
    expected = evaluate(loss, case.logits, case.label_map)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(evaluate(twin, case.logits, case.label_map), expected)
        assert twin.state_dict().keys() == loss.state_dict().keys()


# Soft labels differ in the target alone: one loss of each kind has them without --slow.
WITH_SOFT_LABELS = {"ce", "svls", "nacl", "dice_ce", "aslp"}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, id=f"{form}-{name}", marks=pytest.mark.slow if form == "soft" and name not in WITH_SOFT_LABELS else ())
        for form in ("map", "soft")
        for name in NAMES
    ],
)
def test_compiles_into_one_graph(name, form):
    torch._dynamo.reset()
    case = make_case((5, 7), dtype=torch.float32)
    target = case.label_map if form == "map" else case.soft_labels
    loss = make_loss(name)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = case.logits.clone().requires_grad_(), case.logits.clone().requires_grad_()
    evaluate(loss, a, target).backward()
    value = evaluate(compiled, b, target)
    value.backward()
    torch.testing.assert_close(value, evaluate(loss, a, target))
    torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.slow
def test_inductor_compiles_to_the_same_numbers():
    """In a process of its own: what others import (distutils) may keep inductor's compiler from starting."""
    script = """
        import torch
        from densecal.losses import SVLSLoss

        torch.manual_seed(0)
        logits, labels, loss = torch.randn(2, 3, 8, 9), torch.randint(0, 3, (2, 8, 9)), SVLSLoss()
        a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        expected, value = loss(a, labels), torch.compile(loss, fullgraph=True)(b, labels)
        expected.backward()
        value.backward()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(b.grad, a.grad)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# Shares of a box or a Gaussian do not change along an axis where the labels do not; SVLS's centre holds one half in any dimension.
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("svls", "recommended")])
def test_a_volume_repeated_along_depth_is_its_slice(name):
    case = make_case((5, 6))
    loss = make_loss(name)
    logits, label_map = (tensor.unsqueeze(2 if tensor.ndim == 4 else 1) for tensor in (case.logits, case.label_map))
    volume = evaluate(loss, logits.repeat_interleave(3, 2), label_map.repeat_interleave(3, 1))
    # The smoothing of an overlap's fraction is in pixels, of which a volume has more.
    torch.testing.assert_close(volume, evaluate(loss, case.logits, case.label_map), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if not make_loss(name).needs])  # MONAI hands over no side inputs
def test_monais_deep_supervision_goes_around_it(name):
    monai_losses = pytest.importorskip("monai.losses")
    case = make_case((8, 8), dtype=torch.float32)
    loss = make_loss(name)
    levels = [case.logits.requires_grad_(), case.logits.detach()[..., ::2, ::2].contiguous().requires_grad_()]
    value = monai_losses.DeepSupervisionLoss(loss, weights=[1.0, 0.5])(levels, case.label_map.unsqueeze(1).float())
    value.backward()
    small = torch.nn.functional.interpolate(case.label_map.unsqueeze(1).float(), size=(4, 4), mode="nearest-exact")
    torch.testing.assert_close(value, loss(levels[0], case.label_map) + 0.5 * loss(levels[1], small))
    assert all(level.grad is not None and level.grad.any() for level in levels)


@with_activation
def test_single_foreground_channel(name):
    logits = torch.randn(2, 1, 5, 7, requires_grad=True)
    label_map = torch.randint(0, 2, (2, 5, 7))
    label_map[0, :2] = -100
    loss = make_loss(name, activation="sigmoid", num_classes=1)
    value = evaluate(loss, logits, label_map)
    value.backward()
    assert logits.grad is not None
    assert not logits.grad[0, :, :2].any()
    torch.testing.assert_close(evaluate(loss, logits, label_map.unsqueeze(1)), value)
    torch.testing.assert_close(evaluate(loss, logits, label_map.unsqueeze(1).float()), value)


@with_activation
def test_overlapping_regions(name):
    logits, regions = torch.randn(2, 3, 5, 7), torch.randint(0, 2, (2, 3, 5, 7))
    loss = make_loss(name, activation="sigmoid")
    assert evaluate(loss, logits, regions).isfinite()
    with pytest.raises(ValueError, match="Stack one 0/1 map per region"):
        evaluate(loss, logits, regions[:, 0])


@each_preset
def test_meta_tensors_come_back_plain(name):
    monai_data = pytest.importorskip("monai.data")
    case = make_case((5, 7))
    loss = make_loss(name)
    value = evaluate(loss, monai_data.MetaTensor(case.logits), monai_data.MetaTensor(case.label_map.unsqueeze(1)))
    assert type(value) is torch.Tensor
    assert torch.equal(value, evaluate(loss, case.logits, case.label_map))


@pytest.mark.parametrize("name", [name for name in NAMES if takes(name, "reduction")])
def test_reduction_none_gives_one_value_per_pixel(name):
    case = make_case((5, 7))
    values = evaluate(make_loss(name, reduction="none"), case.logits, case.label_map)
    assert values.shape == case.label_map.shape
    assert not values[~case.valid].any()


def test_presets_by_hand():
    # Uniform prediction over two classes, half of each: CE log 2, Dice 1/2; zero logits are |tau - 0| = 1/2 on average away.
    logits, label_map = torch.zeros(1, 2, 4), torch.tensor([[0, 0, 1, 1]])
    log2 = torch.tensor(2.0).log()
    torch.testing.assert_close(CrossEntropyLoss()(logits, label_map), log2)
    torch.testing.assert_close(SVLSLoss()(logits, label_map), log2)
    torch.testing.assert_close(NACLLoss(weight=0.2)(logits, label_map), log2 + 0.1)
    torch.testing.assert_close(DiceCELoss(smooth=0.0)(logits, label_map), log2 + 0.5)


def test_dice_ce_per_image_is_the_mean_over_images():
    case = make_case((5, 7), ignored=0.0)
    loss = DiceCELoss(batch=False, weight_ce=0.0)
    alone = torch.stack([loss(case.logits[i : i + 1], case.label_map[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(loss(case.logits, case.label_map), alone.mean())


def test_class_weights_follow_the_module():
    loss = densecal.create_loss("dice_ce", class_weights=[1.0, 2.0]).to(torch.float64)
    assert {b.dtype for b in loss.buffers()} == {torch.float64}


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="Did you mean 'svls'"):
        densecal.create_loss("slvs")
    loss = densecal.create_loss("ce")
    with pytest.raises(TypeError, match="Expected floating `logits`"):
        loss(torch.zeros(1, 2, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="with 1 to 3 spatial dimensions"):
        loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="use activation='sigmoid'"):
        loss(torch.zeros(1, 1, 4), torch.zeros(1, 4, dtype=torch.long))


def test_import_is_light():
    code = "import sys, densecal; densecal.list_losses(); densecal.list_targets(); print(*[m for m in ('monai','lightning','hydra') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


@pytest.mark.gpu
@each_preset
@pytest.mark.parametrize("form", ["map", "soft"])
def test_gpu_and_cpu_agree(name, form):
    case = make_case((5, 7, 6), dtype=torch.float32)
    target = case.label_map if form == "map" else case.soft_labels
    loss = make_loss(name, class_weights=[0.5, 1.0, 2.0])
    here, there = case.logits.clone().requires_grad_(), case.logits.cuda().requires_grad_()
    expected, value = evaluate(loss, here, target), evaluate(loss.cuda(), there, target.cuda())
    expected.backward()
    value.backward()
    assert here.grad is not None
    assert there.grad is not None
    torch.testing.assert_close(value.cpu(), expected)
    torch.testing.assert_close(there.grad.cpu(), here.grad)
    with torch.autocast("cuda", dtype=torch.float16):
        torch.testing.assert_close(evaluate(loss, there, target.cuda()).cpu(), expected)


@pytest.mark.gpu
def test_spacing_may_live_on_the_gpu_or_not():
    case = make_case((5, 7, 6), dtype=torch.float32)
    spacing = torch.tensor([[1.0, 1.0, 3.0], [2.0, 1.0, 1.0]])
    loss = SVLSLoss(unit="mm")
    expected = loss(case.logits, case.label_map, context={"spacing": spacing})
    for where in ("cpu", "cuda"):
        value = loss(case.logits.cuda(), case.label_map.cuda(), context={"spacing": spacing.to(where)})
        torch.testing.assert_close(value.cpu(), expected)
