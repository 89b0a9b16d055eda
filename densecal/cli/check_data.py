"""``densecal-check``: look at a data set before training on it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from densecal.data.card import DataCard, list_cards, load_card, override_card, resolve_root
from densecal.data.layouts import Case, find_cases
from densecal.data.medium import medium_of
from densecal.data.split import split_cases
from densecal.data.validate import find_problems, survey

__all__ = ["main"]

_EXAMPLES = """examples:
  densecal-check --list
  densecal-check mni152
  densecal-check hippocampus --root /data/Task04_Hippocampus
  densecal-check data=my_set.yaml data.root=/data/my_set data.ignore_index=255
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Print a summary of a data set and one line for each of its problems.

    Exit status 0 for a data set that can be trained on, 1 for one with problems, 2 for a command that cannot be understood.
    """
    parser = argparse.ArgumentParser(
        prog="densecal-check",
        description="Read every file of a data set; print a summary, and one line for each problem.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("card", nargs="*", metavar="CARD", help="name of a card or path of its YAML file, and settings such as data.root=DIR")
    parser.add_argument("--root", help="folder of the data set, as data.root=DIR")
    parser.add_argument("--list", action="store_true", help="list the cards")
    args = parser.parse_args(argv)
    if args.list:
        _print_cards()
        return
    try:
        card = _chosen_card(args.card, args.root)
        problems = _report(card)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if problems:
        raise SystemExit(1)


def _chosen_card(words: Sequence[str], root: str | None) -> DataCard:
    names = [word.removeprefix("data=") for word in words if "=" not in word or word.startswith("data=")]
    settings = [word for word in words if "=" in word and not word.startswith("data=")]
    if len(names) != 1:
        raise ValueError(
            f"Name one data set card, but got {names or 'none'}. Cards: {', '.join(list_cards())}; `densecal-check --list` describes them."
        )
    for setting in settings:
        if not setting.startswith("data."):
            raise ValueError(f"Settings here begin with `data.`, as in data.root=DIR, but got {setting!r}.")
    overrides = [setting.removeprefix("data.") for setting in settings]
    return override_card(load_card(names[0]), [*overrides, *([f"root={root}"] if root else [])])


def _report(card: DataCard) -> int:
    """Print what the files hold; return the number of problems."""
    root = resolve_root(card)
    count = _report_set(root, card, split=True)
    if card.test_root is not None:
        count += _report_set(Path(card.test_root).expanduser(), card, split=False)
    return count


def _report_set(root: Path, card: DataCard, split: bool) -> int:
    cases = find_cases(root, card)
    facts = survey(cases, card, progress=sys.stderr.isatty())
    problems = [problem for fact in facts for problem in fact.problems] if cases else find_problems([], card, root=root)
    print(f"{card.name} in {root}")
    print(f"  cases    {_count(cases)}")
    readable = [fact for fact in facts if fact.shape]
    if readable:
        print(f"  shape    {_range(np.array([fact.shape for fact in readable]))} {medium_of(card).element}s")
        if all(fact.spacing for fact in readable):
            print(f"  spacing  {_range(np.array([fact.spacing for fact in readable]))} mm")
    counted = [fact for fact in facts if fact.label_voxels.size]
    if counted:
        voxels = np.sum([fact.label_voxels for fact in counted], axis=0)
        ignored = sum(fact.ignored_voxels for fact in counted)
        shares = [f"{name} {100 * n / max(voxels.sum(), 1):.2f} %" for name, n in zip(card.classes, voxels, strict=True)]
        print(f"  labels   {', '.join(shares)}" + (f"; ignored {100 * ignored / (voxels.sum() + ignored):.2f} % of all" if ignored else ""))
        if absent := [name for name, n in zip(card.classes, voxels, strict=True) if n == 0]:
            print(f"  absent   {', '.join(absent)}: no {medium_of(card).element} in any label")
        regions = dict(zip(card.regions, card.region_counts(voxels), strict=False))
        if regions:
            print(f"  regions  {', '.join(f'{name} {100 * n / max(voxels.sum(), 1):.2f} %' for name, n in regions.items())}")
        if absent := [name for name, n in regions.items() if n == 0]:
            print(f"  absent   {', '.join(absent)}: no {medium_of(card).element} of its classes in any label")
    if rated := [fact for fact in facts if fact.num_raters]:
        counts, agreement = np.array([fact.num_raters for fact in rated]), np.array([fact.agreement for fact in rated])
        agreement = agreement[np.isfinite(agreement)]
        dice = f"; Dice of each two {agreement.mean():.4f} ({agreement.min():.4f} to {agreement.max():.4f})" if agreement.size else ""
        per_case = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
        print(f"  raters   {per_case} per case{dice}")
    if split and cases and not problems:
        sides = split_cases(cases, card)
        print("  split    " + ", ".join(f"{name} {_count(side)}" for name, side in sides.items()))
    for problem in problems:
        print(problem)
    print(f"  {len(problems)} problem(s)" if problems else "  no problems")
    return len(problems)


def _count(cases: Sequence[Case]) -> str:
    grouped = any(case.subject != case.id for case in cases)
    return f"{len(cases)}" + (f" of {len({case.subject for case in cases})} subjects" if grouped else "")


def _range(values: np.ndarray) -> str:
    """``a x b x c`` where all cases agree, else minimum, median and maximum along each axis."""
    rows = [values.min(axis=0), np.median(values, axis=0), values.max(axis=0)]
    spelled = [" x ".join(f"{v:.4g}" for v in row) for row in rows]
    return spelled[0] if len(set(spelled)) == 1 else f"{spelled[0]} (min), {spelled[1]} (median), {spelled[2]} (max)"


def _print_cards() -> None:
    for name in list_cards():
        card = load_card(name)
        print(f"{' / '.join([name, *card.aliases])}: {card.description}")
        print(f"    {len(card.classes)} classes ({', '.join(card.classes)}); {card.how_to_get}")
    print("A data set of your own: copy a card, change it, and give its path. datasets/README.md explains the keys.")


if __name__ == "__main__":
    main()
