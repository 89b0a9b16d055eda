"""Volumes in NIfTI files, prepared by MONAI's transforms."""

from densecal.data.volumes.medium import VolumeMedium

__all__ = ["VolumeMedium"]
