"""From image files to probabilities, labels and confidence maps."""

from densecal.inference.customary import customary_inferer
from densecal.inference.ensemble import Ensemble
from densecal.inference.inferer import Inferer, full_resolution
from densecal.inference.predictor import OUTPUTS, Prediction, Predictor, resolve_device, write_description, write_prediction
from densecal.inference.run_cases import RunCases, cases_of_split
from densecal.inference.sliding_window import SlidingWindow
from densecal.inference.whole_image import WholeImage

__all__ = [
    "OUTPUTS",
    "Ensemble",
    "Inferer",
    "Prediction",
    "Predictor",
    "RunCases",
    "SlidingWindow",
    "WholeImage",
    "cases_of_split",
    "customary_inferer",
    "full_resolution",
    "resolve_device",
    "write_description",
    "write_prediction",
]
