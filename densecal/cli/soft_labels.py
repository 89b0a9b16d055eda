"""``densecal-soft-labels``: what a trained run says about every training case, written down for students."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from densecal.cli.configuration import CommandError, command

if TYPE_CHECKING:
    from densecal.inference import Predictor

__all__ = ["main", "soft_labels"]

_HOW = ("orientation", "spacing", "normalisation", "patch_size")
"""What else of the teacher's card its probabilities depend on."""


def main() -> None:
    """Write soft labels; see ``densecal-soft-labels --help``."""
    command("soft_labels", soft_labels)


def soft_labels(config: DictConfig) -> None:
    """Predict every case of a split, each on its own grid, and keep the probabilities in 16 bits.

    Every file is whole or not there, so a command that was stopped goes on where it was.

    Raises:
        CommandError: What the user can mend.
    """
    from densecal.data.soft_labels import SoftLabels, channels, soft_label_manifest
    from densecal.files import remove_unfinished
    from densecal.inference import Predictor, cases_of_split, resolve_device, write_prediction
    from densecal.runs import file_hash, find_checkpoint

    if config.checkpoint not in ("best", "last"):
        raise CommandError(f"checkpoint: expected one of ('best', 'last'), but got {config.checkpoint!r}. A checkpoint file is given as run=FILE.")
    folder = Path(config.output)
    try:
        path = find_checkpoint(Path(config.run), config.checkpoint)
        predictor = Predictor.from_run(path, device=resolve_device(config.device), inference=config.inference, trust_config=config.trust_config)
        card = _card(config, predictor)
        split, cases = cases_of_split(card, config.split)
        known = {
            "teacher": file_hash(path),
            **channels(card),
            "inference": OmegaConf.to_container(predictor.config.inference, resolve=True),  # type: ignore[union-attr]
            "prepared": {name: asdict(predictor.card)[name] for name in _HOW},
        }
        soft_label_manifest(folder, known)
        remove_unfinished(folder)
        written = SoftLabels(folder, card)
        left = [case for case in cases if written.path(case.id) is None]
        for case in tqdm(left, desc="Writing soft labels", unit="case", disable=not sys.stderr.isatty(), leave=False):
            write_prediction(predictor(case.image), folder, case.id, ["soft_label"])
        files = [written.file(case) for case in cases]
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None
    size = sum(file.stat().st_size for file in files)
    there = f", {len(cases) - len(left)} of them there already" if len(left) < len(cases) else ""
    print(f"soft labels  {folder.resolve()}: {len(cases)} cases, {split}{there}; {size / 1e6:.1f} MB")


def _card(config: DictConfig, predictor: Predictor) -> Any:
    """The data set whose cases the teacher is asked about."""
    from densecal.data import DataCard, override_card

    card = predictor.card
    if config.data is not None:
        chosen = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataCard), config.data))
        assert isinstance(chosen, DataCard)
        if card.regions and not chosen.regions and list(chosen.classes) == list(card.classes):
            chosen = override_card(chosen, {"regions": card.regions})
        if chosen.told_apart != card.told_apart:
            raise ValueError(f"data: the teacher knows {card.told_apart}, but {chosen.name} has {chosen.told_apart}.")
        card = chosen
    return card if config.root is None else override_card(card, {"root": config.root})


if __name__ == "__main__":
    main()
