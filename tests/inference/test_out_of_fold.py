"""Each case is predicted by the runs that have not seen it, and by no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from volumes import blob, save

from densecal.data.card import DataCard, override_card
from densecal.inference import Predictor, WholeImage
from densecal.inference.out_of_fold import OutOfFoldCases


class Constant(nn.Module):
    """Says the same logits everywhere."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.logits.view(1, -1, 1, 1, 1).expand(len(image), -1, *image.shape[2:])


def made_set(root: Path) -> DataCard:
    for n in range(1, 7):
        image, label = blob((8, 9, 8), seed=n)
        save(root / "images" / f"s{n:03}.nii.gz", image)
        save(root / "labels" / f"s{n:03}.nii.gz", label)
    return DataCard("blobs", ["background", "left", "right"], root=str(root), patch_size=[8, 8, 8], num_workers=0)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Make runs with these splits; each is sure of the class of its number, and remembers which checkpoint was asked for."""
    card = made_set(tmp_path / "set")
    asked: list[str] = []

    def make(*splits: dict[str, list[int]], card: DataCard = card, evaluate: str = "best") -> list[Path]:
        folders = [tmp_path / "runs" / "folds" / f"2026-01-0{n}" for n in range(len(splits))]
        for folder, split in zip(folders, splits, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "run.json").write_text("{}")
            (folder / "config.yaml").write_text(f"evaluate: {evaluate}\n")
            (folder / "splits.json").write_text(json.dumps({name: [f"s{n:03}" for n in numbers] for name, numbers in split.items()}))
        cards = dict(zip(folders, [card] * len(folders), strict=True))

        def from_run(run, checkpoint, device, inference, *, trust_config):
            asked.append(checkpoint)
            logits = [0.0, 0.0, 0.0]
            logits[folders.index(run)] = 50.0
            window = WholeImage(3, multiple=1)
            return Predictor(Constant(logits), cards[run], window, device)

        monkeypatch.setattr("densecal.inference.out_of_fold.Predictor.from_run", from_run)
        return folders

    make.asked = asked
    make.card = card
    return make


FOLDS = ({"train": [1, 2], "val": [3, 4], "test": [5, 6]}, {"train": [5, 6], "val": [1, 2], "test": [3, 4]})


def test_each_case_is_predicted_by_who_has_not_seen_it(runs):
    cases = OutOfFoldCases(runs(*FOLDS))
    assert cases.case_ids == ("s003", "s004", "s005", "s006")
    assert cases.uncovered == ("s001", "s002")
    assert cases.problems() == []
    for case_id, c in (("s003", 1), ("s004", 1), ("s005", 0), ("s006", 0)):
        case = cases[case_id]
        assert case.case_id == case_id
        assert case.probs.shape == (3, *case.label.shape)
        assert (case.probs[c] > 0.99).all()
        assert set(case.label.unique().tolist()) == {0, 1, 2}
        assert cases.image(case_id).shape == tuple(case.label.shape)


def test_several_runs_are_averaged(runs):
    cases = OutOfFoldCases(runs({"train": [1], "val": []}, {"train": [2], "val": []}))
    probs = cases["s003"].probs
    assert torch.allclose(probs[:2], torch.full_like(probs[:2], 0.5))
    assert (cases["s001"].probs[1] > 0.99).all()


def test_the_tested_checkpoint_is_taken(runs):
    OutOfFoldCases(runs(*FOLDS, evaluate="last"))
    OutOfFoldCases(runs(*FOLDS))
    OutOfFoldCases(runs({"train": [1], "val": []}))
    OutOfFoldCases(runs(*FOLDS), checkpoint="last")
    assert runs.asked == ["last", "last", "best", "best", "last", "last", "last"]


def test_a_copy_of_the_data_may_lie_elsewhere(runs, tmp_path):
    other = made_set(tmp_path / "copy")
    cases = OutOfFoldCases(runs(*FOLDS), root=other.root)
    assert str(cases.all_cases[0].image[0]).startswith(str(other.root))


def test_out_of_fold_errors(runs, monkeypatch):
    with pytest.raises(ValueError, match=r"no case of blobs .* was held out by any of the 1 run\(s\). Train with data.num_folds=5"):
        OutOfFoldCases(runs({"train": [1, 2, 3, 4], "val": [5, 6]}))
    folders = runs(*FOLDS)
    (folders[0] / "splits.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"splits.json, which says what the run was trained on"):
        OutOfFoldCases(folders, checkpoint="last")
    folders = runs(*FOLDS)
    for changes, message in (
        ({"classes": ["a", "b", "c"]}, "was trained on the classes"),
        ({"root": "/elsewhere"}, "was trained on /elsewhere, but"),
    ):
        cards = [runs.card, override_card(runs.card, changes)]
        with monkeypatch.context() as patch:
            patch.setattr(
                "densecal.inference.out_of_fold.Predictor.from_run",
                lambda run, *_, cards=cards, trust_config: Predictor(Constant([0.0] * 3), cards[folders.index(run)], WholeImage(3)),
            )
            with pytest.raises(ValueError, match=message):
                OutOfFoldCases(folders)
