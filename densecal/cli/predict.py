"""``densecal-predict``: label, probabilities and confidence of NIfTI volumes."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from densecal.cli.configuration import CommandError, command

__all__ = ["main", "predict"]

_SUFFIXES = (".nii.gz", ".nii")


def main() -> None:
    """Predict; see ``densecal-predict --help``."""
    command("predict", predict)


def predict(config: DictConfig) -> None:
    """Predict every volume of ``input`` and write the chosen outputs, on each volume's own grid.

    A volume that cannot be read costs one line; the others are still predicted, and the command then ends with an error.

    Raises:
        CommandError: What the user can mend.
    """
    from densecal.inference import OUTPUTS, Predictor, resolve_device, write_prediction  # a mistyped setting need not wait for MONAI

    if unknown := [name for name in config.outputs if name not in OUTPUTS]:
        raise CommandError(f"outputs: expected any of {OUTPUTS}, but got {unknown[0]!r}.")
    if not config.outputs:
        raise CommandError(f"outputs: expected at least one of {OUTPUTS}.")
    if config.checkpoint not in ("best", "last"):
        raise CommandError(f"checkpoint: expected one of ('best', 'last'), but got {config.checkpoint!r}. A checkpoint file is given as run=FILE.")
    output = Path(config.output)
    try:
        volumes = _volumes(Path(config.input))
        predictor = Predictor.from_run(config.run, config.checkpoint, resolve_device(config.device))
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None

    failed = 0
    for path in tqdm(volumes, desc="Predicting", unit="volume", disable=not sys.stderr.isatty(), leave=False):
        try:
            written = write_prediction(predictor(path), output, _stem(path), config.outputs)
        except ValueError as error:
            failed += 1
            tqdm.write(f"error: {error}", file=sys.stderr)
        except OSError as error:  # reading fails with ValueError; where one file cannot be written the next cannot either
            raise CommandError(f"output: cannot write to {output} ({error.strerror or error}).") from None
        else:
            tqdm.write("  ".join(str(p) for p in written))
    if failed:
        others = f"; the others are in {output}" if failed < len(volumes) else ""
        raise CommandError(f"{failed} of {len(volumes)} volume(s) could not be predicted{others}.")


def _volumes(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"input: no file or folder {source}.")
    volumes = sorted(path for path in source.iterdir() if path.name.endswith(_SUFFIXES) and not path.name.startswith("."))
    if not volumes:
        raise FileNotFoundError(f"input: no .nii.gz or .nii files in {source}.")
    stems = [_stem(path) for path in volumes]
    if repeated := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(f"input: {source} holds {repeated[0]} twice, as .nii and .nii.gz. Keep one of them.")
    return volumes


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


if __name__ == "__main__":
    main()
