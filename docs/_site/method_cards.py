"""One page per method, from what the code says: the docstrings' formulas, the configs' defaults, a picture of what it does."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

from docstrings import to_markdown
from method_pictures import ARGUMENTS
from method_table import ROOT, Method
from torch import nn

from densecal.targets import Target

__all__ = ["FAMILIES", "card", "gallery"]

FAMILIES = {
    "targets": ("Targets", "What each pixel is to be taught, from its label: they change the distribution that a loss compares with."),
    "terms": ("Comparisons and penalties", "What is made of logits and target: distances between the two, and penalties that shape the logits."),
    "perturbation": ("Perturbation", "Labels that are perturbed while training, at one level or at one of each image's own."),
    "losses": ("Around others", "Sums of the above, and what goes around any loss."),
    "posthoc": ("After training", "Functions from a trained network's logits to better probabilities, fitted on cases that it was not trained on."),
}

# Side inputs, which `context` hands over by name.
SIDE_INPUTS = {
    "case_id": "name of each image, a list of strings",
    "image": "the images, `(N, channels, *spatial)`",
    "label_stack": "label maps of the same place at several times, `(N, T, *spatial)`",
    "perturbation": "level of each image, `(N,)`",
    "rater_labels": "a label map of each rater, `(N, R, *spatial)`",
    "spacing": "distance between voxels per axis, `(N, spatial_dims)`",
    "teacher_logits": "of one or several other networks, as `targets.TeacherTarget` says",
}


def public_name(entry: Any) -> str:
    """Where one imports it from: ``densecal.losses.SVLSLoss``."""
    return ".".join((*entry.__module__.split(".")[:2], entry.__name__))


def text_of(entry: Any) -> str:
    """What its docstring says before the arguments, and its sources. A module of a function says what the function does."""
    doc = inspect.getdoc(entry) or ""
    module = inspect.getmodule(entry)
    function = re.match(r"Module of :func:`(\w+)`", doc)
    if function:
        doc = inspect.getdoc(getattr(module, function[1])) or ""
    sections = re.split(r"\n\n(?=(?:Args|Returns|Raises|Reference|Example|Attributes):\n)", doc)
    text, *others = sections
    for section in others:
        if section.startswith("Reference:"):
            lines = textwrap.dedent(section.partition("\n")[2]).splitlines()
            text += '\n\n!!! quote "Reference"\n\n' + textwrap.indent("\n".join(lines), "    ")
    return to_markdown(text, resolver(module))


def resolver(module: Any) -> Callable[[str], str]:
    def resolve(name: str) -> str:
        found = getattr(module, name.partition(".")[0], None)
        return ".".join((public_name(found), *name.split(".")[1:])) if hasattr(found, "__module__") and hasattr(found, "__name__") else name

    return resolve


def example(method: Method) -> str:
    """Code that runs as pasted: the loss, or a compound loss of the part."""
    entry = method.entries[0]
    package, name = public_name(entry).rsplit(".", 1)
    required = [parameter.name for parameter in inspect.signature(entry).parameters.values() if parameter.default is inspect.Parameter.empty]
    arguments = {"case_ids": 'case_ids=["scan_1", "scan_2"]', "num_classes": "num_classes=3"}
    if method.family == "posthoc":
        return (
            f"import torch\nfrom {package} import {name}\n\n"
            "logits, labels = 4 * torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))  # of validation cases\n"
            f"calibrator = {name}(3).fit([(logits, labels)])\nprobs = calibrator(logits)\n"
        )
    if not issubclass(entry, nn.Module) or not set(required) <= set(arguments):
        return ""
    built = f"{name}({', '.join(arguments[parameter] for parameter in required)})"
    if package == "densecal.losses":
        return f"from densecal.losses import {name}\n\nloss_function = {built}\n"
    if issubclass(entry, Target):
        return (
            f"from densecal.losses import CompoundLoss\nfrom {package} import {name}\nfrom densecal.terms import CrossEntropy\n\n"
            f'loss_function = CompoundLoss({built}, {{"ce": {{"weight": 1.0, "term": CrossEntropy()}}}})\n'
        )
    return (
        f"from densecal.losses import CompoundLoss\nfrom densecal.targets import OneHotTarget\nfrom densecal.terms import {name}\n\n"
        f'loss_function = CompoundLoss(OneHotTarget(), {{"{method.slug}": {{"weight": 1.0, "term": {built}}}}})\n'
    )


def needs_of(method: Method) -> list[str]:
    found: dict[str, None] = {}
    for entry in method.entries:
        try:
            found |= dict.fromkeys(getattr(entry(**ARGUMENTS.get(entry.__name__, {})), "needs", ()))
        except TypeError:  # wants what only training knows
            continue
    return list(found)


def card(method: Method, *, has_picture: bool) -> str:
    """The page as Markdown."""
    parts = [f"# {method.name[0].upper()}{method.name[1:]}"]
    if method.papers:
        parts.append(method.papers)
    if has_picture:
        entry = method.entries[-1] if method.family == "perturbation" else method.entries[0]
        given = {name: value for name, value in ARGUMENTS.get(entry.__name__, {}).items() if name != "case_ids"}
        drawn = f" Drawn with {', '.join(f'`{name}={value}`' for name, value in given.items())}." if given else ""
        parts.append(f"![What {method.name} does]({method.slug}.svg){{ .method }}")
        parts.append(f"How to read it: [the pictures](index.md#the-pictures).{drawn}\n{{ .caption }}")
    for entry in method.entries:
        name = public_name(entry)
        parts.append(f"## `{name.removeprefix('densecal.')}`")
        parts.append(text_of(entry))
        parts.append(f"[Arguments of `{name.removeprefix('densecal.')}`][{name}]")
    needs = needs_of(method)
    if needs:
        parts.append("## What it needs beside logits and labels")
        parts.append("`densecal-train` hands these over; in a loop of your own they go into `context` of the loss.")
        parts.append("\n".join(f"- `{name}`: {SIDE_INPUTS.get(name, 'as its class says')}" for name in needs))
    code = example(method)
    if code:
        parts.append(f"## In Python\n\n```python\n{code}```")
    if method.configs:
        parts.append("## On the command line, and its defaults")
        for config in method.configs:
            kind, _, value = config.partition("=")
            commands = {
                "target": f"loss=compound {config}",
                "term": f"loss=compound term=[{value}]",
                "posthoc": f"densecal-calibrate run=RUN {config}",
            }
            command = commands.get(kind, config)
            text = (ROOT / "configs" / kind / f"{value}.yaml").read_text(encoding="utf-8").rstrip()
            parts.append(f'`{command}`\n\n```yaml title="configs/{kind}/{value}.yaml"\n{text}\n```')
    elif method.how:
        parts.append(f"## On the command line\n\n{method.how[0].upper()}{method.how[1:]}.")
    return "\n\n".join(parts) + "\n"


def gallery(methods: list[Method]) -> str:
    """The page that lists them all."""
    parts = [
        "# Methods",
        "A loss is a target and a weighted sum of terms. Any target goes with any terms, so every row below can be had alone or with others: `loss=compound target=svls "
        "term=[ce,dml]`, or [`losses.CompoundLoss`](compound.md). Each page has the formula, the source, the defaults and a picture; [Choose a method](../which-method.md) says what "
        "was measured.",
    ]
    for family, (title, what) in FAMILIES.items():
        rows = [m for m in methods if m.family == family]
        parts.append(f"## {title}\n\n{what}")
        lines = ["| method | source | on the command line |", "|---|---|---|"]
        lines += [f"| [{m.name}]({m.slug}.md) | {m.papers} | {m.how} |" for m in rows]
        parts.append("\n".join(lines))
    parts.append(
        "## The pictures\n\n"
        "Each is drawn by the code when this site is built, on two structures that touch, with the defaults unless the page says otherwise.\n\n"
        "- *Share that the label keeps*: what the target leaves to the class that the label names. The shares along the row of both pixels show all three classes.\n"
        "- *Pull towards the label*: minus the gradient at the logit of the label's class, times the number of pixels, when everywhere in the image that class has the "
        "probability on the axis and the other two share the rest. Where a line crosses zero, training comes to rest: a target that is one-hot never lets it, one that is soft "
        "does at the share that the label keeps. Orange is the pixel at the boundary, blue the one inside.\n"
        "- *Probability of the network's class*: before and after, of made-up logits that are twice as large as they should be, fitted on those same pixels."
    )
    return "\n\n".join(parts) + "\n"
