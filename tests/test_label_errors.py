"""Label errors found case by case are those that cleanlab finds in all cases at once."""

from __future__ import annotations

import numpy as np
import pytest

from densecal.label_errors import SCORES, LabelErrorFinder, average_precision, precision_at
from densecal.labels import LabelSchema

cleanlab_filter = pytest.importorskip("cleanlab.segmentation.filter")
cleanlab_rank = pytest.importorskip("cleanlab.segmentation.rank")

SCHEMA = LabelSchema(("background", "head", "tail"), ignore_index=255)


def case(seed: int, shape: tuple[int, ...] = (12, 15), wrong: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a model that is mostly right, and a label with some classes drawn anew."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, shape)
    logits = rng.normal(0, 1, (3, *shape))
    np.put_along_axis(logits, truth[None], np.take_along_axis(logits, truth[None], 0) + 2.5, 0)
    probs = np.exp(logits) / np.exp(logits).sum(0)
    return probs.astype(np.float32), np.where(rng.random(shape) < wrong, rng.integers(0, 3, shape), truth)


def found(cases, score: str = "margin"):
    finder = LabelErrorFinder(SCHEMA)
    for n, (probs, label) in enumerate(cases):
        finder.update(f"c{n}", probs, label)
    return finder, finder.compute(score)


def test_flagged_pixels_and_image_scores_are_cleanlabs():
    cases = [case(seed, wrong=0.05 + 0.05 * seed) for seed in range(6)]
    labels, probs = np.stack([label for _, label in cases]), np.stack([p for p, _ in cases])
    issues = cleanlab_filter.find_label_issues(labels, probs, n_jobs=1, verbose=False)
    softmin, _ = cleanlab_rank.get_label_quality_scores(labels, probs, n_jobs=1, verbose=False)
    share, _ = cleanlab_rank.get_label_quality_scores(labels, probs, method="num_pixel_issues", n_jobs=1, verbose=False)
    finder, suspicions = found(cases)
    assert issues.any()
    for one in suspicions:
        n = int(one.case_id[1:])
        assert np.array_equal(finder.flagged(one.case_id), issues[n])
        assert one.num_flagged == issues[n].sum()
        assert one.scores["softmin_all"] == pytest.approx(softmin[n])
        assert one.scores["issues_all"] == pytest.approx(share[n])
    confusion = finder.confusion()
    for given, suggested in np.ndindex(3, 3):
        assert confusion[given, suggested] == (issues & (labels == given) & (probs.argmax(1) == suggested)).sum()


def test_volumes_are_judged_as_their_slices_are():
    probs, label = case(0, (7, 9, 8))
    issues = cleanlab_filter.find_label_issues(label, probs.swapaxes(0, 1), n_jobs=1, verbose=False)
    finder, _ = found([(probs, label)])
    assert np.array_equal(finder.flagged("c0"), issues)


def test_ignored_pixels_change_nothing():
    probs, label = case(1)
    wide = np.concatenate([probs, np.full((3, 12, 4), 1 / 3, np.float32)], axis=2)
    padded = np.concatenate([label, np.full((12, 4), 255)], axis=1)
    finder, (one,) = found([(wide, padded)])
    other, (expected,) = found([(probs, label)])
    assert np.array_equal(finder.flagged("c0")[:, :15], other.flagged("c0"))
    assert not finder.flagged("c0")[:, 15:].any()
    assert one.scores == pytest.approx(expected.scores)
    assert one.num_pixels == 180


def test_scores_of_the_structure_count_what_label_or_prediction_say():
    """Two labelled pixels in 30 x 30, of which the model denies one: the structure is both of them, and one more that only the model sees. The labelled ones have a mean
    probability of 1/2, which the latter exceeds."""
    probs = np.zeros((3, 30, 30), np.float32)
    probs[0], probs[1] = 0.98, 0.02
    label = np.zeros((30, 30), int)
    label[15, 15] = label[2, 2] = 1
    probs[:, 2, 2] = [0.02, 0.98, 0.0]
    probs[:, 20, 20] = [0.4, 0.6, 0.0]
    _, (one,) = found([(probs, label)])
    assert one.num_flagged == 2
    assert one.scores["margin"] == pytest.approx(1 - ((0.98 - 0.02) + 0 + (0.6 - 0.4)) / 3)
    assert one.scores["issues"] == pytest.approx(1 - 2 / 3)
    assert one.scores["issues_all"] == pytest.approx(1 - 2 / 900)
    assert one.scores["dice"] == pytest.approx(2 * 1 / (2 + 2))
    of_structure = np.array([0.02, 0.98, 0.4])
    weights = np.exp(-of_structure / 0.1)
    assert one.scores["softmin"] == pytest.approx((weights * of_structure).sum() / weights.sum(), rel=1e-5)


def test_without_a_background_every_pixel_counts():
    finder = LabelErrorFinder(LabelSchema(("road", "car", "sky"), ignore_index=255, background=None))
    finder.update("a", *case(0))
    (one,) = finder.compute()
    assert one.scores["softmin"] == one.scores["softmin_all"]
    assert one.scores["issues"] == one.scores["issues_all"]


def test_largest_region_has_its_place_and_both_classes():
    probs = np.zeros((3, 20, 20), np.float32)
    probs[0] = 0.97
    probs[1:] = 0.015
    label = np.zeros((20, 20), int)
    probs[:, 4:8, 5:11] = np.array([0.02, 0.96, 0.02])[:, None, None]  # denied by the label
    probs[:, 15:17, 1:4] = np.array([0.02, 0.02, 0.96])[:, None, None]
    label[15:17, 1:3] = 2
    label[12:14, 12:14] = 1
    probs[:, 13, 13] = [0.02, 0.96, 0.02]
    _, (one,) = found([(probs, label)])
    assert one.region is not None
    assert (one.region.size, one.region.box) == (24, ((4, 7), (5, 10)))
    assert (one.region.given, one.region.suggested) == (0, 1)


def test_worst_label_comes_first_and_undefined_scores_last():
    cases = [case(seed, wrong=wrong) for seed, wrong in enumerate((0.0, 0.3, 0.1))]
    cases.append((cases[0][0], np.full((12, 15), 255)))
    for score in SCORES:
        _, suspicions = found(cases, score)
        values = [one.scores[score] for one in suspicions]
        assert values[:3] == sorted(values[:3])
        assert all(0 <= value <= 1 for value in values[:3])
        assert suspicions[-1].case_id == "c3"
        assert np.isnan(values[-1])
        if not score.startswith("softmin"):  # which hardly tells many wrong pixels from few
            assert [one.case_id for one in suspicions] == ["c1", "c2", "c0", "c3"]


def test_a_set_without_pixels_or_without_doubt_has_no_errors():
    probs, label = case(0)
    finder, (one,) = found([(probs, np.full_like(label, 255))])
    assert one.region is None
    certain = np.eye(3, dtype=np.float32)[label].transpose(2, 0, 1)
    finder, (one,) = found([(certain, label)])
    assert (one.num_flagged, one.region, finder.confusion().sum()) == (0, None, 0)
    assert one.scores["dice"] == 1


def test_more_cases_may_come_after_a_ranking():
    cases = [case(seed) for seed in range(3)]
    finder, _ = found(cases[:2])
    finder.update("c2", *cases[2])
    assert finder.compute() == found(cases)[1]


def test_precisions_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    names = [f"c{n}" for n in range(30)]
    wrong = set(rng.choice(names, 7, replace=False).tolist())
    expected = metrics.average_precision_score([name in wrong for name in names], -np.arange(30))
    assert average_precision(names, wrong) == pytest.approx(expected)
    assert precision_at(names, set(names[:3]), 6) == 0.5


def test_finder_errors():
    finder = LabelErrorFinder(SCHEMA)
    with pytest.raises(ValueError, match=r"Expected `probs` of shape \(3, \*spatial\)"):
        finder.update("a", np.zeros((3, 4, 4)), np.zeros((4, 5)))
    finder.update("a", *case(0))
    with pytest.raises(ValueError, match="Expected each case once, but got 'a' again"):
        finder.update("a", *case(0))
    with pytest.raises(ValueError, match="Expected `score` to be one of"):
        finder.compute("worst")
