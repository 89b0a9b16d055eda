"""Segmentation networks by name. Every one returns raw logits ``(N, C, *spatial)``."""

from densecal.models.images import SupervisedNetwork, architecture_options, smp
from densecal.models.volumes import dynunet, segresnet, swin_unetr, unet

__all__ = ["SupervisedNetwork", "architecture_options", "dynunet", "segresnet", "smp", "swin_unetr", "unet"]
