"""From probabilities and labels to numbers: ``torchmetrics.Metric`` classes with a state of a few bins, and the same as functions.

Each metric gives the same value fed batch by batch, all at once or spread over ranks. Where no pixel counts it is NaN, and its ``count`` is 0.
"""

from densecal.metrics.calibration_error import ExpectedCalibrationError, expected_calibration_error
from densecal.metrics.evaluation import DEFINITIONS, Evaluation, SegmentationEvaluation
from densecal.metrics.overlap import DiceScore, JaccardIndex, dice_score, jaccard_index
from densecal.metrics.regions import dilate, foreground_region
from densecal.metrics.scoring_rules import BrierScore, NegativeLogLikelihood, brier_score, negative_log_likelihood

__all__ = [
    "DEFINITIONS",
    "BrierScore",
    "DiceScore",
    "Evaluation",
    "ExpectedCalibrationError",
    "JaccardIndex",
    "NegativeLogLikelihood",
    "SegmentationEvaluation",
    "brier_score",
    "dice_score",
    "dilate",
    "expected_calibration_error",
    "foreground_region",
    "jaccard_index",
    "negative_log_likelihood",
]
