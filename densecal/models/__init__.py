"""Segmentation networks by name. Every one returns raw logits ``(N, C, *spatial)``."""

from densecal.models.volumes import dynunet, segresnet, swin_unetr, unet

__all__ = ["dynunet", "segresnet", "swin_unetr", "unet"]
