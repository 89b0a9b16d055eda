"""Calibrators: fitted on labelled cases after training, applied to logits or to saved probabilities."""

from densecal.posthoc.affine import DirichletCalibration, VectorScaling, dirichlet_map, vector_scale
from densecal.posthoc.base import FLOOR, Calibrator, normalised_logits, without_zeros
from densecal.posthoc.binned import HistogramBinning, IsotonicCalibration
from densecal.posthoc.conformal import FalseNegativeControl
from densecal.posthoc.files import load_calibrator, save_calibrator
from densecal.posthoc.local_temperature import LocalTemperatureScaling, local_temperature
from densecal.posthoc.sample import PixelSample
from densecal.posthoc.selective import SelectiveScaling
from densecal.posthoc.temperature import TemperatureScaling, best_temperature

__all__ = [
    "FLOOR",
    "Calibrator",
    "DirichletCalibration",
    "FalseNegativeControl",
    "HistogramBinning",
    "IsotonicCalibration",
    "LocalTemperatureScaling",
    "PixelSample",
    "SelectiveScaling",
    "TemperatureScaling",
    "VectorScaling",
    "best_temperature",
    "dirichlet_map",
    "load_calibrator",
    "local_temperature",
    "normalised_logits",
    "save_calibrator",
    "vector_scale",
    "without_zeros",
]
