"""``densecal-predict``: label, probabilities and confidence of volumes and images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from tqdm import tqdm

from densecal.cli.configuration import CommandError, command

if TYPE_CHECKING:
    from densecal.data.medium import Medium

__all__ = ["main", "predict"]


def main() -> None:
    """Predict; see ``densecal-predict --help``."""
    command("predict", predict)


def predict(config: DictConfig) -> None:
    """Predict every volume or image of ``input`` by a run, or by the mean of several, and write the chosen outputs, on each file's own grid.

    A file that cannot be read costs one line; the others are still predicted, and the command then ends with an error.

    Raises:
        CommandError: What the user can mend.
    """
    # A mistyped setting need not wait for torch.
    from densecal.cli.members import member_paths
    from densecal.data.layouts import case_id_of
    from densecal.data.medium import medium_of
    from densecal.inference import OUTPUTS, Ensemble, resolve_device, write_description, write_prediction
    from densecal.inference.calibration import begin_calibrated

    if unknown := [name for name in config.outputs if name not in OUTPUTS]:
        raise CommandError(f"outputs: expected any of {OUTPUTS}, but got {unknown[0]!r}.")
    if not config.outputs:
        raise CommandError(f"outputs: expected at least one of {OUTPUTS}.")
    if config.checkpoint not in ("best", "last"):
        raise CommandError(f"checkpoint: expected one of ('best', 'last'), but got {config.checkpoint!r}. A checkpoint file is given as run=FILE.")
    output = Path(config.output)
    source = Path(config.input)
    try:
        if not source.exists():
            raise FileNotFoundError(f"input: no file or folder {source}.")
        device = resolve_device(config.device)
        runs = member_paths("run", config.run)
        predictor = Ensemble.from_runs(runs, config.checkpoint, device, config.inference, config.calibration, trust_config=config.trust_config)
        medium = medium_of(predictor.card)
        for name in config.outputs:
            if name not in medium.outputs:
                raise ValueError(f"outputs: of a {medium.noun} expected any of {medium.outputs}, but got {name!r}.")
        files = _files(source, medium)
        begin_calibrated(output, predictor.calibration)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None

    failed = 0
    for path in tqdm(files, desc="Predicting", unit=medium.noun, disable=not sys.stderr.isatty(), leave=False):
        try:
            written = write_prediction(predictor(path), output, case_id_of(path, medium.suffixes), config.outputs)
        except ValueError as error:
            failed += 1
            tqdm.write(f"error: {error}", file=sys.stderr)
        except OSError as error:  # reading fails with ValueError; where one file cannot be written the next cannot either
            raise CommandError(f"output: cannot write to {output} ({error.strerror})." if error.strerror else f"output: {error}") from None
        else:
            tqdm.write("  ".join(str(p) for p in written))
    if "probs" in config.outputs and failed < len(files) and not write_description(output, predictor.card):
        tqdm.write(f"{output / 'dataset.json'} describes other classes and is left as it is.")
    if failed:
        others = f"; the others are in {output}" if failed < len(files) else ""
        raise CommandError(f"{failed} of {len(files)} {medium.noun}(s) could not be predicted{others}.")


def _files(source: Path, medium: Medium) -> list[Path]:
    from densecal.data.layouts import case_id_of

    if source.is_file():
        return [source]
    files = sorted(path for path in source.iterdir() if path.name.lower().endswith(medium.suffixes) and not path.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"input: no {' or '.join(medium.suffixes)} files in {source}.")
    by_name: dict[str, list[str]] = {}
    for path in files:
        by_name.setdefault(case_id_of(path, medium.suffixes), []).append(path.name)
    if repeated := [names for names in by_name.values() if len(names) > 1]:
        raise ValueError(f"input: {source} holds {' and '.join(repeated[0])}, whose predictions would have one name. Keep one of them.")
    return files


if __name__ == "__main__":
    main()
