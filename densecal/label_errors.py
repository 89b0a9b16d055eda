"""Which labels look wrong to models that never trained on them: images in order of suspicion, and the regions that make them suspicious.

The judgement of a pixel is cleanlab's confident learning. Its functions for segmentation take all images at once; here cases come one by one, and what is kept of each
are the pixels that can be flagged at all, those whose label has a probability of at most one half. The flagged pixels are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from densecal.checks import check_choice
from densecal.data.label_noise import structure_dice
from densecal.labels import LabelSchema

__all__ = ["SCORES", "LabelErrorFinder", "Region", "Suspicion", "average_precision", "precision_at", "rank_by"]

SCORES = {
    "margin": "1 minus how much more probable than the label the predicted class is, averaged over the structure",
    "issues": "share of the structure that is not flagged: the flagged pixels, which all lie in it, in its size",
    "issues_all": "share of all pixels that are not flagged (cleanlab's num_pixel_issues)",
    "softmin": "cleanlab's softmin of the labels' probabilities, over the structure",
    "softmin_all": "cleanlab's softmin of the labels' probabilities, over all pixels (cleanlab's default)",
    "dice": "mean Dice of the label and the predicted classes over the classes of the structure that either has",
}
"""Scores of an image's label, each in [0, 1] with lower ones for labels that look worse, and how each is computed. The structure is what is labelled or predicted as
anything but the background; where there is none, every pixel."""


@dataclass(frozen=True)
class Region:
    """Connected flagged pixels with one label and one suggestion.

    Args:
        size: Number of pixels.
        box: First and last index along each axis.
        given: Class that the label says.
        suggested: Class that the model says.
    """

    size: int
    box: tuple[tuple[int, int], ...]
    given: int
    suggested: int


@dataclass(frozen=True)
class Suspicion:
    """What is held against the label of a case.

    Args:
        case_id: The case.
        scores: Value of each score of ``SCORES``; NaN where it is not defined.
        num_pixels: Pixels that have a label.
        num_flagged: Pixels that cleanlab flags.
        region: The largest region of flagged pixels, ``None`` where there are none.
    """

    case_id: str
    scores: dict[str, float]
    num_pixels: int
    num_flagged: int
    region: Region | None


@dataclass
class _Kept:
    """What is remembered of a case: of the pixels that may be flagged the place, label, prediction and probabilities ``(n, K)``."""

    shape: tuple[int, ...]
    num_pixels: int
    structure_size: int
    scores: dict[str, float]
    places: NDArray[np.int64]
    labels: NDArray[np.int64]
    probs: NDArray[np.float32]
    flagged: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))

    @property
    def suggested(self) -> NDArray[np.int64]:
        return self.probs.argmax(axis=1)


class LabelErrorFinder:
    """Collect predictions and labels of cases, then rank the cases.

    Args:
        schema: The classes. Pixels with ``ignore_index`` are left out of everything.

    Example:
        >>> finder = LabelErrorFinder(LabelSchema(("background", "thing")))
        >>> probs = np.array([[0.9, 0.9, 0.1, 0.1]])
        >>> for case_id, label in (("right", [0, 0, 1, 1]), ("wrong", [0, 0, 1, 0])):
        ...     finder.update(case_id, np.stack([probs, 1 - probs]), np.array([label]))
        >>> [(found.case_id, found.num_flagged) for found in finder.compute()]
        [('wrong', 1), ('right', 0)]
    """

    def __init__(self, schema: LabelSchema) -> None:
        from cleanlab.experimental.label_issues_batched import LabelInspector

        self.schema = schema
        self._inspector = LabelInspector(num_class=schema.num_classes, verbose=False, n_jobs=1)
        self._kept: dict[str, _Kept] = {}

    def update(self, case_id: str, probs: Any, label: Any) -> None:
        """Take in a case.

        Args:
            case_id: Its name, each once.
            probs: Probabilities ``(K, *spatial)`` by a model that has not seen the case.
            label: Label map ``(*spatial)``.

        Raises:
            ValueError: If the shapes do not fit, or there has been a case of this name.
        """
        if case_id in self._kept:
            raise ValueError(f"Expected each case once, but got {case_id!r} again.")
        probs, label = np.asarray(probs, dtype=np.float32), np.asarray(label)
        if probs.shape != (self.schema.num_classes, *label.shape):
            raise ValueError(
                f"Expected `probs` of shape ({self.schema.num_classes}, *spatial) and `label` of shape (*spatial), but got {probs.shape} and {label.shape}."
            )
        places = np.flatnonzero(label != self.schema.ignore_index)
        labels, flat = label.reshape(-1)[places].astype(np.int64), np.ascontiguousarray(probs.reshape(len(probs), -1)[:, places].T)  # (n,), (n, K)
        predicted, of_label = flat.argmax(axis=1), flat[np.arange(len(labels)), labels]
        structure = (labels != self.schema.background) | (predicted != self.schema.background)
        if len(labels):
            self._inspector.update_confident_thresholds(labels, flat)
        scores = {
            "margin": 1 - _mean((flat.max(axis=1) - of_label)[structure]),
            "softmin": _softmin(flat[structure], labels[structure]),
            "softmin_all": _softmin(flat, labels),
            "dice": structure_dice(labels, predicted, self.schema.foreground),
        }
        doubtful = (of_label <= 0.5) | (predicted != labels)
        self._kept[case_id] = _Kept(label.shape, len(labels), int(structure.sum()), scores, places[doubtful], labels[doubtful], flat[doubtful])

    def compute(self, score: str = "margin") -> list[Suspicion]:
        """The cases, those that look worst first; an undefined score comes last.

        Raises:
            ValueError: If there is no such score.
        """
        check_choice("score", score, SCORES)
        self._flag()
        found = [self._suspicion(case_id, kept) for case_id, kept in self._kept.items()]
        return rank_by(found, score)

    def flagged(self, case_id: str) -> NDArray[np.bool_]:
        """The flagged pixels of a case ``(*spatial)``, after :meth:`compute`."""
        kept = self._kept[case_id]
        mask = np.zeros(kept.shape, bool)
        mask.reshape(-1)[kept.places[kept.flagged]] = True
        return mask

    def confusion(self) -> NDArray[np.int64]:
        """Flagged pixels of all cases by given (row) and suggested class (column), ``(K, K)``, after :meth:`compute`."""
        counts = np.zeros((self.schema.num_classes,) * 2, np.int64)
        for kept in self._kept.values():
            np.add.at(counts, (kept.labels[kept.flagged], kept.suggested[kept.flagged]), 1)
        return counts

    def _flag(self) -> None:
        """Of all cases together those pixels whose labels have the lowest probability, as many as cleanlab estimates to be wrong, if the model says another class."""
        kept = list(self._kept.values())
        for one in kept:
            one.flagged = np.zeros(len(one.labels), bool)
        if not sum(len(one.labels) for one in kept):
            return
        inspector = copy.deepcopy(self._inspector)  # more cases may come
        for one in kept:
            if len(one.labels):
                inspector.score_label_quality(one.labels, one.probs)
        issues = np.zeros(sum(len(one.labels) for one in kept), bool)
        issues[inspector.get_label_issues()] = True
        for one, flagged in zip(kept, np.split(issues, np.cumsum([len(one.labels) for one in kept])[:-1]), strict=True):
            one.flagged = flagged & (one.suggested != one.labels)

    def _suspicion(self, case_id: str, kept: _Kept) -> Suspicion:
        count = int(kept.flagged.sum())
        scores = kept.scores | {
            name: 1 - count / total if total else float("nan") for name, total in (("issues", kept.structure_size), ("issues_all", kept.num_pixels))
        }
        return Suspicion(case_id, {name: scores[name] for name in SCORES}, kept.num_pixels, count, self._largest(kept))

    def _largest(self, kept: _Kept) -> Region | None:
        given, suggested, places = (values[kept.flagged] for values in (kept.labels, kept.suggested, kept.places))
        neighbours = np.ones((3,) * len(kept.shape))
        best: Region | None = None
        pairs, counts = np.unique(np.stack([given, suggested]), axis=1, return_counts=True)
        for i in np.argsort(-counts, kind="stable"):
            if best is not None and counts[i] <= best.size:
                break  # no pair that comes now has so many pixels
            a, b = pairs[:, i].tolist()
            mask = np.zeros(kept.shape, bool)
            mask.reshape(-1)[places[(given == a) & (suggested == b)]] = True
            pieces, _ = ndimage.label(mask, structure=neighbours)
            sizes = np.bincount(pieces.ravel())[1:]
            piece = int(sizes.argmax())
            if best is None or sizes[piece] > best.size:
                box = ndimage.find_objects(pieces)[piece]
                best = Region(int(sizes[piece]), tuple((side.start, side.stop - 1) for side in box), a, b)
        return best


def _mean(values: NDArray[np.float32]) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else float("nan")


def _softmin(probs: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """cleanlab's score of an image, here one of a single row: it asks for no neighbours."""
    from cleanlab.segmentation.rank import get_label_quality_scores

    if not len(labels):
        return float("nan")
    scores, _ = get_label_quality_scores(labels[None, None], np.ascontiguousarray(probs.T)[None, :, None], n_jobs=1, verbose=False)
    return float(scores[0])


def rank_by(suspicions: Iterable[Suspicion], score: str) -> list[Suspicion]:
    """Worst first; an undefined score comes last, equal ones by their names."""
    return sorted(suspicions, key=lambda one: (np.isnan(one.scores[score]), one.scores[score], one.case_id))


def precision_at(ranked: Sequence[str], wrong: Iterable[str], count: int) -> float:
    """Share of wrong ones among the first ``count``.

    Example:
        >>> precision_at(["a", "b", "c"], {"a", "c"}, 2)
        0.5
    """
    return sum(name in set(wrong) for name in ranked[:count]) / count


def average_precision(ranked: Sequence[str], wrong: Iterable[str]) -> float:
    """Mean, over the wrong ones, of the share of wrong ones up to each; 1 where all of them come first.

    Example:
        >>> average_precision(["a", "b", "c"], {"a", "c"})  # (1 / 1 + 2 / 3) / 2
        0.833...
    """
    places = np.flatnonzero([name in set(wrong) for name in ranked])
    return float(np.mean(np.arange(1, len(places) + 1) / (places + 1))) if len(places) else float("nan")
