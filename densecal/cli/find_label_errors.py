"""``densecal-find-label-errors``: which labels look wrong to models that never trained on them."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from densecal.cli.configuration import CommandError, command

__all__ = ["find_label_errors", "main"]


def main() -> None:
    """Find label errors; see ``densecal-find-label-errors --help``."""
    command("find_label_errors", find_label_errors)


def find_label_errors(config: DictConfig) -> Path:
    """Rank the cases and write the report.

    Nothing is written before every case has been read and scored; each is predicted once, and those that are shown once more.

    Returns:
        Path of the report.

    Raises:
        CommandError: What the user can mend.
    """
    _check(config)
    from densecal.cli.facts import minutes  # a mistyped setting need not wait for torch
    from densecal.data.corrupted_copy import read_known_errors
    from densecal.label_errors import SCORES, LabelErrorFinder
    from densecal.registry import near_matches
    from densecal.report.label_errors import known_summary, write_label_errors
    from densecal.runs import new_run_dir, provenance

    if config.score not in SCORES:
        raise CommandError(f"score: no score {config.score!r}. {near_matches(config.score, SCORES)}")
    started = time.perf_counter()
    try:
        known = None if config.known is None else read_known_errors(Path(config.known))
        cases, schema, facts, notes = _held_out(config) if config.runs is not None else _saved(config)
        if schema.activation == "sigmoid":
            raise ValueError(
                f"{'predictions' if config.runs is None else 'runs'}: expected probabilities of classes that exclude each other, but got those of the regions "
                f"{list(schema.names)}. Errors are found in label maps, with one class per pixel: train without data.regions."
            )
        found = cases.problems()
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None
    problems, bad = [str(problem) for problem in found], {problem.case_id for problem in found}
    _refuse(config, problems)
    finder, unreadable = LabelErrorFinder(schema), []
    wanted = [case_id for case_id in cases.case_ids if case_id not in bad]
    for case_id in _bar(wanted, "Looking at labels"):
        try:
            case = cases[case_id]
        except ValueError as error:
            unreadable.append(str(error))
            continue
        if case.label.shape != case.probs.shape[1:]:
            raise CommandError(
                f"The labels of {case_id!r} are shares or overlapping regions; errors are found in label maps, with one class per pixel."
            )
        finder.update(case_id, case.probs.numpy(), case.label.numpy())
    _refuse(config, unreadable)
    notes += [f"Left out: {problem}" for problem in dict.fromkeys([*problems, *unreadable])]
    suspicions = finder.compute(config.score)
    if not suspicions:
        raise CommandError("No case could be looked at; nothing is written.")
    facts |= {"time": minutes(time.perf_counter() - started), **provenance()}

    try:
        folder = new_run_dir(Path("runs"), "label_errors") if config.output is None else Path(config.output)
        page = write_label_errors(
            folder,
            schema,
            suspicions,
            config.score,
            finder.confusion(),
            _shown(cases, finder, [one.case_id for one in suspicions[: config.top]], notes),
            facts,
            notes,
            known=known,
        )
    except OSError as error:
        raise CommandError(f"output: cannot write to {error.filename or config.output} ({error.strerror or error}).") from None
    for rank, one in enumerate(suspicions[:5], start=1):
        print(f"{rank}. {one.case_id}  {config.score} {one.scores[config.score]:.4f}  {one.num_flagged} flagged")
    if known is not None:
        print("\n".join(known_summary(suspicions, config.score, known)))
    print(f"report  {page.resolve()}", flush=True)
    return page


def _check(config: DictConfig) -> None:
    if importlib.util.find_spec("cleanlab") is None:
        raise CommandError("cleanlab is not installed: pip install 'densecal[train,noise]'.")
    for name, allowed in (
        ("checkpoint", (None, "best", "last")),
        ("axes", ("auto", "nnunet", "channels_first", "channels_last")),
        ("split", (None, "train", "val", "test", "all")),
    ):
        if config[name] not in allowed:
            raise CommandError(f"{name}: expected one of {allowed}, but got {config[name]!r}.")
    if (config.runs is None) == (config.predictions is None):
        raise CommandError("Give trained runs as runs=DIR, or saved probabilities as predictions=DIR labels=DIR; one of the two.")
    if config.runs is not None:
        if given := [name for name in ("data", "labels", "images", "split") if config[name] is not None]:
            raise CommandError(f"{given[0]}: runs bring their own data set. Where it or a copy of it lies now is root=DIR.")
    elif config.labels is None and config.data is None:
        raise CommandError("labels: give the folder of labels, labels=DIR, or a data set with a card, data=CARD data.root=DIR.")
    if config.top < 0:
        raise CommandError(f"top: expected 0 or more, but got {config.top}.")


def _held_out(config: DictConfig) -> tuple[Any, Any, dict[str, Any], list[str]]:
    """The cases that runs held out."""
    from densecal.inference import resolve_device
    from densecal.inference.out_of_fold import OutOfFoldCases
    from densecal.report.study import find_runs

    given = OmegaConf.to_container(config.runs) if OmegaConf.is_config(config.runs) else config.runs
    runs, unfinished = find_runs([Path(str(path)) for path in (given if isinstance(given, list) else [given])])
    if not runs:
        raise ValueError(f"runs: none of the {len(unfinished)} runs is finished. Go on with one by resume={unfinished[0]}.")
    cases = OutOfFoldCases(
        runs,
        checkpoint=config.checkpoint,
        device=resolve_device(config.device),
        root=config.root,
        inference=config.inference,
        trust_config=config.trust_config,
    )
    card = cases.card
    notes = [*card.notes, *(f"Left out: the run {run} is not finished." for run in unfinished)]
    if cases.uncovered:
        names = ", ".join(cases.uncovered[:5]) + (", ..." if len(cases.uncovered) > 5 else "")
        notes.append(
            f"{len(cases.uncovered)} of {len(cases.all_cases)} cases were not looked at, because every run has seen them: {names}. Further folds would cover them."
        )
        print(notes[-1], file=sys.stderr)
    facts = {
        "title": f"{card.name}: labels that look wrong",
        "data set": f"{card.name} in {card.root}" + (f" ({card.modality})" if card.modality else ""),
        "licence": card.licence or None,
        "citation": list(card.citation),
        "cases": {"looked at": len(cases.case_ids), "in the set": len(cases.all_cases)},
        "runs": [str(run) for run in runs],
    }
    return cases, card.schema, facts, notes


def _saved(config: DictConfig) -> tuple[Any, Any, dict[str, Any], list[str]]:
    """Saved probabilities beside labels."""
    from densecal.cli.evaluate import saved_model

    settings: dict[str, Any] = {str(name): value for name, value in config.items()}
    settings |= {"activation": None, "regions": None, "subject_pattern": None, "split": config.split or "all"}
    model = saved_model(OmegaConf.create(settings), str(config.predictions), [])
    title = {"title": f"Labels that look wrong to the predictions in {Path(config.predictions).name}"}
    notes = [
        *model.notes,
        "Whether the models had seen these cases cannot be told from the files. A model that has learnt a wrong label by heart does not find it.",
    ]
    return model.cases, model.schema, model.facts | title, notes


def _refuse(config: DictConfig, problems: Sequence[str]) -> None:
    if config.strict and problems:
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        raise CommandError(
            "\n".join([f"{count}, and nothing was written. Mend the files, or leave such cases out with strict=false:", *dict.fromkeys(problems)])
        )


def _shown(cases: Any, finder: Any, case_ids: Sequence[str], notes: list[str]) -> Iterator[tuple[Any, Any]]:
    """The cases to show with their images; what cannot be shown is added to the notes."""
    from densecal.report import Example

    for case_id in _bar(case_ids, "Drawing"):
        case, image = cases[case_id], None
        try:
            image = cases.image(case_id)
        except ValueError as error:
            notes.append(f"Shown without its image: {error}")
        yield Example(case_id, image, case.label, case.probs, spacing=case.spacing or (), axis_names=case.axis_names), finder.flagged(case_id)


def _bar(case_ids: Sequence[str], description: str) -> Any:
    from tqdm import tqdm

    return tqdm(case_ids, desc=description, unit="case", leave=False, disable=not sys.stderr.isatty())


if __name__ == "__main__":
    main()
