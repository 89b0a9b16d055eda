"""What a loss, a target or a term does, drawn from the code itself: what it keeps of each label, and how hard it pulls at a pixel.

``python docs/_site/method_pictures.py OUT`` writes one SVG per method of the README's table; the site is built with the same.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from method_table import Method, read_methods
from torch import Tensor, nn

from densecal.losses import CompoundLoss
from densecal.posthoc import Calibrator
from densecal.targets import OneHotTarget, SoftTarget, Target
from densecal.terms import CrossEntropy, Term

__all__ = ["picture"]

COLORS = ("#5e6ad2", "#e8710a", "#188038")
CONFIDENCES = torch.linspace(0.34, 0.995, 24)
INSIDE, EDGE = (13, 20), (13, 10)  # the two pixels, (row, column)

# What a class is given where its defaults would show nothing, or where it must be told something.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AdaptivePerturbation": {"case_ids": ["scan"], "alpha": 0.05},
    "StochasticPerturbation": {"alpha": 0.05},
    "SCBCE": {"alpha": 0.05},
    "MbLSLoss": {"margin": 3.0},
    "ACLSLoss": {"margin": 3.0},
    "DistanceSmoothingTarget": {"scale": 2.0},
    "Overlap": {"alpha": 0.3, "beta": 0.7},
}
# Nothing to draw: they take any other method, or learn what they do from the training.
WITHOUT = (
    "CompoundLoss",
    "DeepSupervisionLoss",
    "ScheduledTarget",
    "LossRule",
    "OnlineLabelSmoothingLoss",
    "BootstrappedCrossEntropy",
    "CRaCLoss",
    "ML1ACELoss",
)


def label_map() -> Tensor:
    """Two structures that touch, ``(1, 28, 40)``: classes 0 (around), 1 and 2."""
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(40.0), indexing="ij")
    labels = torch.zeros(28, 40, dtype=torch.long)
    labels[(rows - 13.5).square() + (columns - 19.5).square() * 0.9 < 88] = 1
    labels[(rows - 12.5).square() + (columns - 30.0).square() < 36] = 2
    return labels[None]


def side_inputs(labels: Tensor) -> dict[str, Any]:
    """Made up beside the labels: an image, raters who draw smaller and larger, a teacher that is unsure of the boundaries."""
    one_hot = nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    blurred = nn.functional.avg_pool2d(one_hot, 5, stride=1, padding=2, count_include_pad=False)
    raters = [labels, labels.roll(1, -1), labels.roll(-2, -2), labels.roll((1, 1), (-2, -1))]
    return {
        "image": labels[:, None].float() / 2,
        "spacing": torch.ones(1, 2),
        "rater_labels": torch.stack(raters, dim=1),
        "label_stack": torch.stack(raters, dim=1),
        "teacher_logits": blurred.clamp_min(0.01).log(),
        "case_id": ["scan"],
    }


def whole_loss(part: nn.Module) -> nn.Module:
    """A part as a loss: a target under cross-entropy, a term with the labels as they are."""
    if isinstance(part, Target):
        return CompoundLoss(part, {"ce": {"weight": 1.0, "term": CrossEntropy()}})
    if isinstance(part, Term):
        return CompoundLoss(OneHotTarget(), {"term": {"weight": 1.0, "term": part}})
    return part


def pull(loss: nn.Module, labels: Tensor, context: Mapping[str, Any]) -> Tensor:
    """Minus the gradient at the label's logit at INSIDE and EDGE, times the number of pixels, ``(len(CONFIDENCES), 2)``.

    Everywhere in the image the label's class has the same probability, and the other two share the rest.
    """
    one_hot = nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    pulls = []
    for confidence in CONFIDENCES:
        torch.manual_seed(0)  # what draws at random draws alike everywhere on the line
        logits = (one_hot * torch.log(2 * confidence / (1 - confidence))).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(logits, labels, context=context), logits)
        pulls.append(torch.stack([-gradient[0, labels[0][at], *at] * labels.numel() for at in (INSIDE, EDGE)]))
    return torch.stack(pulls)


def draw_labels(axes: Axes, labels: Tensor) -> None:
    axes.imshow(labels[0].numpy(), cmap=matplotlib.colors.ListedColormap(["#eceef5", "#b9c0ee", "#f8c998"]), interpolation="nearest")
    for (row, column), color in zip((INSIDE, EDGE), COLORS, strict=False):
        axes.plot(column, row, "o", color=color, markersize=5)
    axes.set_title("labels, and two pixels")
    axes.set_axis_off()


def draw_shares(axes: Axes, target: SoftTarget, labels: Tensor) -> None:
    kept = target.probs.gather(1, labels[:, None])[0, 0]
    image = axes.imshow(kept.numpy(), cmap="viridis", vmin=min(0.5, float(kept.min())), vmax=1.0, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, fraction=0.034, pad=0.02)
    axes.set_title("share that the label keeps")
    axes.set_axis_off()


def draw_profile(axes: Axes, target: SoftTarget) -> None:
    for c, shares in enumerate(target.probs[0, :, INSIDE[0]]):
        axes.plot(shares, color=("#80868b", *COLORS[1:])[c], label=f"class {c}")
    axes.set_title("shares along the row of both pixels")
    axes.set_xlabel("column")
    axes.legend(frameon=False, fontsize=7, loc="center left")


def draw_pull(axes: Axes, loss: nn.Module, labels: Tensor, context: Mapping[str, Any]) -> None:
    axes.plot(CONFIDENCES, 1 - CONFIDENCES, color="#bdc1c6", linestyle="--", label="cross-entropy")
    for values, color, where in zip(pull(loss, labels, context).T, COLORS, ("inside", "at a boundary"), strict=False):
        axes.plot(CONFIDENCES, values, color=color, label=where)
    axes.axhline(0, color="#5f6368", linewidth=0.6)
    axes.set_title("pull towards the label")
    axes.set_xlabel("probability of the label's class")
    axes.set_ylabel("- gradient of its logit")
    axes.legend(frameon=False, fontsize=7)


def draw_sequence(axes: Axes, target: Target) -> None:
    events = torch.zeros(1, 60, dtype=torch.long)
    events[0, [34, 57]] = 1
    axes.plot(target(events, 1).probs[0, 0], color=COLORS[0])
    axes.vlines(events[0].nonzero().flatten(), 0, 1, color=COLORS[1], linestyle=":", label="event")
    axes.set_title("how surely an event is ahead")
    axes.set_xlabel("step")
    axes.legend(frameon=False)


def draw_repair(axes: Axes, calibrator: type[Calibrator]) -> None:
    """Confidence before and after, of logits that are twice as large as they should be."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(4, 3, 12, 12, generator=generator)
    fair = 2 * nn.functional.interpolate(coarse, (48, 48), mode="bilinear")
    labels = torch.multinomial(fair.softmax(1).movedim(1, -1).reshape(-1, 3), 1, generator=generator).reshape(4, 48, 48)
    fitted = calibrator(3).fit([(2 * fair, labels)])
    before, after = (values.gather(1, fair.argmax(1, keepdim=True)).flatten() for values in ((2 * fair).softmax(1), fitted(2 * fair)))
    axes.plot([1 / 3, 1], [1 / 3, 1], color="#bdc1c6", linestyle="--")
    axes.plot(before[::7], after[::7], ".", color=COLORS[0], markersize=2)
    axes.set_title("probability of the network's class")
    axes.set_xlabel("before")
    axes.set_ylabel("after")


def picture(method: Method) -> bytes | None:
    """An SVG, the same bytes for the same code; None for methods that have nothing to draw."""
    entry = method.entries[-1] if method.family == "perturbation" else method.entries[0]
    if entry.__name__ in WITHOUT:
        return None
    torch.manual_seed(0)
    part = None if method.family == "posthoc" else entry(**ARGUMENTS.get(entry.__name__, {}))
    labels = label_map()
    context = side_inputs(labels)
    panels: list[Callable[[Axes], None]] = []
    if part is None:
        panels = [lambda axes: draw_repair(axes, entry)]
    elif isinstance(part, Target) and part.activation == "sigmoid":
        panels = [lambda axes: draw_sequence(axes, part)]
    else:
        loss = whole_loss(part)
        needed = {name: context[name] for name in loss.needs}
        target = loss.target(labels, 3, context=needed)
        panels.append(lambda axes: draw_labels(axes, labels))
        if not torch.equal(target.probs, target.one_hot) or isinstance(part, Target):
            panels += [lambda axes: draw_shares(axes, target, labels), lambda axes: draw_profile(axes, target)]
        panels.append(lambda axes: draw_pull(axes, loss, labels, needed))
    style = {
        "svg.hashsalt": "densecal",
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(style):
        figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 2.1), squeeze=False)
        # Not a layout that fits itself, which takes longer than all else.
        figure.subplots_adjust(left=0.01 if len(panels) > 1 else 0.2, right=0.99, bottom=0.2, top=0.88, wspace=0.35)
        for draw, place in zip(panels, axes[0], strict=True):
            draw(place)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    matplotlib.use("Agg")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for method in read_methods():
        content = picture(method)
        if content is not None:
            (folder / f"{method.slug}.svg").write_bytes(content)
