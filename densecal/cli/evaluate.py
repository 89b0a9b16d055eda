"""``densecal-evaluate``: whether the probabilities of a model, densecal's or anybody's, mean what they say."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from omegaconf import DictConfig, OmegaConf

from densecal.cli.configuration import CommandError, command

if TYPE_CHECKING:
    from densecal.data import DataCard

__all__ = ["evaluate", "main", "saved_model"]


def main() -> None:
    """Evaluate; see ``densecal-evaluate --help``."""
    command("evaluate", evaluate)


class _Cases(Protocol):
    """Where cases come from: predicted by a run when asked for, or read from files."""

    case_ids: tuple[str, ...]

    def problems(self) -> Sequence[Any]: ...
    def __getitem__(self, case: str) -> Any: ...
    def image(self, case_id: str) -> Any: ...


@dataclass
class _Model:
    """One model to evaluate.

    Args:
        cases: Its cases.
        schema: The classes or regions.
        facts: What is known of it, for the report.
        subjects: Case id -> person.
        notes: What a reader must know.
        class_shares: Of the training labels, where they are known.
    """

    cases: _Cases
    schema: Any
    facts: dict[str, Any]
    subjects: Callable[[str], str]
    notes: list[str] = field(default_factory=list)
    class_shares: list[float] | None = None


def evaluate(config: DictConfig) -> Path:
    """Evaluate one or several models and write a report.

    Nothing is written before every case has been read and scored.

    Returns:
        Path of the report.

    Raises:
        CommandError: What the user can mend.
    """
    _check(config)
    from densecal.cli.evaluation import print_scores, telling_examples  # a mistyped setting need not wait for torch
    from densecal.cli.facts import minutes
    from densecal.metrics import class_prior_baseline, paired_differences
    from densecal.report import write_comparison, write_report
    from densecal.runs import provenance

    started = time.perf_counter()
    try:
        models = _models(config)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None
    _check_alike(models)
    found = {name: model.cases.problems() for name, model in models.items()}
    problems = {name: [str(problem) for problem in some] for name, some in found.items()}
    if config.strict and any(problems.values()):
        _refuse(problems, models)
    case_ids = sorted({case_id for model in models.values() for case_id in model.cases.case_ids})
    index = {case_id: place for place, case_id in enumerate(case_ids)}
    first = next(iter(models.values()))
    groups = [first.subjects(case_id) for case_id in case_ids]
    results, unreadable = {}, {}
    for name, model in models.items():
        bad = {problem.case_id for problem in found[name]}
        wanted = [case_id for case_id in model.cases.case_ids if case_id not in bad]
        results[name], unreadable[name] = _score(config, name if len(models) > 1 else "", model, wanted, index, groups)
    if config.strict and any(unreadable.values()):
        _refuse(unreadable, models)
    for name, model in models.items():
        model.notes += [f"Left out: {problem}" for problem in dict.fromkeys([*problems[name], *unreadable[name]])]
        if not results[name].cases:
            raise CommandError(f"{name}: no case could be evaluated; nothing is written.")
        model.facts |= {"time": minutes(time.perf_counter() - started), **provenance()}

    baselines = {
        name: None if model.class_shares is None else class_prior_baseline(results[name], model.class_shares) for name, model in models.items()
    }
    folder = _output(config)
    try:
        for name, model in models.items():
            page = write_report(
                folder if len(models) == 1 else folder / name,
                results[name],
                model.schema,
                model.facts,
                telling_examples(results[name], model.cases, model.notes, case_ids),
                notes=model.notes,
                case_ids=case_ids,
                baseline=baselines[name],
            )
        if len(models) > 1:
            reference = next(iter(models))
            differences = {
                name: paired_differences(result, results[reference], replicates=config.replicates, groups=groups)
                for name, result in results.items()
                if name != reference and config.replicates
            }
            page = write_comparison(folder, results, first.schema, _shared_facts(models), differences=differences, case_ids=case_ids)
    except OSError as error:
        raise CommandError(f"output: cannot write to {folder} ({error.strerror or error}).") from None
    for name, result in results.items():
        print_scores(result, name if len(models) > 1 else "", baselines[name])
    print(f"report  {page.resolve()}", flush=True)
    return page


def _check(config: DictConfig) -> None:
    for name, allowed in (
        ("checkpoint", ("best", "last")),
        ("boundary_unit", ("voxels", "mm")),
        ("axes", ("auto", "nnunet", "channels_first", "channels_last")),
        ("activation", (None, "softmax", "sigmoid")),
        ("split", (None, "train", "val", "test", "all")),
    ):
        if config[name] not in allowed:
            raise CommandError(f"{name}: expected one of {allowed}, but got {config[name]!r}.")
    if config.run is None and config.ensemble is None and config.predictions is None:
        raise CommandError(
            "Nothing to evaluate: give a trained run as run=DIR, or several as ensemble=[DIR,DIR], or saved probabilities as predictions=DIR labels=DIR."
        )
    if config.predictions is not None and config.labels is None and config.data is None and config.run is None and config.ensemble is None:
        raise CommandError("labels: give the folder of reference labels, labels=DIR, or a data set with a card, data=CARD data.root=DIR.")
    if config.subject_pattern is not None:
        try:
            groups = re.compile(config.subject_pattern).groups
        except re.error as error:
            raise CommandError(f"subject_pattern: {config.subject_pattern!r} is no regular expression ({error}).") from None
        if groups < 1:
            raise CommandError(f"subject_pattern: expected a group in brackets that finds the person, but got {config.subject_pattern!r}.")
    for name in ("num_bins", "replicates", "foreground_radius"):
        if config[name] < (1 if name == "num_bins" else 0):
            raise CommandError(f"{name}: expected {'at least 1' if name == 'num_bins' else '0 or more'}, but got {config[name]}.")
    for name in ("boundary_width", "surface_tolerance"):
        if config[name] is not None and config[name] <= 0:
            raise CommandError(f"{name}: expected a number above 0, or null to leave it out, but got {config[name]}.")


def _named(setting: str, value: Any) -> dict[str, str]:
    """Name -> path of one model, a list of them, or a mapping."""
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if value is None:
        return {}
    if isinstance(value, dict):
        named = {str(name): str(path) for name, path in value.items()}
    else:
        paths = [str(path) for path in (value if isinstance(value, list) else [value])]
        parts = [Path(path).resolve().parts for path in paths]
        # As much of the end of each path as tells them apart.
        length = next((n for n in range(1, max(map(len, parts), default=1) + 1) if len({part[-n:] for part in parts}) == len(parts)), 0)
        if not length:
            raise CommandError(f"{setting}: expected each path once, but got {', '.join(paths)}.")
        named = {"_".join(part[-length:]).strip("/"): path for part, path in zip(parts, paths, strict=True)}
    if bad := [name for name in named if not re.fullmatch(r"[\w][\w .=+-]*", name)]:
        raise CommandError(
            f"{setting}: names become folders, so expected letters, digits and any of ' .=+-_', but got {bad[0]!r}. Give names as {{name: path}}."
        )
    return named


def _models(config: DictConfig) -> dict[str, _Model]:
    from densecal.cli.members import member_paths
    from densecal.inference import resolve_device

    device = resolve_device(config.device)
    members, runs, folders = member_paths("ensemble", config.ensemble), _named("run", config.run), _named("predictions", config.predictions)
    trained = ({"ensemble": members} if members else {}) | {name: [path] for name, path in runs.items()}
    if members and "ensemble" in runs:
        raise CommandError("run: the name 'ensemble' is that of the ensemble. Give names as {name: path}.")
    if repeated := trained.keys() & folders.keys():
        raise CommandError(f"predictions: the name {min(repeated)!r} is taken by a run. Give names as {{name: path}}.")
    models = {}
    for name, paths in trained.items():
        models[name] = _trained(config, paths, device)
        if config.calibration is not None and (not members or name == "ensemble"):
            calibrated = _trained(config, paths, device, config.calibration)
            models[f"{name}_{calibrated.cases.predictor.calibration.name}"] = calibrated  # type: ignore[attr-defined]
    for name, path in folders.items():
        models[name] = saved_model(config, path, [model.schema.names for model in models.values()])
    return models


def _trained(config: DictConfig, paths: Sequence[str], device: Any, calibration: str | None = None) -> _Model:
    """A run of densecal's or an ensemble of several, calibrated or as it is."""
    from densecal.cli.facts import reference, shared_facts, training_facts
    from densecal.data import override_card
    from densecal.data.layouts import subject_of
    from densecal.inference import Ensemble, RunCases, cases_of_split
    from densecal.inference.ensemble import check_one_data_set

    ensemble = Ensemble.from_runs(paths, config.checkpoint, device, config.inference, calibration, trust_config=config.trust_config)
    card, *others = (member.card for member in ensemble.members)
    split = config.split
    if config.data is not None:
        chosen = _card(config.data)
        if list(chosen.classes) != list(card.classes):
            raise ValueError(f"data: {paths[0]} was trained on the classes {list(card.classes)}, but {chosen.name} has {list(chosen.classes)}.")
        if chosen.regions and chosen.told_apart != card.told_apart:
            raise ValueError(
                f"data: {paths[0]} was trained on {card.told_apart}, but the command line says {chosen.told_apart}. Leave data.regions out."
            )
        chosen = override_card(chosen, {"regions": card.regions})
        other = chosen.name != card.name
        card, others, split = chosen, [], split or ("all" if other else None)
    elif config.root is None:
        check_one_data_set(ensemble.members, paths)
    if config.root is not None:
        card = override_card(card, {"root": config.root})
    name, cases = cases_of_split(card, split, others)
    single = len(paths) == 1
    facts: dict[str, Any] = {
        "title": f"{card.name}: {paths[0] if single else f'ensemble of {len(paths)}'}",
        "split": f"{len(cases)} cases, {name}",
        "data set": card.name + (f" ({card.modality})" if card.modality else ""),
        "reference": reference(card),
        "licence": card.licence or None,
        "citation": list(card.citation),
        "run": paths[0] if single else list(paths),
        "checkpoint": config.checkpoint if all(Path(path).is_dir() for path in paths) else None,
        "calibration": ensemble.calibration.words if ensemble.calibration else "none",
        **shared_facts(training_facts(member.config, member.model) for member in ensemble.members if member.config is not None),
    }
    notes = list(card.notes)
    if name in ("train", "val", "all") and config.data is None:
        notes.append(
            f"These are {'training' if name == 'train' else 'validation' if name == 'val' else 'all'} cases: the model has seen them or was chosen by them."
        )
    if ensemble.calibration:
        notes += _told(ensemble.calibration.overlap_note(case.id for case in cases))
    return _Model(RunCases(ensemble, cases, card), card.schema, facts, lambda case_id: subject_of(case_id, card), notes, _stored_shares(paths))


def _told(warning: str | None) -> list[str]:
    """A warning as notes of the report, printed too."""
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    return [] if warning is None else [warning]


def _stored_shares(paths: Sequence[str]) -> list[float] | None:
    """The class shares that runs were trained on, on average, as their own reports have them; None with a checkpoint file or a run without a report."""
    every = []
    for path in paths:
        report = Path(path) / "summary.json"
        baseline = json.loads(report.read_text()).get("baseline") if report.is_file() else None
        if not baseline:
            return None
        every.append(baseline["class_shares"])
    return [sum(shares) / len(every) for shares in zip(*every, strict=True)]


def _card(config: DictConfig) -> DataCard:
    """The chosen data set."""
    from densecal.data import DataCard

    card = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataCard), config))
    assert isinstance(card, DataCard)
    return card


def saved_model(config: DictConfig, path: str, known_names: Sequence[tuple[str, ...]]) -> _Model:
    """A folder of anybody's predictions; where it does not name its classes, they are those of the models before it, if as many."""
    from densecal.cli.facts import reference
    from densecal.data import PredictionFolder, resolve_root
    from densecal.data.card_labels import CardLabels
    from densecal.data.layouts import subject_of
    from densecal.inference import cases_of_split
    from densecal.inference.calibration import overlap_note, read_note
    from densecal.labels import LabelSchema

    card: DataCard | None = None
    split = ""
    if config.labels is None:
        if config.data is None:
            raise ValueError("labels: give the folder of reference labels, labels=DIR, or a data set with a card, data=CARD data.root=DIR.")
        card = _card(config.data)
        split, chosen = cases_of_split(card, config.split)
    cases = PredictionFolder(
        path,
        config.labels if card is None else CardLabels(card, chosen, resolve_root(card)),
        num_classes=None if config.classes is None else len(config.classes),
        activation=config.activation,
        from_logits=config.from_logits,
        axes=config.axes,
        ignore_index=config.ignore_index,
        regions={str(name): list(values) for name, values in config.regions.items()} if config.regions else None,
        label_values=None if config.label_values is None else list(config.label_values),
        prediction_suffix=config.prediction_suffix,
        label_suffix=config.label_suffix,
        images=config.images,
    )
    alike = next((names for names in known_names if len(names) == cases.num_classes), None)
    names = config.classes or cases.class_names or alike or [f"class {c}" for c in range(cases.num_classes)]
    background = config.background if cases.activation == "softmax" else None
    schema = card.schema if card else LabelSchema(tuple(names), cases.ignore_index, background, activation=cases.activation)
    facts: dict[str, Any] = {
        "title": f"Predictions in {Path(path).name}",
        "split": f"{len(cases.case_ids)} cases with prediction and label",
        "predictions": str(path),
        "labels": str(config.labels) if card is None else f"{card.name}, {split}",
        "read as": "logits" if config.from_logits else "probabilities",
        "classes": "exclusive (softmax)" if cases.activation == "softmax" else "regions that may overlap (sigmoid)",
    }
    notes = []
    if (calibrated := read_note(Path(path))) is not None:
        facts["calibration"] = f"{calibrated['method']}, fitted on {len(calibrated['fitted_on'])} cases"
        notes = _told(overlap_note(calibrated["method"], calibrated["fitted_on"], cases.case_ids))
    if card:
        facts |= {"reference": reference(card), "licence": card.licence or None, "citation": list(card.citation)}
        return _Model(cases, schema, facts, lambda case_id: subject_of(case_id, card), [*card.notes, *notes])
    return _Model(cases, schema, facts, _subject_finder(config.subject_pattern), notes)


def _subject_finder(pattern: str | None) -> Callable[[str], str]:
    def subject(case_id: str) -> str:
        match = re.search(pattern, case_id) if pattern else None
        if pattern and match is None:
            raise CommandError(f"subject_pattern: {pattern!r} finds no person in the name of the case {case_id!r}.")
        return match.group(1) if match else case_id

    return subject


def _check_alike(models: Mapping[str, _Model]) -> None:
    (first_name, first), *others = models.items()
    for name, model in others:
        if model.schema.names != first.schema.names or model.schema.activation != first.schema.activation:
            raise CommandError(
                f"Models with the same classes can be compared, but {first_name} has {list(first.schema.names)} ({first.schema.activation}) "
                f"and {name} {list(model.schema.names)} ({model.schema.activation})."
            )
        if not set(model.cases.case_ids) & set(first.cases.case_ids):
            raise CommandError(f"Models are compared on the same cases, but {first_name} and {name} share none.")


def _refuse(problems: Mapping[str, Sequence[str]], models: Mapping[str, _Model]) -> None:
    lines = [line for name in models for line in problems[name]]
    count = f"{len(lines)} problem{'s' if len(lines) != 1 else ''}"
    raise CommandError(
        "\n".join([f"{count}, and nothing was written. Mend the files, or leave such cases out with strict=false:", *dict.fromkeys(lines)])
    )


def _score(
    config: DictConfig, name: str, model: _Model, case_ids: Sequence[str], index: Mapping[str, int], groups: Sequence[str]
) -> tuple[Any, list[str]]:
    """Read and score one case after the other; memory is that of one case."""
    from tqdm import tqdm

    from densecal.cli.evaluation import add_case
    from densecal.inference import resolve_device
    from densecal.metrics import SegmentationEvaluation

    evaluation = SegmentationEvaluation(
        model.schema,
        num_bins=config.num_bins,
        foreground_radius=config.foreground_radius,
        boundary_width=config.boundary_width,
        boundary_unit=config.boundary_unit,
        surface_tolerance=config.surface_tolerance if model.schema.has_structure else None,
        detail=True,
        replicates=config.replicates,
        groups=groups,
    ).to(resolve_device(config.device))
    unreadable = []
    description = f"Evaluating {name}".strip()
    for case_id in tqdm(case_ids, desc=description, unit="case", leave=False, disable=not sys.stderr.isatty()):
        try:
            case = model.cases[case_id]
        except ValueError as error:
            unreadable.append(str(error))
            continue
        if case.spacing is None and config.boundary_unit == "mm":
            raise CommandError(f"boundary_unit: the label of the case {case_id!r} does not tell its spacing in mm. Use boundary_unit=voxels.")
        add_case(evaluation, case, index[case_id])
    return evaluation.compute(), unreadable


def _shared_facts(models: Mapping[str, _Model]) -> dict[str, Any]:
    from densecal.runs import provenance

    return {
        "title": "Comparison of " + ", ".join(models),
        "models": {name: model.facts.get("run") or model.facts.get("predictions") for name, model in models.items()},
        **provenance(),
    }


def _output(config: DictConfig) -> Path:
    from densecal.runs import new_run_dir

    try:
        if config.output is None:
            return new_run_dir(Path("runs"), "evaluation")
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"output: cannot make the folder ({error.strerror or error}).") from None
    return folder


if __name__ == "__main__":
    main()
