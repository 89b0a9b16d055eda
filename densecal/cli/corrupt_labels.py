"""``densecal-corrupt``: a copy of a data set with known errors in some of its label maps."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from densecal.cli.configuration import CommandError, command

__all__ = ["corrupt_labels", "main"]


def main() -> None:
    """Corrupt; see ``densecal-corrupt --help``."""
    command("corrupt_labels", corrupt_labels)


def corrupt_labels(config: DictConfig) -> Path:
    """Write the copy, whole or not at all.

    Returns:
        Its folder.

    Raises:
        CommandError: What the user can mend.
    """
    if config.data is None:
        raise CommandError("data: name the data set, data=CARD data.root=DIR.")
    if config.split not in ("train", "val", "test", "all"):
        raise CommandError(f"split: expected one of ('train', 'val', 'test', 'all'), but got {config.split!r}.")
    if not 0 < config.share <= 1:
        raise CommandError(f"share: expected a number above 0 and at most 1, but got {config.share}.")
    from densecal.data import DataCard, resolve_root  # a mistyped setting need not wait for torch
    from densecal.data.corrupted_copy import RECORD, write_corrupted_copy
    from densecal.data.layouts import find_cases
    from densecal.data.split import split_cases
    from densecal.data.validate import DataProblems, find_problems

    errors = _errors(config)
    output = Path(config.output)
    try:
        card = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataCard), config.data))
        assert isinstance(card, DataCard)
        root = resolve_root(card)
        cases = find_cases(root, card)
        if not cases:
            raise DataProblems(find_problems(cases, card, root=root))
        chosen = cases if config.split == "all" else split_cases(cases, card)[config.split]
        known = write_corrupted_copy(
            root,
            card,
            cases,
            output,
            errors=errors,
            count=max(1, round(config.share * len(chosen))),
            seed=config.seed,
            among=[case.id for case in chosen],
            transition=None if config.transition is None else OmegaConf.to_container(config.transition),  # type: ignore[arg-type]
            link=config.link,
            progress=sys.stderr.isatty(),
        )
    except OSError as error:
        raise CommandError(f"output: {error.strerror}: {error.filename or output}." if error.strerror else str(error)) from None
    except ValueError as error:
        raise CommandError(str(error)) from None
    for kind, severity in errors:
        dice = [one.dice for one in known if (one.kind, one.severity) == (kind, severity)]
        if dice:
            print(
                f"{kind} {severity:g}: {len(dice)} case{'s' if len(dice) != 1 else ''}, Dice with the original {statistics.mean(dice):.3f} ({min(dice):.3f} to {max(dice):.3f})"
            )
    print(f"copy    {output.resolve()}: {len(known)} of {len(cases)} label maps with an error, listed in {RECORD}", flush=True)
    return output


def _errors(config: DictConfig) -> list[tuple[str, float]]:
    """Kinds with their severities."""
    from densecal.data.label_noise import KINDS, check_severity
    from densecal.registry import near_matches

    kinds, severities = _listed(config.kind), _listed(config.severity)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise CommandError(f"kind: no kind of error {unknown[0]!r}. {near_matches(str(unknown[0]), KINDS)}")
    if bad := [severity for severity in severities if isinstance(severity, bool) or not isinstance(severity, (int, float))]:
        raise CommandError(f"severity: expected a number, or a list with one for each kind, but got {bad[0]!r}.")
    if len(set(kinds)) < len(kinds) or not kinds:
        raise CommandError(f"kind: expected each kind once, but got {kinds}.")
    severities = severities * len(kinds) if len(severities) == 1 else severities
    if len(severities) != len(kinds):
        raise CommandError(f"severity: expected one number, or one for each of {kinds}, but got {severities}.")
    for kind, severity in zip(kinds, severities, strict=True):
        try:
            check_severity(kind, severity)
        except ValueError as error:
            raise CommandError(f"severity: {error}") from None
    return list(zip(kinds, map(float, severities), strict=True))


def _listed(value: Any) -> list[Any]:
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return list(value) if isinstance(value, list) else [value]


if __name__ == "__main__":
    main()
