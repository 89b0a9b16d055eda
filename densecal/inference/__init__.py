"""From image files to probabilities, labels and confidence maps."""

from densecal.inference.predictor import OUTPUTS, Prediction, Predictor, resolve_device, write_prediction
from densecal.inference.run_cases import RunCases, cases_of_split
from densecal.inference.sliding_window import SlidingWindow, full_resolution

__all__ = [
    "OUTPUTS",
    "Prediction",
    "Predictor",
    "RunCases",
    "SlidingWindow",
    "cases_of_split",
    "full_resolution",
    "resolve_device",
    "write_prediction",
]
