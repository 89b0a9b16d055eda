"""Data sets: one card a set, from its files to batches.

The names below are imported when first used, so that reading a card does not wait for MONAI and Lightning.

Example:
    >>> load_card("hippocampus").classes
    ['background', 'anterior', 'posterior']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from densecal.data.card import Augmentation, DataCard, list_cards, load_card, override_card, resolve_root

if TYPE_CHECKING:
    from densecal.data.layouts import Case, find_cases
    from densecal.data.module import SegmentationData
    from densecal.data.predictions import PredictedCase, PredictionFolder, PredictionProblem
    from densecal.data.validate import DataProblems, Problem, find_problems

__all__ = [
    "Augmentation",
    "Case",
    "DataCard",
    "DataProblems",
    "PredictedCase",
    "PredictionFolder",
    "PredictionProblem",
    "Problem",
    "SegmentationData",
    "find_cases",
    "find_problems",
    "list_cards",
    "load_card",
    "override_card",
    "resolve_root",
]

_HOMES = {
    "Case": "layouts",
    "find_cases": "layouts",
    "DataProblems": "validate",
    "PredictedCase": "predictions",
    "PredictionFolder": "predictions",
    "PredictionProblem": "predictions",
    "Problem": "validate",
    "find_problems": "validate",
    "SegmentationData": "module",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
