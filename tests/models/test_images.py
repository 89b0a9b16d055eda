"""Networks by segmentation-models-pytorch: every architecture, encoders of smp's and of timm's, and what is said where parts do not go together."""

from __future__ import annotations

import copy
import subprocess
import sys

import huggingface_hub
import pytest
import segmentation_models_pytorch
import torch
from torch import nn

import densecal
from densecal.models import SupervisedNetwork, architecture_options, smp
from densecal.models.pretrained import without_pretrained
from densecal.registry import MODELS

ARCHITECTURES = sorted(segmentation_models_pytorch.MODEL_ARCHITECTURES_MAPPING)
VIT = "tu-vit_tiny_patch16_224"


def on_meta(**arguments) -> nn.Module:
    """A network of shapes without numbers: building and running it takes no time."""
    with torch.device("meta"):
        return smp(3, 5, **arguments)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_returns_logits_of_the_input_size(architecture):
    network = on_meta(architecture=architecture, encoder=VIT if architecture == "dpt" else "resnet18", auxiliary_head=True)
    image = torch.zeros(2, 3, 128, 160, device="meta")
    assert network.eval()(image).shape == (2, 5, 128, 160)
    assert [output.shape for output in network.train()(image)] == [(2, 5, 128, 160)] * 2


@pytest.mark.parametrize("encoder", ["mobilenet_v2", "mit_b0", "vgg11_bn", "tu-convnext_atto", "resnet10t", "tu-resnet18.a1_in1k"])
def test_encoders_of_smp_and_timm(encoder):
    # mit_b0 reads numbers while it is built.
    network = smp(3, 5, architecture="fpn", encoder=encoder).to("meta") if encoder == "mit_b0" else on_meta(architecture="fpn", encoder=encoder)
    assert network(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 5, 64, 64)


def test_a_bare_name_of_timm_is_found_and_one_of_both_is_smps():
    assert type(on_meta(encoder="convnext_atto").encoder).__name__ == "TimmUniversalEncoder"
    assert type(on_meta(encoder="tu-resnet18").encoder).__name__ == "TimmUniversalEncoder"
    assert type(on_meta(encoder="resnet18").encoder).__name__ == "ResNetEncoder"


@pytest.mark.parametrize(
    ("architecture", "encoder"), [("pspnet", "resnet18"), ("unet", "efficientnet-b0"), ("deeplabv3plus", "tu-mobilenetv3_small_050")]
)
def test_gradients_reach_every_parameter_that_is_trained(architecture, encoder):
    """PSPNet takes three stages of a resnet: the other two, which an optimizer would carry along and DDP would wait for, are frozen."""
    torch.manual_seed(0)
    network = smp(2, 3, architecture=architecture, encoder=encoder, auxiliary_head=True).train()
    outputs = network(torch.randn(2, 2, 64, 64))
    sum(output.square().mean() for output in outputs).backward()
    with_gradient = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    frozen = {".".join(name.split(".")[1:3]) for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert ({"encoder.layer3", "encoder.layer4"} == frozen) == (architecture == "pspnet")


def test_logits_are_those_of_smp():
    """Built with the same arguments, loaded with the same weights, without an activation."""
    torch.manual_seed(0)
    network = smp(3, 4, encoder="resnet18", options={"decoder_channels": [32, 16, 8, 8, 8]}).eval()
    theirs = segmentation_models_pytorch.Unet("resnet18", encoder_weights=None, classes=4, decoder_channels=[32, 16, 8, 8, 8]).eval()
    theirs.load_state_dict(network.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(image), theirs(image), rtol=1e-4, atol=1e-5)  # their channels are not last


def test_channels_lie_last_and_stay_there(tmp_path):
    network = smp(3, 2, encoder="resnet18")
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    network.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in network.parameters() if p.ndim == 4)
    assert network.eval()(torch.zeros(1, 3, 32, 64)).is_contiguous(memory_format=torch.channels_last)


def test_an_auxiliary_head_changes_no_logits():
    torch.manual_seed(0)
    network = smp(3, 4, architecture="pspnet", encoder="resnet18", auxiliary_head=True, auxiliary_weight=0.25)
    assert isinstance(network, SupervisedNetwork)
    assert network.output_weights == (1.0, 0.25)
    assert network.encoder is network.network.encoder, "so that it can learn at a rate of its own"
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network.eval()(image), network.network(image))
    # FCN head of a stage of 64 channels (resnet18 at a stride of 4): 3x3 to a quarter, norm, ReLU, dropout, 1x1.
    shapes = [tuple(parameter.shape) for parameter in network.heads.parameters()]
    assert shapes == [(16, 64, 3, 3), (16,), (16,), (4, 16, 1, 1), (4,)]
    assert [module.p for module in network.heads.modules() if isinstance(module, nn.Dropout)] == [0.1]


def test_an_auxiliary_output_is_the_head_on_the_last_stage_but_one():
    torch.manual_seed(0)
    network = smp(3, 4, architecture="deeplabv3plus", encoder="resnet18", auxiliary_head=True)
    for module in network.modules():
        module.training = isinstance(module, SupervisedNetwork)  # two outputs, nothing random
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = nn.functional.interpolate(network.heads[0](network.network.encoder(image)[-2]), size=(64, 64), mode="bilinear")
        torch.testing.assert_close(network(image)[1], expected)


@pytest.mark.parametrize("architecture", ["unet", "manet", "linknet"])
def test_deep_supervision_halves_the_resolution(architecture):
    network = on_meta(architecture=architecture, encoder="resnet18", deep_supervision_heads=3)
    outputs = network.train()(torch.zeros(2, 3, 64, 96, device="meta"))
    assert [tuple(output.shape) for output in outputs] == [(2, 5, 64, 96), (2, 5, 32, 48), (2, 5, 16, 24), (2, 5, 8, 12)]
    assert network.output_weights is None


def test_a_copy_has_outputs_of_its_own():
    """As an average of weights over time is one."""
    torch.manual_seed(0)
    network = smp(3, 2, encoder="resnet18", deep_supervision_heads=1).train()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in twin.heads.parameters():
            parameter.zero_()
        outputs = twin(torch.randn(2, 3, 32, 32))
    assert outputs[1].abs().max() == 0
    assert outputs[0].abs().max() > 0


def test_depth_of_the_encoder_keeps_the_size():
    assert on_meta(architecture="pspnet", encoder="resnet18", encoder_depth=4)(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 5, 64, 64)
    network = on_meta(encoder="resnet18", encoder_depth=3, options={"decoder_channels": [8, 8, 8]})
    assert network(torch.zeros(2, 3, 40, 40, device="meta")).shape == (2, 5, 40, 40)


REFUSED = {
    "volumes": ({"spatial_dims": 3}, r"spatial_dims=2, but got 3.*Use unet, dynunet, segresnet or swin_unetr"),
    "architecture": ({"architecture": "unett"}, r"Expected `architecture` to be one of .*'segformer'.* but got 'unett'"),
    "encoder": ({"encoder": "resnet19"}, r"Unknown encoder 'resnet19'\. Did you mean 'resnet18'"),
    "encoder-timm": ({"encoder": "tu-convnext_tinny"}, r"Did you mean 'tu-convnext_tiny'"),
    "option": ({"options": {"decoder_chanels": [8]}}, r"unet has no option 'decoder_chanels'\. Did you mean 'decoder_channels'"),
    "option-timm": ({"encoder": "tu-resnet18", "options": {"decoder_chanels": [8]}}, r"unet has no option 'decoder_chanels'\. Did you mean"),
    "option-of-no-encoder": ({"encoder": "tu-resnet18", "options": {"zzz": 1}}, r"Cannot build unet with the encoder tu-resnet18: .*'zzz'"),
    "option-activation": ({"options": {"activation": "softmax"}}, r"unet has no option 'activation'"),
    "weights": ({"weights": "imagnet"}, r"The encoder resnet34 has no weights 'imagnet'\. Did you mean 'imagenet'"),
    "weights-timm": ({"encoder": "tu-convnext_tiny", "weights": "fb_in1"}, r"tu-convnext_tiny has no weights 'fb_in1'\. Did you mean 'fb_in1k'"),
    "weights-twice": ({"encoder": "tu-convnext_tiny.fb_in1k", "weights": "fb_in22k"}, r"says 'fb_in1k' and `weights` 'fb_in22k'"),
    "weights-none": ({"encoder": "tu-resnet51q.zzz", "weights": "imagenet"}, r"tu-resnet51q has no weights 'zzz'"),
    "parts": ({"architecture": "linknet", "encoder": "mit_b0"}, r"Cannot build linknet with the encoder mit_b0: .*not supported"),
    "dpt": ({"architecture": "dpt"}, r"Cannot build dpt with the encoder resnet34: Only Timm encoders"),
    "levels": ({"architecture": "fpn", "deep_supervision_heads": 1}, r"one of \('unet', 'manet', 'linknet'\).* got FPN"),
    "levels-too-many": ({"encoder": "resnet18", "deep_supervision_heads": 5}, r"deep_supervision_heads in \[0, 4\], but got 5"),
    "both-heads": (
        {"encoder": "resnet18", "deep_supervision_heads": 1, "auxiliary_head": True},
        r"auxiliary_head or deep_supervision_heads, but got both",
    ),
    "auxiliary-weight": ({"auxiliary_weight": -1.0}, r"auxiliary_weight"),
}


@pytest.mark.parametrize(("arguments", "text"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together_is_said_in_one_line(arguments, text):
    with pytest.raises(ValueError, match=text) as refused:
        on_meta(**arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet18"])
def test_weights_that_cannot_be_downloaded(encoder, monkeypatch, tmp_path):
    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("No connection.") from OSError("Name or service not known")

    monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", offline)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"weights 'imagenet' of the encoder .*resnet18 \(Name or service not known\).*model\.weights=null") as refused:
        smp(3, 2, encoder=encoder, weights="imagenet")
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("encoder", "weights", "asked"),
    [
        ("resnet18", "ssl", ("resnet18", "ssl")),
        ("tu-convnext_tiny", "imagenet", ("tu-convnext_tiny", True)),
        ("convnext_tiny", "fb_in22k", ("tu-convnext_tiny.fb_in22k", True)),
        ("tu-convnext_tiny.fb_in22k", "imagenet", ("tu-convnext_tiny.fb_in22k", True)),
        ("tu-convnext_tiny.fb_in22k", None, ("tu-convnext_tiny.fb_in22k", None)),
    ],
)
def test_weights_as_smp_takes_them(encoder, weights, asked, monkeypatch):
    seen = []

    class Unet(nn.Conv2d):
        def __init__(self, encoder_name, encoder_weights, in_channels, classes):
            seen.append((encoder_name, encoder_weights))
            super().__init__(in_channels, classes, 1)

    monkeypatch.setitem(segmentation_models_pytorch.MODEL_ARCHITECTURES_MAPPING, "unet", Unet)
    smp(3, 2, encoder=encoder, weights=weights)
    assert seen == [asked]


def test_pairs_have_names():
    assert isinstance(densecal.create_model("linknet_resnet18", in_channels=1, num_classes=2), segmentation_models_pytorch.Linknet)
    assert "unet_tu-convnext_tiny" in MODELS
    assert "unet_convnext_tiny" in MODELS
    assert "unet_resnet19" not in MODELS
    assert densecal.list_models() == sorted(["dynunet", "segresnet", "smp", "swin_unetr", "unet"])
    assert densecal.list_models("unet_resnet18") == ["unet_resnet18"]
    assert {"pan_resnet18", "pan_tu-resnet18"} <= set(densecal.list_models("pan_*"))


@pytest.mark.parametrize(("name", "near"), [("unet_resnet19", "unet_resnet18"), ("deeplabv4_resnet50", "deeplabv3_resnet50"), ("dynunt", "dynunet")])
def test_a_mistyped_pair_names_the_nearest(name, near):
    with pytest.raises(ValueError, match=rf"Unknown model '{name}'\. Did you mean '{near}'.*Valid: dynunet, .* more\.$") as refused:
        densecal.create_model(name, 3, 2)
    assert len(str(refused.value)) < 300


def test_options_are_the_arguments_of_the_architecture():
    assert architecture_options("pspnet") == {"psp_out_channels": 512, "decoder_use_norm": "batchnorm", "psp_dropout": 0.2}
    assert {name for name in ARCHITECTURES if "kwargs" in architecture_options(name)} == set()


def test_constructors_without_pretrained_weights():
    assert without_pretrained(smp) == {"weights": None}
    assert without_pretrained(segmentation_models_pytorch.Unet) == {"encoder_weights": None}
    assert without_pretrained(densecal.models.unet) == {}


def test_the_core_imports_none_of_it():
    code = "import sys, densecal, densecal.models; densecal.list_models(); print(*[m for m in ('segmentation_models_pytorch','timm','torchvision','monai') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
