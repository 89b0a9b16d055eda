"""``densecal-calibrate``: repair the probabilities of a trained network, densecal's or anybody's, after training."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from densecal.cli.configuration import CommandError, build, command
from densecal.cli.control import Controls

if TYPE_CHECKING:
    from torch import Tensor

    from densecal.data import DataCard, PredictedCase
    from densecal.data.layouts import Case
    from densecal.labels import LabelSchema
    from densecal.metrics import Evaluation
    from densecal.posthoc import Calibrator

__all__ = ["calibrate", "main"]


def main() -> None:
    """Calibrate; see ``densecal-calibrate --help``."""
    command("calibrate", calibrate)


def calibrate(config: DictConfig) -> None:
    """Fit calibrators on labelled cases, say what they change on cases held out, save them, and repair saved probabilities with them.

    Raises:
        CommandError: What the user can mend.
    """
    _check(config)
    try:
        if config.run is not None or config.ensemble is not None:
            for runs in _networks(config):
                _fit(config, _of_runs(config, runs))
            return
        path = Path(config.calibration) if config.calibration is not None else None
        if path is None:
            path = _fit(config, _of_folder(config))[0]
        if config.apply_to is not None:
            _apply(config, path)
    except (ValueError, OSError) as error:
        raise error if isinstance(error, CommandError) else CommandError(str(error)) from None


def _check(config: DictConfig) -> None:
    for name, allowed in (
        ("checkpoint", (None, "best", "last")),
        ("axes", ("auto", "nnunet", "channels_first", "channels_last")),
        ("activation", (None, "softmax", "sigmoid")),
        ("split", (None, "val", "test", "train", "all")),
        ("fit_region", ("all", "foreground")),
    ):
        if config[name] not in allowed:
            raise CommandError(f"{name}: expected one of {allowed}, but got {config[name]!r}.")
    for name, least in (("num_folds", 2), ("num_bins", 1), ("replicates", 0), ("foreground_radius", 0)):
        if config[name] < least:
            raise CommandError(f"{name}: expected {least} or more, but got {config[name]}.")
    if config.run is not None and config.ensemble is not None:
        raise CommandError("ensemble: is one calibrator of several runs, and run= one of each. Give one of the two.")
    trained = next((name for name in ("run", "ensemble") if config[name] is not None), None)
    if trained is not None:
        for name in ("predictions", "labels", "apply_to", "calibration"):
            if config[name] is not None:
                raise CommandError(
                    f"{name}: goes with saved predictions, not with {trained}=. densecal-predict run=DIR calibration=temperature writes calibrated ones."
                )
        if config.split in ("train", "all"):
            raise CommandError(
                f"split: the network was trained on cases of split={config.split}, where it is surer than on new ones. Fit on split=val."
            )
    elif config.calibration is not None:
        if config.apply_to is None:
            raise CommandError("calibration: give the folder to repair too, apply_to=DIR output=DIR.")
        if config.predictions is not None:
            raise CommandError("calibration: is fitted already; leave out predictions=, or leave out calibration= to fit anew.")
    elif config.predictions is None:
        raise CommandError(
            "Nothing to calibrate: give a trained run as run=DIR, or several as ensemble=[DIR,DIR], or saved probabilities as predictions=DIR labels=DIR."
        )
    elif config.labels is None and config.data is None:
        raise CommandError("labels: give the folder of reference labels, labels=DIR, or a data set with a card, data=CARD data.root=DIR.")
    if config.apply_to is not None:
        if config.output is None:
            raise CommandError("output: say where the repaired probabilities go, output=DIR.")
        if Path(config.output).resolve() == Path(config.apply_to).resolve():
            raise CommandError("output: would overwrite the predictions in apply_to. Choose another folder.")
        if len(config.posthoc) != 1:
            raise CommandError("apply_to: takes one method, posthoc=[temperature] for example.")
    if not config.posthoc:
        raise CommandError("posthoc: name at least one method, posthoc=[temperature] for example.")


@dataclass
class _Source:
    """Cases to fit on and, where there are such, others to look at the result with.

    Args:
        title: In words.
        fit: Gives the cases to fit on by their names.
        fit_split: Which they are.
        test: Gives the cases held out; None where there are none.
        schema: The classes or regions.
        subject: Person of a case.
        folder: Where the calibrators go; made when asked for, after everything has been read.
        facts: Kept beside each calibrator.
        prepare: What becomes of probabilities before they are calibrated.
    """

    title: str
    fit: Any
    fit_split: str
    test: Any
    schema: LabelSchema
    subject: Callable[[str], str]
    folder: Callable[[], Path]
    facts: dict[str, Any]
    prepare: Callable[[Tensor], Tensor] = field(default=lambda probs: probs)


def _networks(config: DictConfig) -> list[list[str]]:
    """The runs behind each network to calibrate: each run by itself, or all of an ensemble."""
    from densecal.cli.members import member_paths

    if config.ensemble is not None:
        return [member_paths("ensemble", config.ensemble)]
    return [[str(run)] for run in (config.run if isinstance(config.run, ListConfig) else [config.run])]


def _of_runs(config: DictConfig, runs: Sequence[str]) -> _Source:
    """A run, or several whose probabilities are averaged: fitted on cases that none was trained on, looked at on test cases of all."""
    from densecal.data import override_card
    from densecal.data.layouts import subject_of
    from densecal.inference import Ensemble, RunCases, resolve_device
    from densecal.inference.calibration import FOLDER, facts_of
    from densecal.inference.ensemble import check_one_data_set
    from densecal.inference.out_of_fold import tested_checkpoint
    from densecal.runs import find_checkpoint, new_run_dir, read_splits

    folders = [Path(run) for run in runs]
    splits = [read_splits(folder) for folder in folders]
    paths = [find_checkpoint(folder, config.checkpoint or tested_checkpoint(folder)) for folder in folders]
    ensemble = Ensemble.from_runs(paths, device=resolve_device(config.device), inference=config.inference, trust_config=config.trust_config)
    cards = [member.card for member in ensemble.members]
    if config.root is None:
        check_one_data_set(ensemble.members, runs)
    else:
        cards = [override_card(card, {"root": config.root}) for card in cards]
    fit_split = config.split or "val"
    divided = list(zip(runs, cards, splits, strict=True))

    def cases(split: str) -> list[dict[str, Case]]:
        """Of each member, by their names."""
        return [_cases(run, card, split, of_run[split]) if of_run.get(split) else {} for run, card, of_run in divided]

    learnt = {case_id for of_run in splits for case_id in of_run["train"]}
    fit = {case_id: case for of_run in cases(fit_split) for case_id, case in of_run.items() if case_id not in learnt}
    if not fit:
        raise CommandError(_nothing_to_fit(runs, splits, fit_split))
    first, *others = cases("test") if fit_split != "test" else [{}]
    test = [case for case_id, case in first.items() if all(case_id in of_run for of_run in others)]
    facts = [facts_of(run, path, inference) for run, (path, inference) in zip(runs, ensemble.checkpoints.items(), strict=True)]
    single, card = len(runs) == 1, cards[0]

    def folder() -> Path:
        if config.output is not None:
            return Path(config.output)
        return folders[0] / FOLDER if single else new_run_dir(Path("runs"), "calibration")

    return _Source(
        title=runs[0] if single else f"the mean of {', '.join(runs)}",
        fit=RunCases(ensemble, [fit[case_id] for case_id in sorted(fit)], card),
        fit_split=fit_split,
        test=RunCases(ensemble, test, card) if test else None,
        schema=card.schema,
        subject=lambda case_id: subject_of(case_id, card),
        folder=folder,
        facts=facts[0] if single else {"members": facts},
    )


def _cases(run: str, card: DataCard, split: str, case_ids: Sequence[str]) -> dict[str, Case]:
    """The cases of a run's split, by their names."""
    from densecal.inference import cases_of_split

    _, found = cases_of_split(card, split)
    if sorted(case.id for case in found) != sorted(case_ids):
        raise CommandError(
            f"{run}: the data set's {split} cases are no longer those of the run (see splits.json there). root=DIR says where it lies."
        )
    return {case.id: case for case in found}


def _nothing_to_fit(runs: Sequence[str], splits: Sequence[Mapping[str, Sequence[str]]], fit_split: str) -> str:
    if len(runs) == 1:
        advice = " Fit on its test cases, with split=test." if splits[0].get("test") else ""
        return f"{runs[0]}: has no {fit_split} cases to fit on.{advice}"
    return (
        f"ensemble: each {fit_split} case of a member was trained on by another, as in folds, so that there is none to fit on. Train members that differ in their seed alone; or "
        "have densecal-predict run=[...] outputs=[probs] predict other labelled cases, and fit with predictions=DIR labels=DIR."
    )


def _of_folder(config: DictConfig) -> _Source:
    from densecal.cli.evaluate import saved_model
    from densecal.posthoc import without_zeros
    from densecal.runs import new_run_dir

    model = saved_model(config, str(config.predictions), [])
    held = config.output if config.apply_to is None else None
    return _Source(
        title=str(config.predictions),
        fit=model.cases,
        fit_split="labelled",
        test=None,
        schema=model.schema,
        subject=model.subjects,
        folder=lambda: Path(held) if held is not None else new_run_dir(Path("runs"), "calibration"),
        facts={"predictions": str(config.predictions), "labels": model.facts["labels"]},
        prepare=lambda probs: without_zeros(probs, model.schema.activation),
    )


def _fit(config: DictConfig, source: _Source) -> list[Path]:
    """Fit, look, save and tell; returns the files."""
    from densecal.posthoc import save_calibrator

    fit_ids = _readable(config, source.fit)
    test_ids = _readable(config, source.test) if source.test is not None else []
    folds = {} if test_ids else _folds(config, source, fit_ids)
    calibrators = _build(config, source.schema)
    fold_calibrators = [_build(config, source.schema) for _ in range(max(folds.values(), default=-1) + 1)]
    controls = Controls(config.control, source.schema, folds)
    for case in _each(config, source.fit, fit_ids, "Fitting"):
        controls.update(case)
        probs, label = source.prepare(case.probs).unsqueeze(0), case.label.unsqueeze(0)
        mask = _mask(config, source.schema, label)
        fed = [calibrators, *(some for fold, some in enumerate(fold_calibrators) if fold != folds[case.case_id])]
        for calibrator in (one for some in fed for one in some.values()):
            calibrator.update(probs, label, mask=mask, case_ids=[case.case_id], from_probs=True)
    for calibrator in (one for some in (calibrators, *fold_calibrators) for one in some.values()):
        calibrator.finish()
    controls.finish()

    offered = list(test_ids or fit_ids)  # case_index counts these, also where one of them turns out not to be readable
    looked_at: Mapping[str, Evaluation] = {}
    if test_ids:
        looked_at = _evaluate(config, source, source.test, test_ids, lambda _: calibrators, controls)
    elif folds:
        looked_at = _evaluate(config, source, source.fit, fit_ids, lambda case_id: fold_calibrators[folds[case_id]], controls)
    facts = {"classes": list(source.schema.names), "fitted_on": fit_ids, "region": config.fit_region, **source.facts}
    folder, paths = source.folder(), {}
    for name, calibrator in calibrators.items():
        path = paths[name] = save_calibrator(calibrator, folder / f"{name}.safetensors", facts)
        _record(config, source, name, calibrator, path, facts, looked_at, offered, crossed=len(fold_calibrators))
    _tell(source, calibrators, looked_at, paths, crossed=len(fold_calibrators), fitted_on=len(fit_ids))
    if controls.levels:
        held_out = None if not looked_at else source.fit_split if folds else "test"
        path = controls.write(folder, {"fit_split": source.fit_split, **{key: value for key, value in facts.items() if key != "region"}}, held_out)
        print("\n".join([f"control  {path.resolve()}", *controls.lines()]), flush=True)
    return list(paths.values())


def _build(config: DictConfig, schema: LabelSchema) -> dict[str, Calibrator]:
    known = {"num_classes": schema.num_classes, "activation": schema.activation, "ignore_index": schema.ignore_index}
    return {str(name): build(node, f"posthoc.{name}", **known) for name, node in config.posthoc.items()}


def _readable(config: DictConfig, cases: Any) -> list[str]:
    """Names of the cases without a problem that can be seen before they are read in full."""
    problems = cases.problems()
    if problems and config.strict:
        _refuse([str(problem) for problem in problems])
    bad = {problem.case_id for problem in problems}
    return [case_id for case_id in cases.case_ids if case_id not in bad]


def _refuse(lines: Sequence[str]) -> None:
    count = f"{len(lines)} problem{'s' if len(lines) != 1 else ''}"
    raise CommandError(
        "\n".join([f"{count}, and nothing was written. Mend the files, or leave such cases out with strict=false:", *dict.fromkeys(lines)])
    )


def _each(config: DictConfig, cases: Any, case_ids: list[str], word: str) -> Iterator[PredictedCase]:
    """Cases one after the other; those that cannot be read are taken from ``case_ids`` or, with ``strict``, refused together."""
    from tqdm import tqdm

    unreadable: dict[str, str] = {}
    for case_id in tqdm(list(case_ids), desc=word, unit="case", leave=False, disable=not sys.stderr.isatty()):
        try:
            case = cases[case_id]
        except ValueError as error:
            unreadable[case_id] = str(error)
            continue
        yield case
    if unreadable and config.strict:
        _refuse(list(unreadable.values()))
    for case_id, line in unreadable.items():
        print(f"left out: {line}", file=sys.stderr)
        case_ids.remove(case_id)


def _folds(config: DictConfig, source: _Source, case_ids: Sequence[str]) -> dict[str, int]:
    """Fold of each case, persons kept whole; none where all cases are one person's."""
    from densecal.seeds import derive_seed

    persons = sorted({source.subject(case_id) for case_id in case_ids}, key=lambda person: (derive_seed(0, "fold", person), person))
    if len(persons) < 2:
        return {}
    fold = {person: place % config.num_folds for place, person in enumerate(persons)}
    return {case_id: fold[source.subject(case_id)] for case_id in case_ids}


def _mask(config: DictConfig, schema: LabelSchema, label: Tensor) -> Tensor | None:
    """Where to fit, ``(1, *spatial)``."""
    from densecal.metrics import dilate, foreground_region

    if config.fit_region == "all":
        return None
    if not schema.has_structure:
        raise CommandError("fit_region: there is no background, so every pixel counts. Leave it at all.")
    radius = int(config.foreground_radius)
    if schema.background is None:
        inside = (label == 1) if not label.is_floating_point() else label > 0.5
        return dilate(inside.any(1), radius)
    return foreground_region(label, radius=radius, background=schema.background, ignore_index=schema.ignore_index)


def _evaluate(
    config: DictConfig,
    source: _Source,
    cases: Any,
    case_ids: list[str],
    chosen: Callable[[str], Mapping[str, Calibrator]],
    controls: Controls,
) -> dict[str, Evaluation]:
    """The scores before, under ``""``, and after each method; what thresholds do is kept by ``controls``."""
    from densecal.cli.evaluation import add_case
    from densecal.inference import resolve_device
    from densecal.metrics import SegmentationEvaluation

    groups = [source.subject(case_id) for case_id in case_ids]
    options = {"num_bins": config.num_bins, "foreground_radius": config.foreground_radius, "replicates": config.replicates, "groups": groups}
    device = resolve_device(config.device)
    evaluations = {name: SegmentationEvaluation(source.schema, **options).to(device) for name in ("", *config.posthoc)}
    index = {case_id: place for place, case_id in enumerate(case_ids)}
    for case in _each(config, cases, case_ids, "Evaluating"):
        controls.look(case)
        add_case(evaluations[""], case, index[case.case_id])
        probs = source.prepare(case.probs).unsqueeze(0)
        for name, calibrator in chosen(case.case_id).items():
            add_case(evaluations[name], replace(case, probs=calibrator(probs, from_probs=True)[0]), index[case.case_id])
    return {name: evaluation.compute() for name, evaluation in evaluations.items()}


def _record(
    config: DictConfig,
    source: _Source,
    name: str,
    calibrator: Calibrator,
    path: Path,
    facts: Mapping[str, Any],
    looked_at: Mapping[str, Evaluation],
    case_ids: Sequence[str],
    *,
    crossed: int,
) -> None:
    """``<name>.json`` beside the calibrator: what was found, and the scores before and after; ``docs/summary.md`` describes every key."""
    from dataclasses import asdict

    import densecal
    from densecal.files import write_atomically
    from densecal.metrics import paired_differences
    from densecal.report.summary import jsonable, to_json

    evaluation = None
    if looked_at:
        before, after = looked_at[""], looked_at[name]
        groups = [source.subject(case_id) for case_id in case_ids]
        differences = paired_differences(after, before, replicates=config.replicates, groups=groups) if config.replicates else {}
        evaluation = {
            "split": source.fit_split if crossed else "test",
            "num_folds": crossed or None,
            "cases": [case_ids[row["case_index"]] for row in after.cases],
            "settings": asdict(after.settings) | {"ignore_index": source.schema.ignore_index},
            "before": {"scores": before.scalars(), "intervals": before.intervals},
            "after": {"scores": after.scalars(), "intervals": after.intervals},
            "differences": {key: {"difference": gap, "low": low, "high": high} for key, (gap, low, high) in differences.items()},
        }
    content = {
        "schema_version": 1,
        "densecal_version": densecal.__version__,
        "method": name,
        "file": path.name,
        "found": calibrator.summary(),
        "num_pixels": int(calibrator.num_pixels),
        "options": {key: value for key, value in OmegaConf.to_container(config.posthoc[name]).items() if key != "_target_"},  # type: ignore[union-attr]
        "fit_split": source.fit_split,
        **facts,
        "evaluation": evaluation,
    }
    write_atomically(path.with_suffix(".json"), to_json(jsonable(content)))


def _tell(
    source: _Source,
    calibrators: Mapping[str, Calibrator],
    looked_at: Mapping[str, Evaluation],
    paths: Mapping[str, Path],
    *,
    crossed: int,
    fitted_on: int,
) -> None:
    from densecal.cli.evaluation import print_scores

    print(f"{source.title}: fitted on {fitted_on} {source.fit_split} cases")
    if looked_at:
        how = "on the test cases" if not crossed else f"by cross-fitting in {crossed} folds, each case by calibrators that have not seen it"
        print(f"before and after, {how}:")
        width = max(map(len, ("before", *calibrators)))
        print_scores(looked_at[""], "before".ljust(width))
        for name in calibrators:
            print_scores(looked_at[name], name.ljust(width))
    else:
        print("No case was held out, so nothing is said about new ones: on the cases that it was fitted on, any calibrator looks good.")
    for name, path in paths.items():
        found = ", ".join(f"{key} {value:.4g}" for key, value in calibrators[name].summary().items() if isinstance(value, float))
        print(f"{name}  {path.resolve()}{f'  {found}' if found else ''}", flush=True)


# Repair.


def _apply(config: DictConfig, path: Path) -> None:
    """Repair every prediction of a folder, case by case; a command that was stopped goes on where it was."""
    from tqdm import tqdm

    from densecal.data.nnunet import description_file
    from densecal.data.repair import StoredPrediction, find_predictions
    from densecal.files import write_atomically
    from densecal.inference.calibration import begin_calibrated, read_calibration

    calibration = read_calibration(path)
    calibrator = calibration.calibrator
    source, output = Path(config.apply_to), Path(config.output)
    files = find_predictions(source, config.prediction_suffix)
    stored, problems = {}, []
    for case_id, file in files.items():
        try:
            stored[case_id] = StoredPrediction.open(file, calibrator.num_classes, calibrator.activation, config.axes)
        except ValueError as error:
            problems.append(str(error))
    if problems and config.strict:
        _refuse(problems)
    begin_calibrated(output, calibration)
    if seen := calibration.overlap_note(files):
        print(f"warning: {seen}", file=sys.stderr)
    for name in ("dataset.json", "plans.json"):
        if (described := description_file(source, name)) is not None:
            write_atomically(output / name, described.read_bytes())
    left = {case_id: one for case_id, one in stored.items() if not (output / one.file.path.name).is_file()}
    unreadable = []
    for case_id, one in tqdm(left.items(), desc="Repairing", unit="case", leave=False, disable=not sys.stderr.isatty()):
        target = output / one.file.path.name
        try:
            one.write(target, _repaired(calibrator, one, from_logits=config.from_logits))
        except ValueError as error:
            unreadable.append(str(error))
            continue
        if (companion := one.file.path.with_name(f"{case_id}.pkl")).is_file():
            shutil.copyfile(companion, output / companion.name)  # nnU-Net's record of the image's geometry; copied, never opened
    there = f", {len(stored) - len(left)} of them there already" if len(left) < len(stored) else ""
    print(f"repaired  {output.resolve()}: {len(stored) - len(unreadable)} cases{there}; {calibration.words}")
    if not calibrator.keeps_labels:
        print("The most probable class may have changed: hard label maps are not copied. Take the largest probability.")
    if problems or unreadable:
        raise CommandError("\n".join([f"{len(problems) + len(unreadable)} of {len(files)} cases could not be repaired:", *problems, *unreadable]))


def _repaired(calibrator: Calibrator, stored: Any, *, from_logits: bool) -> Tensor:
    """Calibrated probabilities ``(C, *rest)``, axes as in the file."""
    from densecal.data.predictions import is_nnunet
    from densecal.posthoc import without_zeros

    values = stored.read(calibrator.num_classes, calibrator.activation)
    if not from_logits:
        low, high = float(values.min()), float(values.max())
        if low < -1e-3 or high > 1 + 1e-3:
            raise ValueError(
                f"{stored.file.path}: holds values from {low:.4g} to {high:.4g}, not probabilities. Set from_logits=true if they are logits."
            )
        values = without_zeros(values.clamp(0, 1), calibrator.activation)
    if calibrator.pointwise:
        return calibrator(values.flatten(1).unsqueeze(0), from_probs=not from_logits)[0].view(values.shape)
    # A neighbourhood has the axes that it was fitted with, those of the labels: nnU-Net's are reversed, and its images have a depth of 1.
    order = tuple(range(values.ndim))
    if is_nnunet(stored.file):
        order = (0, *reversed(order[1:]))
    turned = values.permute(order)
    flat = turned.reshape(turned.shape[0], *(n for n in turned.shape[1:] if n > 1))
    return calibrator(flat.unsqueeze(0), from_probs=not from_logits)[0].view(turned.shape).permute(order)


if __name__ == "__main__":
    main()
