"""``densecal-compare``: several runs of several methods in one table, with their spread over seeds."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from densecal.cli.configuration import CommandError, command

__all__ = ["compare", "main"]


def main() -> None:
    """Compare; see ``densecal-compare --help``."""
    command("compare", compare)


def compare(config: DictConfig) -> None:
    """Print the tables, and write them where ``output`` says.

    Raises:
        CommandError: What the user can mend.
    """
    from densecal.files import write_atomically
    from densecal.report.study import StudyRun, default_measures, difference_table, find_runs, mean_table, name_methods, read_run
    from densecal.report.tables import markdown

    places = [Path(place) for place in (config.runs if isinstance(config.runs, ListConfig) else [config.runs])]
    try:
        folders, unfinished = find_runs(places)
        runs = sorted(map(read_run, folders), key=lambda run: run.started)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None
    if not runs:
        raise CommandError(f"runs: none of the {len(unfinished)} runs is finished. Go on with one by resume={unfinished[0]}.")
    sets: dict[str, list[StudyRun]] = defaultdict(list)
    for run in runs:
        sets[run.data].append(run)
    tables, rows = [], []
    for data, members in sets.items():
        methods: dict[str, list[StudyRun]] = defaultdict(list)
        for name, run in zip(name_methods(members), members, strict=True):
            methods[name].append(run)
            rows.append({"method": name, "data": data, "run": str(run.folder), "seed": run.settings.get("seed"), "scores": dict(run.scores)})
        measures = list(config.measures or default_measures(members))
        try:
            tables.append(mean_table(methods, measures, f"{data}. Mean and standard deviation over runs"))
            if len(methods) > 1:
                baseline = config.baseline or next(iter(methods))
                caption = "Differences, paired by seed and fold, with the 95 % interval of their mean by Student's t"
                tables.append(difference_table(methods, baseline, measures, caption))
        except ValueError as error:
            raise CommandError(str(error)) from None
    page = "\n".join(markdown(table) for table in tables)
    if unfinished:
        page += f"\nNot finished, and left out: {', '.join(map(str, unfinished))}.\n"
    print(page, end="", flush=True)
    if config.output is not None:
        folder = Path(config.output)
        try:
            write_atomically(folder / "comparison.md", page)
            write_atomically(folder / "comparison.json", json.dumps(rows, indent=2) + "\n")
        except OSError as error:
            raise CommandError(f"output: cannot write to {folder} ({error.strerror or error}).") from None


if __name__ == "__main__":
    main()
