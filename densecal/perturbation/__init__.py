"""Targets that hand a share of each label to the other classes: at random or in expectation, at one level for all images or at one for each."""

from densecal.perturbation.adaptive import AdaptivePerturbation
from densecal.perturbation.base import Perturbation, PerturbedLabels, drawn_share, perturb_labels
from densecal.perturbation.rules import (
    Accuracy,
    CalibrationRule,
    ConfidenceRule,
    EntropyRule,
    ImageStatistics,
    LevelRule,
    LossRule,
    image_sums,
)
from densecal.perturbation.stochastic import StochasticPerturbation

__all__ = [
    "Accuracy",
    "AdaptivePerturbation",
    "CalibrationRule",
    "ConfidenceRule",
    "EntropyRule",
    "ImageStatistics",
    "LevelRule",
    "LossRule",
    "Perturbation",
    "PerturbedLabels",
    "StochasticPerturbation",
    "drawn_share",
    "image_sums",
    "perturb_labels",
]
