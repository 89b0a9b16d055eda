"""Networks for images, built by segmentation-models-pytorch: any of its architectures on any of its encoders, and on those of timm.

A pair has a name of its own, ``<architecture>_<encoder>``: ``unet_resnet18``, ``deeplabv3plus_resnet101``, ``segformer_mit_b0``, ``unet_tu-convnext_tiny``.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densecal.checks import check_choice, check_non_negative
from densecal.registry import MODELS, near_matches

__all__ = ["SupervisedNetwork", "architecture_options", "smp"]

_NOT_AN_OPTION = ("self", "encoder_name", "encoder_weights", "encoder_depth", "in_channels", "classes", "activation", "aux_params", "upsampling")
"""Arguments that have another name here, or would change what a network returns or its size."""

_WITH_LEVELS = ("unet", "manet", "linknet")
"""Architectures whose decoders are a list of blocks, each of twice the resolution of the one before."""


@MODELS.register("smp")
def smp(
    in_channels: int,
    num_classes: int,
    *,
    spatial_dims: int = 2,
    architecture: str = "unet",
    encoder: str = "resnet34",
    weights: str | None = None,
    encoder_depth: int | None = None,
    auxiliary_head: bool = False,
    auxiliary_weight: float = 0.4,
    deep_supervision_heads: int = 0,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Any architecture of segmentation-models-pytorch with any encoder.

    Sides of an input must be divisible by the encoder's output stride, 32 for most (the pixels of a window are the loader's and the sliding window's business).
    Parameters that no logit depends on, such as the stages of an encoder below ``encoder_depth``, are frozen: training in several processes
    would wait for their gradients. Weights lie in memory with the channels last, and so do the logits.

    Args:
        in_channels: Channels of the image. Pretrained weights of the first convolution are adapted to other numbers than 3.
        num_classes: Channels of the logits.
        spatial_dims: 2.
        architecture: ``"unet"``, ``"unetplusplus"``, ``"manet"``, ``"linknet"``, ``"fpn"``, ``"pspnet"``, ``"pan"``, ``"deeplabv3"``, ``"deeplabv3plus"``,
            ``"upernet"``, ``"segformer"`` or ``"dpt"``.
        encoder: Name of one of smp's encoders, or of a model of timm's, which smp writes ``"tu-<name>"``. A name in both is smp's without the ``tu-``.
        weights: Pretrained weights of the encoder: ``"imagenet"``, or another name that the encoder has (``"ssl"``, ``"advprop"``; for timm's a tag such as
            ``"in12k_ft_in1k"``). They are downloaded once. None: random weights.
        encoder_depth: Stages of the encoder, each of half the resolution of the one before. None: what the architecture takes.
        auxiliary_head: Add a second output while training, from the last stage of the encoder but one, at the size of the image: the network returns
            ``[logits, auxiliary]``.
        auxiliary_weight: Weight of the auxiliary output's loss, >= 0; that of the logits is 1. The task reads both from the network's ``output_weights``.
        deep_supervision_heads: Number of further outputs while training, at 1/2, 1/4, ... of the resolution, for unet, manet and linknet. Excludes
            ``auxiliary_head``.
        options: Further arguments of the architecture under smp's names, such as ``{"decoder_channels": [128, 64, 32, 16, 8]}``; with an encoder of timm's
            also those of the encoder.

    Raises:
        ValueError: If a name or an option is unknown, naming the nearest, or the parts do not go together.
        OSError: If pretrained weights cannot be downloaded.

    Reference:
        Iakubovskii, "Segmentation Models Pytorch", 2019, https://github.com/qubvel-org/segmentation_models.pytorch. Auxiliary head and its weight: Zhao et al.,
        "Pyramid Scene Parsing Network", CVPR 2017, arXiv:1612.01105; unlike there, its output is brought to the size of the image instead of the label to its own,
        as in mmsegmentation and torchvision.

    Example:
        >>> network = smp(3, 11, architecture="fpn", encoder="resnet18")
        >>> network(torch.zeros(2, 3, 64, 96)).shape
        torch.Size([2, 11, 64, 96])
    """
    if spatial_dims != 2:
        raise ValueError(
            f"Expected images, spatial_dims=2, but got {spatial_dims}: segmentation-models-pytorch has no networks for volumes. "
            "Use unet, dynunet, segresnet or swin_unetr."
        )
    check_choice("architecture", architecture, tuple(_architectures()))
    check_non_negative("auxiliary_weight", auxiliary_weight)
    given = dict(options or {})
    found = _find_encoder(encoder)
    if found is None:
        raise ValueError(f"Unknown encoder {encoder!r}. {_near_encoders(encoder)}")
    known = architecture_options(architecture)
    for name in sorted(set(given) - set(known)):
        # Those that an encoder of timm's takes are not known here; what is nearly an option of the architecture is not meant for it.
        if not found.startswith("tu-") or difflib.get_close_matches(name, known, cutoff=0.85):
            raise ValueError(f"{architecture} has no option {name!r}. {near_matches(name, known)}")
    if encoder_depth is not None:
        given["encoder_depth"] = encoder_depth
        if architecture == "pspnet":
            given["upsampling"] = 2**encoder_depth
    if architecture == "dpt":
        given.setdefault("dynamic_img_size", True)
    network = _build(architecture, found, weights, {**given, "in_channels": in_channels, "classes": num_classes})
    if auxiliary_head or deep_supervision_heads:
        network = SupervisedNetwork(
            network,
            num_classes,
            auxiliary_weight=auxiliary_weight if auxiliary_head else None,
            deep_supervision_heads=deep_supervision_heads,
        )
    _freeze_unused(network, in_channels)
    # Convolutions follow the layout of their weights, and this is the one that they are written for; batches need not come in it.
    return network.to(memory_format=torch.channels_last)


def architecture_options(architecture: str) -> dict[str, Any]:
    """The further arguments of an architecture and their defaults, as ``options`` of :func:`smp` takes them.

    Example:
        >>> sorted(architecture_options("segformer"))
        ['decoder_segmentation_channels']
    """
    parameters = inspect.signature(_architectures()[architecture].__init__).parameters
    return {name: p.default for name, p in parameters.items() if name not in _NOT_AN_OPTION and p.kind is not p.VAR_KEYWORD}


class SupervisedNetwork(nn.Module):
    """A network of smp's that returns further outputs while training: ``[logits, ...]``; in evaluation mode its logits alone.

    Args:
        network: The network.
        num_classes: Channels of the logits.
        auxiliary_weight: Weight of an auxiliary head's output on the last stage of the encoder but one; None for no such head.
        deep_supervision_heads: Number of heads on coarser levels of the decoder.

    Attributes:
        output_weights: Weights of the outputs' losses, for :class:`densecal.losses.DeepSupervisionLoss`; None leaves them to it.

    Raises:
        ValueError: If the network has no such levels, or both kinds of heads are asked for.

    Example:
        >>> network = smp(3, 2, encoder="resnet18", deep_supervision_heads=2)
        >>> [tuple(output.shape[2:]) for output in network.train()(torch.zeros(2, 3, 64, 64))]
        [(64, 64), (32, 32), (16, 16)]
        >>> network.eval()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 2, 64, 64])
    """

    def __init__(self, network: nn.Module, num_classes: int, *, auxiliary_weight: float | None, deep_supervision_heads: int = 0) -> None:
        super().__init__()
        self.network = network
        self.output_weights: tuple[float, ...] | None = None
        encoder, decoder = network.get_submodule("encoder"), network.get_submodule("decoder")
        self.auxiliary = auxiliary_weight is not None
        if auxiliary_weight is not None:
            if deep_supervision_heads:
                raise ValueError("Expected auxiliary_head or deep_supervision_heads, but got both.")
            channels: list[int] = list(encoder.out_channels)  # type: ignore[arg-type]
            if len(channels) < 2 or channels[-2] == 0:
                raise ValueError(f"Expected an encoder of more stages for an auxiliary head, but it has {len(channels)}. Raise encoder_depth.")
            self.output_weights = (1.0, float(auxiliary_weight))
            self.heads = nn.ModuleList([_fcn_head(channels[-2], num_classes)])
        else:
            blocks = getattr(decoder, "blocks", None)
            if not isinstance(blocks, nn.ModuleList):
                raise ValueError(f"Expected one of {_WITH_LEVELS} for deep_supervision_heads, but got {type(network).__name__}. Use auxiliary_head.")
            if not 0 < deep_supervision_heads < len(blocks):
                raise ValueError(f"Expected deep_supervision_heads in [0, {len(blocks) - 1}], but got {deep_supervision_heads}.")
            widths = [_width(block) for block in blocks[-2 : -2 - deep_supervision_heads : -1]]
            self.heads = nn.ModuleList([nn.Conv2d(width, num_classes, 1) for width in widths])

    @property
    def encoder(self) -> nn.Module:
        """The network's encoder, which may learn at a rate of its own."""
        return self.network.get_submodule("encoder")

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits ``(N, C, H, W)`` of images ``(N, C_in, H, W)``; while training a list of outputs, the logits first."""
        if not self.training:
            return self.network(image)
        seen: list[Any] = []
        # The hooks live as long as this call, so that a copy of the network does not write into the original's list.
        hooks = [module.register_forward_hook(lambda module, inputs, output: seen.append(output)) for module in self._watched()]
        try:
            logits: Tensor = self.network(image)
        finally:
            for hook in hooks:
                hook.remove()
        if not self.auxiliary:
            return [logits, *(head(level) for head, level in zip(self.heads, reversed(seen), strict=True))]
        features = seen[0][0] if isinstance(seen[0], tuple) else seen[0]  # dpt's encoder returns its tokens, too
        auxiliary = self.heads[0](features[-2])
        return [logits, F.interpolate(auxiliary, size=image.shape[2:], mode="bilinear", align_corners=False)]

    def _watched(self) -> list[nn.Module]:
        if self.auxiliary:
            return [self.encoder]
        blocks = self.network.get_submodule("decoder").blocks
        assert isinstance(blocks, nn.ModuleList)
        return list(blocks[-1 - len(self.heads) : -1])


def _fcn_head(in_channels: int, num_classes: int) -> nn.Sequential:
    width = max(in_channels // 4, 1)
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Conv2d(width, num_classes, 1),
    )


def _width(block: nn.Module) -> int:
    """Channels that a decoder's block returns: those of its last convolution."""
    return [module.out_channels for module in block.modules() if isinstance(module, nn.Conv2d)][-1]


def _architectures() -> dict[str, type[nn.Module]]:
    from segmentation_models_pytorch import MODEL_ARCHITECTURES_MAPPING

    return MODEL_ARCHITECTURES_MAPPING


def _encoders() -> dict[str, Any]:
    from segmentation_models_pytorch.encoders import encoders

    return encoders


@functools.cache
def _timm_models() -> frozenset[str]:
    import timm

    return frozenset(timm.list_models())


def _find_encoder(name: str) -> str | None:
    """smp's name of an encoder, None if there is none."""
    if name in _encoders():
        return name
    model = name.removeprefix("tu-")
    return f"tu-{model}" if model.partition(".")[0] in _timm_models() else None


def _near_encoders(name: str) -> str:
    model = name.removeprefix("tu-")
    near = [*difflib.get_close_matches(name, _encoders(), n=2), *(f"tu-{m}" for m in difflib.get_close_matches(model, _timm_models(), n=2))]
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return f"{hint}densecal.list_models('unet_*') lists what there is."


def _pretrained(encoder: str, weights: str | None) -> tuple[str, str | bool | None]:
    """What smp calls an encoder with these weights, and the weights."""
    if weights is None:
        return encoder, None
    if not encoder.startswith("tu-"):
        available = list(_encoders()[encoder]["pretrained_settings"])
        if weights not in available:
            raise ValueError(f"The encoder {encoder} has no weights {weights!r}. {near_matches(weights, available)}")
        return encoder, weights
    from timm.models import get_arch_pretrained_cfgs

    model, _, tag = encoder.removeprefix("tu-").partition(".")
    tags = [name.partition(".")[2] for name in get_arch_pretrained_cfgs(model)]
    if not tags:
        raise ValueError(f"timm has no weights for {model}. Set weights to None (model.weights=null) to train from scratch.")
    wanted = tag if weights == "imagenet" else weights
    if wanted and wanted not in tags:
        raise ValueError(f"The encoder tu-{model} has no weights {wanted!r}. {near_matches(wanted, [*filter(None, tags), 'imagenet'])}")
    if tag and wanted != tag:
        raise ValueError(f"Expected one name for the weights, but the encoder {encoder} says {tag!r} and `weights` {weights!r}.")
    return f"tu-{model}.{wanted}" if wanted else f"tu-{model}", True


def _build(architecture: str, encoder: str, weights: str | None, arguments: Mapping[str, Any]) -> nn.Module:
    name, pretrained = _pretrained(encoder, weights)
    try:
        return _architectures()[architecture](encoder_name=name, encoder_weights=pretrained, **arguments)
    except (ValueError, TypeError, KeyError, AssertionError, NotImplementedError) as error:
        reason = str(error.args[0] if error.args else type(error).__name__).strip().splitlines()[0]
        raise ValueError(f"Cannot build {architecture} with the encoder {encoder}: {reason}") from error
    except Exception as error:
        if weights is None:
            raise
        from huggingface_hub.constants import HF_HUB_CACHE

        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0].rstrip(".") if str(cause).strip() else type(cause).__name__
        raise OSError(
            f"Cannot load the weights {weights!r} of the encoder {encoder} ({reason}). They are downloaded from huggingface.co once and kept in "
            f"{HF_HUB_CACHE}: run once where there is internet, or set weights to None (model.weights=null) to train from scratch."
        ) from error


def _freeze_unused(network: nn.Module, in_channels: int) -> None:
    """Turn gradients off for parameters that no output depends on. Computed on shapes alone, without numbers."""
    shadow = copy.deepcopy(network).to("meta").train()
    try:
        outputs = shadow(torch.zeros(2, in_channels, 224, 224, device="meta"))
    except (RuntimeError, ValueError, AssertionError):
        return  # an encoder for another size of image
    names, parameters = zip(*shadow.named_parameters(), strict=True)
    total = sum(output.sum() for output in (outputs if isinstance(outputs, list) else [outputs]))
    for name, gradient in zip(names, torch.autograd.grad(total, parameters, allow_unused=True), strict=True):
        if gradient is None:
            network.get_parameter(name).requires_grad_(False)


def _pair_names() -> Iterator[str]:
    for architecture in _architectures():
        if architecture != "dpt":  # takes vision transformers, which are timm's
            yield from (f"{architecture}_{encoder}" for encoder in _encoders())
        yield from (f"{architecture}_tu-{model}" for model in _timm_models())


@MODELS.register_family(_pair_names)
def _find_pair(name: str) -> Callable[..., nn.Module] | None:
    architecture, _, encoder = name.partition("_")
    if architecture not in _architectures() or _find_encoder(encoder) is None:
        return None
    return functools.partial(smp, architecture=architecture, encoder=encoder)
