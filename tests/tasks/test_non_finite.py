"""Batches whose loss is not finite: the run stops, or goes on as if they had not been there."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from densecal.inference import WholeImage
from densecal.labels import LabelSchema
from densecal.losses import CompoundLoss
from densecal.targets import OneHotTarget
from densecal.tasks import NonFiniteLoss, SegmentationTask
from densecal.terms import CrossEntropy, DiceSemimetric, OnlineLabelSmoothing, Term

SCHEMA = LabelSchema(["background", "left", "right"])
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)


class Normed(nn.Module):
    """Keeps running statistics, which one NaN would spoil for ever."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)

    def forward(self, image):
        return self.two(self.norm(self.one(image)))


class Undefined(Term):
    def forward(self, logits, target, *, context=None):
        return logits.sum() * float("nan")


def make_task(**options) -> SegmentationTask:
    torch.manual_seed(0)
    terms = {"ce": CrossEntropy(), "dml": DiceSemimetric(), "ols": OnlineLabelSmoothing(num_classes=3)}  # the last keeps what it has seen
    loss = CompoundLoss(OneHotTarget(), {name: {"weight": 1.0, "term": term} for name, term in terms.items()})
    return SegmentationTask(options.pop("model", None) or Normed(), loss, SCHEMA, WholeImage(2), **({"optimizer": SGD} | options))


def make_batch(number: int, fault: float | None = None) -> dict:
    generator = torch.Generator().manual_seed(number)
    batch = {
        "image": torch.randn(2, 1, 6, 7, generator=generator),
        "label": torch.randint(0, 3, (2, 1, 6, 7), generator=generator),
        "case_index": torch.arange(2),
        "case_id": [f"a{number}", f"b{number}"],
    }
    if fault is not None:
        batch["image"][1, 0, 2, 3] = fault
    return batch


def fit(task, batches, **options) -> SegmentationTask:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, **(quiet | options))
    trainer.fit(task, DataLoader(batches, batch_size=None))
    return task


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fault", [float("nan"), float("inf")], ids=str)
def test_skipped_batches_leave_no_trace(fault, accumulate, capsys):
    """Weights, momentum, running statistics and the loss's own table are those of a training without them."""
    good = [make_batch(number) for number in range(4)]
    bad = [make_batch(number, fault) for number in (7, 8)]
    options = {"accumulate_grad_batches": accumulate}
    with_them = fit(make_task(non_finite="skip"), [*good[:2], *bad, *good[2:]], **options)
    without = fit(make_task(non_finite="skip"), good, **options)
    assert with_them.global_step == without.global_step + 2 // accumulate
    for (name, value), expected in zip(with_them.state_dict().items(), without.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    for one, other in zip(with_them.optimizers().state.values(), without.optimizers().state.values(), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(lines) == 2
    # Batch normalisation has carried the fault of one case to the others.
    assert (
        lines[0] == "skipped a batch of epoch 1: The network's output is not finite for cases a7, b7. The image holds such values after augmentation."
    )
    assert with_them.trainer.callback_metrics["train/loss"].isfinite()


def test_skipping_changes_nothing_where_all_is_finite():
    good = [make_batch(number) for number in range(3)]
    for one, other in zip(fit(make_task(non_finite="skip"), good).parameters(), fit(make_task(), good).parameters(), strict=True):
        assert torch.equal(one, other)


def test_stopping_names_the_case_and_the_parts_of_the_loss():
    with pytest.raises(NonFiniteLoss) as stopped:
        fit(make_task(model=nn.Conv2d(1, 3, 1)), [make_batch(0), make_batch(7, float("nan"))])
    assert str(stopped.value) == (
        "The network's output is not finite for the case b7. The image holds such values after augmentation. non_finite=skip leaves such batches out."
    )
    task = make_task()
    task.loss.parts["dml"] = Undefined()
    with pytest.raises(
        NonFiniteLoss, match=r"^The loss \(dml\) is not finite for cases a0, b0\. A lower optimizer\.lr or .* may help\. non_finite=skip"
    ):
        fit(task, [make_batch(0)])


def test_skipping_has_a_bound_that_a_good_batch_resets():
    bad = [make_batch(number, float("nan")) for number in range(3)]
    fit(make_task(non_finite="skip", max_skipped=3), [*bad, make_batch(9), *bad])
    with pytest.raises(NonFiniteLoss, match=r"cases a8, b8\..* So were the 3 batches before it, which were skipped\.$"):
        fit(make_task(non_finite="skip", max_skipped=3), [*bad, make_batch(8, float("nan"))])
    checkpoint: dict = {}
    task = fit(make_task(non_finite="skip", max_skipped=3), bad)
    task.on_save_checkpoint(checkpoint)
    resumed = make_task(non_finite="skip", max_skipped=3)
    resumed.on_load_checkpoint(checkpoint)
    with pytest.raises(NonFiniteLoss, match="So were the 3 batches before it"):
        fit(resumed, bad[:1])


@pytest.mark.parametrize("non_finite", ["stop", "skip"])
def test_spoilt_weights_stop_in_any_case(non_finite):
    task = make_task(non_finite=non_finite)
    with torch.no_grad():
        task.model.two.weight[0] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"The network's weights are not finite either: an earlier gradient was not\. .*may help\.$"):
        fit(task, [make_batch(0)])


def test_gradient_that_a_scaler_finds_infinite_is_its_own_affair():
    """Scaled so far that every gradient overflows, until the scale has come down; no step is taken meanwhile, and nothing is said."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-40)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    task = make_task(model=nn.Conv2d(1, 3, 1), optimizer=partial(torch.optim.SGD, lr=0.1))
    before = [parameter.clone() for parameter in task.model.parameters()]
    fit(task, [make_batch(0)], plugins=plugins)
    assert all(map(torch.equal, task.model.parameters(), before))
    assert scaler.get_scale() < 2.0**127
    task = fit(
        make_task(model=nn.Conv2d(1, 3, 1), non_finite="skip"), [make_batch(n, float("nan") if n == 1 else None) for n in range(9)], plugins=plugins
    )
    assert all(parameter.isfinite().all() for parameter in task.model.parameters())
    assert not torch.equal(next(task.model.parameters()), before[0])


class Overflowing(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.conv, self.factor = nn.Conv2d(1, 3, 1), factor

    def forward(self, image):
        return (self.conv(image) * self.factor).half()


def test_logits_beyond_16_bits_say_so():
    with pytest.raises(NonFiniteLoss, match=r"output is not finite for cases a0, b0\. 16-bit floats end at 65504: trainer\.precision=bf16-mixed"):
        fit(make_task(model=Overflowing(1e7)), [make_batch(0)])


def test_options_are_checked():
    with pytest.raises(ValueError, match="Expected `non_finite` to be one of"):
        make_task(non_finite="ignore")
    with pytest.raises(ValueError, match="Expected `max_skipped` to be greater than 0"):
        make_task(max_skipped=0)


_TRAIN = """
import sys
rank, folder, tests = int(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.path[:0] = [tests, f"{tests}/tasks"]
import torch
torch.set_num_threads(1)
from test_non_finite import *
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
nan = float("nan")
good = [make_batch(10 * rank + n) for n in range(3)]
bad = make_batch(7, nan) if rank == 1 else make_batch(5)  # on one rank alone
ddp = {"strategy": "ddp", "devices": 2, "plugins": [TorchElasticEnvironment()], "use_distributed_sampler": False}
tasks = [fit(make_task(non_finite="skip"), batches, **ddp) for batches in ([good[0], bad, *good[1:]], good)]
torch.save([task.state_dict() for task in tasks], f"{folder}/{rank}.pt")
try:
    fit(make_task(), [good[0], bad], **ddp)
except NonFiniteLoss as error:
    print("stopped", error, flush=True)
"""


def test_two_processes_decide_alike(tmp_path):
    (tmp_path / "rank.py").write_text(_TRAIN)
    tests = Path(__file__).parents[1]
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
    }
    environment = (
        os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent), "CUDA_VISIBLE_DEVICES": "", "TORCHELASTIC_RUN_ID": "x"} | place
    )
    started = [
        subprocess.Popen(
            [sys.executable, tmp_path / "rank.py", str(rank), tmp_path, tests],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = []
    for process in started:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        said.append(output)
    assert said[0].count("skipped a batch of epoch 1: The network's output is not finite for cases a7, b7.") == 1
    assert "skipped" not in said[1]
    assert all("stopped The network's output is not finite for cases a7, b7. The image holds" in output for output in said)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for with_it, without in results:
        for name, value in with_it.items():
            torch.testing.assert_close(value, without[name], msg=name)
            if name.startswith("model."):
                assert "running" in name or torch.equal(value, results[0][0][name])
