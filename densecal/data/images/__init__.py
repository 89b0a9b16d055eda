"""Images in PNG, JPEG, TIFF and other picture files, augmented by albumentations."""

from densecal.data.images.medium import ImageMedium

__all__ = ["ImageMedium"]
