"""Lightning modules and callbacks: a loss becomes a training run."""

from densecal.tasks.callbacks import CompactProgressBar, History, StatelessRandomness
from densecal.tasks.checkpoints import AtomicCheckpointIO, find_checkpoint
from densecal.tasks.segmentation import SegmentationTask

__all__ = ["AtomicCheckpointIO", "CompactProgressBar", "History", "SegmentationTask", "StatelessRandomness", "find_checkpoint"]
