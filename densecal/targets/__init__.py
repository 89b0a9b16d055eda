"""Label map -> distribution per pixel. Each method is a pure function and a module of the same name."""

from densecal.targets.base import Neighbourhood, Recipe, SoftTarget, Target, Uniform
from densecal.targets.boundary_smoothing import BoundarySmoothing, BoundarySmoothingTarget, boundary_mask, boundary_smoothing_target
from densecal.targets.distance_smoothing import DistanceSmoothing, DistanceSmoothingTarget, distance_smoothing_target
from densecal.targets.image_guided import ImageGuided
from densecal.targets.kde import kde_soft_label
from densecal.targets.label_smoothing import LabelSmoothingTarget, label_smoothing_target
from densecal.targets.label_statistic import LabelStatistic
from densecal.targets.neighbour_proportions import NeighbourProportionsTarget, neighbour_proportions_target, neighbour_recipe
from densecal.targets.one_hot import OneHotTarget, one_hot_target
from densecal.targets.random_rater import RandomRaterTarget, draw_rater
from densecal.targets.rater_mean import RaterMeanTarget, rater_mean_target
from densecal.targets.scheduled import LabelMix, ScheduledTarget
from densecal.targets.spatio_temporal import SpatioTemporal, SpatioTemporalTarget, spatio_temporal_target
from densecal.targets.svls import SVLSTarget, svls_target
from densecal.targets.teacher import TeacherBlend, TeacherTarget, teacher_probabilities
from densecal.targets.temporal_smoothing import (
    TemporalSmoothing,
    TemporalSmoothingTarget,
    temporal_share,
    temporal_smoothing_target,
    time_to_next_event,
)
from densecal.targets.wrapper import WrapperTarget

__all__ = [
    "BoundarySmoothing",
    "BoundarySmoothingTarget",
    "DistanceSmoothing",
    "DistanceSmoothingTarget",
    "ImageGuided",
    "LabelMix",
    "LabelSmoothingTarget",
    "LabelStatistic",
    "NeighbourProportionsTarget",
    "Neighbourhood",
    "OneHotTarget",
    "RandomRaterTarget",
    "RaterMeanTarget",
    "Recipe",
    "SVLSTarget",
    "ScheduledTarget",
    "SoftTarget",
    "SpatioTemporal",
    "SpatioTemporalTarget",
    "Target",
    "TeacherBlend",
    "TeacherTarget",
    "TemporalSmoothing",
    "TemporalSmoothingTarget",
    "Uniform",
    "WrapperTarget",
    "boundary_mask",
    "boundary_smoothing_target",
    "distance_smoothing_target",
    "draw_rater",
    "kde_soft_label",
    "label_smoothing_target",
    "neighbour_proportions_target",
    "neighbour_recipe",
    "one_hot_target",
    "rater_mean_target",
    "spatio_temporal_target",
    "svls_target",
    "teacher_probabilities",
    "temporal_share",
    "temporal_smoothing_target",
    "time_to_next_event",
]
