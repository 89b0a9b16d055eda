"""Networks for 2D and 3D volumes, built by MONAI.

All of them take ``in_channels``, ``num_classes`` and ``spatial_dims`` under these names, whatever MONAI calls them, and return logits. Sizes are in voxels;
an input's sides must be divisible by the product of the strides (padding to a patch of such a size is the loader's and the sliding window's business).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from densecal.registry import MODELS

__all__ = ["dynunet", "segresnet", "swin_unetr", "unet"]


@MODELS.register("unet")
def unet(
    in_channels: int,
    num_classes: int,
    *,
    spatial_dims: int = 3,
    channels: Sequence[int] = (16, 32, 64, 128),
    strides: int | Sequence[int] = 2,
    num_res_units: int = 0,
    norm: str = "instance",
    dropout: float = 0.0,
) -> nn.Module:
    """U-Net of MONAI: one convolution (or ``num_res_units`` of them with a shortcut) a level.

    Args:
        in_channels: Channels of the image.
        num_classes: Channels of the logits.
        spatial_dims: 2 or 3.
        channels: Features at each level.
        strides: Downsampling between levels: one number for all, or one for each of the ``len(channels) - 1`` steps.
        num_res_units: Convolutions of a residual unit; 0 for plain convolutions.
        norm: Normalisation by MONAI's name (``"instance"``, ``"batch"``, ...).
        dropout: Probability of zeroing a feature in training, in [0, 1).

    Reference:
        Ronneberger, Fischer and Brox, "U-Net", MICCAI 2015, arXiv:1505.04597.

    Example:
        >>> import torch
        >>> unet(1, 3, spatial_dims=2, channels=(4, 8))(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 3, 8, 8])
    """
    from monai.networks.nets import UNet

    steps = [strides] * (len(channels) - 1) if isinstance(strides, int) else list(strides)
    return UNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=num_classes,
        channels=list(channels),
        strides=steps,
        num_res_units=num_res_units,
        norm=norm,
        dropout=dropout,
    )


@MODELS.register("dynunet")
def dynunet(
    in_channels: int,
    num_classes: int,
    *,
    spatial_dims: int = 3,
    filters: Sequence[int] = (32, 64, 128, 256),
    strides: int | Sequence[int] = 2,
    kernel_size: int = 3,
    deep_supervision: bool = True,
    deep_supervision_heads: int = 2,
    residual: bool = False,
    dropout: float = 0.0,
) -> nn.Module:
    """nnU-Net's network (MONAI's DynUNet), with extra outputs at coarser levels while training.

    Args:
        in_channels: Channels of the image.
        num_classes: Channels of the logits.
        spatial_dims: 2 or 3.
        filters: Features at each level.
        strides: Downsampling between levels: one number for all, or one for each of the ``len(filters) - 1`` steps.
        kernel_size: Side of the convolutions in voxels.
        deep_supervision: Return ``deep_supervision_heads`` further outputs in training mode, as MONAI does: stacked ``(N, heads + 1, C, *spatial)``.
        deep_supervision_heads: Number of further outputs, at most ``len(filters) - 2``.
        residual: Use residual blocks.
        dropout: Probability of zeroing a feature in training, in [0, 1).

    Reference:
        Isensee et al., "nnU-Net", Nature Methods 2021, arXiv:1904.08128.
    """
    from monai.networks.nets import DynUNet

    levels = len(filters)
    steps = [strides] * (levels - 1) if isinstance(strides, int) else list(strides)
    return DynUNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=num_classes,
        kernel_size=[kernel_size] * levels,
        strides=[1, *steps],
        upsample_kernel_size=steps,
        filters=list(filters),
        dropout=dropout or None,
        deep_supervision=deep_supervision,
        deep_supr_num=deep_supervision_heads,
        res_block=residual,
    )


@MODELS.register("segresnet")
def segresnet(
    in_channels: int,
    num_classes: int,
    *,
    spatial_dims: int = 3,
    init_filters: int = 16,
    blocks_down: Sequence[int] = (1, 2, 2, 4),
    blocks_up: Sequence[int] = (1, 1, 1),
    dropout: float = 0.0,
) -> nn.Module:
    """Residual encoder-decoder of the BraTS 2018 winner (MONAI's SegResNet, without the autoencoder branch).

    Args:
        in_channels: Channels of the image.
        num_classes: Channels of the logits.
        spatial_dims: 2 or 3.
        init_filters: Features at the first level; each level doubles them. A multiple of 8.
        blocks_down: Residual blocks at each level of the encoder.
        blocks_up: Residual blocks at each level of the decoder, one fewer.
        dropout: Probability of zeroing a feature after the first convolution in training, in [0, 1).

    Reference:
        Myronenko, "3D MRI brain tumor segmentation using autoencoder regularization", 2018, arXiv:1810.11654.
    """
    from monai.networks.nets import SegResNet

    return SegResNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=num_classes,
        init_filters=init_filters,
        blocks_down=tuple(blocks_down),
        blocks_up=tuple(blocks_up),
        dropout_prob=dropout or None,
    )


@MODELS.register("swin_unetr")
def swin_unetr(
    in_channels: int,
    num_classes: int,
    *,
    spatial_dims: int = 3,
    feature_size: int = 24,
    depths: Sequence[int] = (2, 2, 2, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """Swin transformer encoder with a convolutional decoder (MONAI's SwinUNETR). Patch sides must be divisible by 32.

    Args:
        in_channels: Channels of the image.
        num_classes: Channels of the logits.
        spatial_dims: 2 or 3.
        feature_size: Features of the first stage, a multiple of 12.
        depths: Layers of each stage.
        num_heads: Attention heads of each stage.
        dropout: Dropout probability of the transformer, in [0, 1).
        gradient_checkpointing: Trade time for memory in training.

    Reference:
        Hatamizadeh et al., "Swin UNETR", 2022, arXiv:2201.01266.
    """
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(
        in_channels=in_channels,
        out_channels=num_classes,
        spatial_dims=spatial_dims,
        feature_size=feature_size,
        depths=tuple(depths),
        num_heads=tuple(num_heads),
        drop_rate=dropout,
        use_checkpoint=gradient_checkpointing,
    )
