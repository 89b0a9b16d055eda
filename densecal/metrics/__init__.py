"""From probabilities and labels to numbers: ``torchmetrics.Metric`` classes with a state of a few bins, and the same as functions.

Each metric gives the same value fed batch by batch, all at once or spread over ranks. Where no pixel counts it is NaN, and its ``count`` is 0.
"""

from densecal.metrics.adaptive_calibration import AdaptiveCalibrationError, adaptive_calibration_error
from densecal.metrics.bootstrap import CaseBootstrap
from densecal.metrics.calibration_error import (
    CalibrationError,
    ClasswiseCalibrationError,
    ExpectedCalibrationError,
    MaximumCalibrationError,
    calibration_error,
    classwise_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
)
from densecal.metrics.class_prior import ClassPriorBaseline, class_prior_baseline
from densecal.metrics.evaluation import SegmentationEvaluation
from densecal.metrics.fine_grained import FINE_GRAINED_DEFINITIONS, FineGrainedOverlap, fine_grained_overlap
from densecal.metrics.overlap import DiceScore, JaccardIndex, dice_score, jaccard_index, overlap_counts
from densecal.metrics.qubiq_dice import QUBIQ_THRESHOLDS, QubiqDice, qubiq_dice
from densecal.metrics.regions import boundary_band, boundary_distance, dilate, foreground_region
from densecal.metrics.results import DEFINITIONS, Evaluation, paired_differences
from densecal.metrics.score_decomposition import BrierDecomposition, BrierScoreDecomposition, brier_decomposition
from densecal.metrics.scoring_rules import BrierScore, NegativeLogLikelihood, brier_score, negative_log_likelihood
from densecal.metrics.selective_risk import (
    AreaUnderRiskCoverage,
    ExcessAreaUnderRiskCoverage,
    RiskCoverage,
    area_under_risk_coverage,
    choose_logit_norm,
    excess_area_under_risk_coverage,
    logit_norm_score,
    risk_coverage,
)
from densecal.metrics.smooth_calibration import SmoothCalibrationError, smooth_calibration_error
from densecal.metrics.surface import HausdorffDistance95, NormalizedSurfaceDistance, hausdorff_distance_95, normalized_surface_distance
from densecal.metrics.uncertainty_overlap import MeanUncertaintyErrorOverlap, UncertaintyErrorOverlap, uncertainty_error_overlap

__all__ = [
    "DEFINITIONS",
    "FINE_GRAINED_DEFINITIONS",
    "QUBIQ_THRESHOLDS",
    "AdaptiveCalibrationError",
    "AreaUnderRiskCoverage",
    "BrierDecomposition",
    "BrierScore",
    "BrierScoreDecomposition",
    "CalibrationError",
    "CaseBootstrap",
    "ClassPriorBaseline",
    "ClasswiseCalibrationError",
    "DiceScore",
    "Evaluation",
    "ExcessAreaUnderRiskCoverage",
    "ExpectedCalibrationError",
    "FineGrainedOverlap",
    "HausdorffDistance95",
    "JaccardIndex",
    "MaximumCalibrationError",
    "MeanUncertaintyErrorOverlap",
    "NegativeLogLikelihood",
    "NormalizedSurfaceDistance",
    "QubiqDice",
    "RiskCoverage",
    "SegmentationEvaluation",
    "SmoothCalibrationError",
    "UncertaintyErrorOverlap",
    "adaptive_calibration_error",
    "area_under_risk_coverage",
    "boundary_band",
    "boundary_distance",
    "brier_decomposition",
    "brier_score",
    "calibration_error",
    "choose_logit_norm",
    "class_prior_baseline",
    "classwise_calibration_error",
    "dice_score",
    "dilate",
    "excess_area_under_risk_coverage",
    "expected_calibration_error",
    "fine_grained_overlap",
    "foreground_region",
    "hausdorff_distance_95",
    "jaccard_index",
    "logit_norm_score",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "normalized_surface_distance",
    "overlap_counts",
    "paired_differences",
    "qubiq_dice",
    "risk_coverage",
    "smooth_calibration_error",
    "uncertainty_error_overlap",
]
