"""A training step with any network and any loss, and what validation logs."""

from functools import partial
from pathlib import Path

import lightning as L
import monai.losses
import pytest
import torch
from monai.networks.nets import DynUNet
from torch import nn
from torch.utils.data import DataLoader

from densecal.inference import SlidingWindow, WholeImage
from densecal.labels import LabelSchema
from densecal.losses import CompoundLoss, CRaCLoss, CrossEntropyLoss, DeepSupervisionLoss, DiceCELoss, NACLLoss, SVLSLoss
from densecal.metrics import SegmentationEvaluation
from densecal.schedules import Linear
from densecal.targets import OneHotTarget
from densecal.tasks import SegmentationTask
from densecal.terms import CrossEntropy, DiceSemimetric

SCHEMA = LabelSchema(["background", "left", "right"])
PATCH = (8, 8, 8)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 3, 3, padding=1)

    def forward(self, image):
        return self.conv(image)


def make_task(loss: nn.Module, model: nn.Module | None = None, **options) -> SegmentationTask:
    torch.manual_seed(0)
    return SegmentationTask(model or Small(), loss, SCHEMA, SlidingWindow(PATCH), **options)


def make_batch(size: int = 2, soft: bool = False) -> dict:
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(0, 3, (size, 1, *PATCH), generator=generator)
    if soft:
        label = torch.rand(size, 3, *PATCH, generator=generator).softmax(dim=1)
    return {
        "image": torch.randn(size, 1, *PATCH, generator=generator),
        "label": label,
        "case_index": torch.arange(size),
        "case_id": [f"c{n}" for n in range(size)],
        "spacing": torch.ones(size, 3),
    }


class Batches(torch.utils.data.Dataset):
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def loader(*batches) -> DataLoader:
    return DataLoader(Batches(batches), batch_size=None, num_workers=0)


def make_trainer(**options) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return L.Trainer(accelerator="cpu", **(quiet | options))


def test_compound_loss_is_the_weighted_sum_of_its_logged_parts():
    loss = DiceCELoss()
    task, batch = make_task(loss), make_batch()
    logits = task.model(batch["image"])
    total, parts = task.losses(logits, batch)
    assert set(parts) == set(loss.weights)
    assert len(parts) == 2
    torch.testing.assert_close(total, loss.weights["ce"] * parts["ce"] + loss.weights["dice"] * parts["dice"])
    torch.testing.assert_close(total, loss(logits, batch["label"]))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (
            monai.losses.DiceCELoss(to_onehot_y=True, softmax=True),
            lambda logits, label: monai.losses.DiceCELoss(to_onehot_y=True, softmax=True)(logits, label),
        ),
        (nn.BCEWithLogitsLoss(), lambda logits, label: nn.functional.binary_cross_entropy_with_logits(logits, label)),
    ],
    ids=["monai", "torch"],
)
def test_any_module_of_logits_and_labels_is_a_loss(loss, expected):
    task, batch = make_task(loss), make_batch(soft=isinstance(loss, nn.BCEWithLogitsLoss))
    logits = task.model(batch["image"])
    total, parts = task.losses(logits, batch)
    assert parts == {}
    torch.testing.assert_close(total, expected(logits, batch["label"]))


class NeedsImage(nn.Module):
    needs = ("image", "spacing")

    def forward(self, logits, label, *, context):
        assert set(context) == {"image", "spacing"}
        return (logits.mean(dim=1, keepdim=True) * context["image"]).sum() + context["spacing"].sum()


def test_loss_gets_exactly_what_it_needs_from_the_batch():
    task, batch = make_task(NeedsImage()), make_batch()
    logits = task.model(batch["image"])
    total, _ = task.losses(logits, batch)
    torch.testing.assert_close(total, (logits.mean(dim=1, keepdim=True) * batch["image"]).sum() + 6)


def test_deep_supervision_applies_the_loss_at_every_resolution():
    torch.manual_seed(0)
    network = DynUNet(3, 1, 3, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 4, 4], deep_supervision=True, deep_supr_num=1)
    loss = NACLLoss()
    task, batch = make_task(loss, network), make_batch()
    outputs = network.train()(batch["image"])
    assert outputs.ndim == 6  # (N, levels, C, *patch)
    total, parts = task.losses(outputs, batch)
    torch.testing.assert_close(total, DeepSupervisionLoss(loss, spatial_dims=3)(outputs, batch["label"]))
    torch.testing.assert_close(task.loss.total(parts), total)
    assert task.eval()(batch["image"]).shape == (2, 3, *PATCH)


class TwoOutputs(Small):
    output_weights = (1.0, 0.4)

    def forward(self, image):
        logits = super().forward(image)
        return [logits, 3 * logits] if self.training else logits


def test_a_network_may_say_the_weights_of_its_outputs():
    loss = CrossEntropyLoss()
    task, batch = make_task(loss, TwoOutputs()), make_batch()
    outputs = task.model(batch["image"])
    total, _ = task.losses(outputs, batch)
    torch.testing.assert_close(total, loss(outputs[0], batch["label"]) + 0.4 * loss(outputs[1], batch["label"]))
    assert task.eval()(batch["image"]).shape == (2, 3, *PATCH)


def test_losses_that_cannot_train_are_refused():
    with pytest.raises(ValueError, match="activation=softmax, but got sigmoid"):
        make_task(SVLSLoss(activation="sigmoid"))
    task, batch = make_task(CrossEntropyLoss(reduction="none")), make_batch()
    with pytest.raises(ValueError, match=r"one number, but got shape .* reduction to mean"):
        task.losses(task.model(batch["image"]), batch)


def test_validation_logs_the_scores_of_all_volumes_together():
    """Not the mean of the batches' scores: the calibration error of the pooled voxels."""
    task = make_task(SVLSLoss(), num_bins=7, foreground_radius=1)
    batches = [make_batch(1), make_batch(2)]
    batches[1]["case_index"] += 1
    trainer = make_trainer()
    (logged,) = trainer.validate(task, loader(*batches), verbose=False)
    evaluation = SegmentationEvaluation(SCHEMA, num_bins=7, foreground_radius=1)
    task.eval()
    with torch.no_grad():
        image, label, index = (torch.cat([batch[name] for batch in batches]) for name in ("image", "label", "case_index"))
        evaluation.update(task(image).softmax(dim=1), label, index)
    for name, value in evaluation.compute().scalars().items():
        assert logged[f"val/{name}"] == pytest.approx(float(value), abs=1e-5), name
    assert {"val/dice", "val/iou", "val/ece", "val/ece_foreground", "val/nll", "val/brier"} <= set(logged)


def poly(optimizer, *, total_iters=5, power=1.0):
    return torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters, power)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (partial(torch.optim.lr_scheduler.PolynomialLR, power=1.0), [0.1 * (1 - step / 6) for step in range(1, 7)]),
        (partial(torch.optim.lr_scheduler.PolynomialLR, power=1.0, total_iters=3), [0.1 * 2 / 3, 0.1 / 3, 0.0, 0.0, 0.0, 0.0]),
        (torch.optim.lr_scheduler.CosineAnnealingLR, [0.05 * (1 + torch.cos(torch.tensor(torch.pi * step / 6)).item()) for step in range(1, 7)]),
        (partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5), [0.1, 0.05, 0.05, 0.025, 0.025, 0.0125]),
        (poly, [0.1 * (1 - step / 6) for step in range(1, 7)]),
    ],
    ids=["poly", "poly-given-length", "cosine", "without-length", "own-function"],
)
def test_schedule_lasts_the_whole_training_unless_told(scheduler, expected):
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    task = make_task(SVLSLoss(), optimizer=partial(torch.optim.SGD, lr=0.1), scheduler=scheduler)
    make_trainer(max_epochs=2, callbacks=[Watch()]).fit(task, loader(*[make_batch()] * 3))
    assert seen == pytest.approx(expected, abs=1e-7)


class WithEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv3d(1, 2, 3, padding=1)
        self.head = nn.Conv3d(2, 3, 1)

    def forward(self, image):
        return self.head(self.encoder(image).relu())


def test_encoder_learns_at_its_share_of_the_rate():
    """One step of plain gradient descent: each weight moves by its rate times its gradient; the loss's own parameters go with the head."""
    task, batch = make_task(Learned(), WithEncoder(), optimizer=partial(torch.optim.SGD, lr=0.5), encoder_lr_ratio=0.1), make_batch()
    optimizer = task.configure_optimizers()
    before = {name: parameter.detach().clone() for name, parameter in task.named_parameters()}
    task.losses(task.model(batch["image"]), batch)[0].backward()
    optimizer.step()
    assert set(before) == {"model.encoder.weight", "model.encoder.bias", "model.head.weight", "model.head.bias", "loss.scale"}
    for name, parameter in task.named_parameters():
        rate = 0.05 if "encoder" in name else 0.5
        torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (None, [0.1] * 6),
        (partial(torch.optim.lr_scheduler.PolynomialLR, power=1.0), [0.1 * (1 - step / 6) for step in range(6)]),
        # up from max_lr / 4 to max_lr in the first half of the five intervals, and down to max_lr / 40
        (
            partial(
                torch.optim.lr_scheduler.OneCycleLR,
                max_lr=0.4,
                pct_start=0.5,
                anneal_strategy="linear",
                div_factor=4,
                final_div_factor=10,
                cycle_momentum=False,
            ),
            [0.1, 0.25, 0.4, 0.4 - 0.39 / 3, 0.4 - 2 * 0.39 / 3, 0.01],
        ),
    ],
    ids=["constant", "poly", "onecycle"],
)
def test_schedule_keeps_the_share_of_the_encoder(scheduler, expected):
    rates = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    task = make_task(SVLSLoss(), WithEncoder(), optimizer=partial(torch.optim.SGD, lr=0.1), scheduler=scheduler, encoder_lr_ratio=0.25)
    make_trainer(max_epochs=2, callbacks=[Watch()]).fit(task, loader(*[make_batch()] * 3))
    assert [rate for rate, _ in rates] == pytest.approx(expected)
    assert [rate for _, rate in rates] == pytest.approx([rate / 4 for rate in expected])


def test_encoder_rate_needs_an_encoder():
    with pytest.raises(ValueError, match=r"`encoder_lr_ratio` 0.1, but Small has none. Leave the ratio at 1"):
        make_task(SVLSLoss(), encoder_lr_ratio=0.1)
    with pytest.raises(ValueError, match="`encoder_lr_ratio` to be greater than 0"):
        make_task(SVLSLoss(), WithEncoder(), encoder_lr_ratio=0.0)
    assert len(make_task(SVLSLoss()).configure_optimizers().param_groups) == 1


class Events(L.Callback):
    """Each step with its epoch, each validation, the end of each epoch; training ends there after ``last``."""

    def __init__(self, last: int | None = None, path: Path | None = None):
        self.last, self.path, self.seen, self.rates = last, path, [], []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append((trainer.current_epoch, trainer.global_step))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer, *_):
        self.seen.append("validated")

    def on_train_epoch_end(self, trainer, *_):
        if trainer.current_epoch == self.last:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def in_steps(max_steps: int, events: Events, resume: Path | None = None, **options) -> SegmentationTask:
    """Three batches an epoch; a rate that falls by equal parts to 0, and a loss that asks for the length of training."""
    linear = partial(torch.optim.lr_scheduler.PolynomialLR, power=1.0)
    task = make_task(
        Learned(), WithEncoder(), optimizer=partial(torch.optim.SGD, lr=0.8), scheduler=linear, encoder_lr_ratio=0.5, max_steps=max_steps
    )
    trainer = make_trainer(max_epochs=-1, callbacks=[events], **options)
    trainer.fit(task, loader(*[make_batch()] * 3), loader(make_batch(1)), ckpt_path=resume, weights_only=True if resume else None)
    return task


def test_training_of_so_many_steps_ends_within_an_epoch():
    """Eight steps are two epochs of three and one of two, which is validated as well; schedules last the eight."""
    events = Events()
    task = in_steps(8, events)
    steps = [(0, 1), (0, 2), (0, 3), "validated", (1, 4), (1, 5), (1, 6), "validated", (2, 7), (2, 8), "validated"]
    assert events.seen == steps
    assert events.rates == pytest.approx([0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    assert task.loss.epochs == [(0, 3), (1, 3), (2, 3)]


def test_training_of_so_many_steps_resumes_to_the_same_numbers(tmp_path):
    whole, before, after, more = Events(), Events(0, tmp_path / "one.ckpt"), Events(2, tmp_path / "three.ckpt"), Events()
    expected = in_steps(8, whole).state_dict()
    in_steps(8, before)
    resumed = in_steps(8, after, tmp_path / "one.ckpt").state_dict()
    assert before.seen + after.seen == whole.seen
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)
    in_steps(10, more, tmp_path / "three.ckpt")  # a finished one goes on with a new epoch
    assert more.seen == [(3, 9), (3, 10), "validated"]


@pytest.mark.parametrize(("options", "steps"), [({"accumulate_grad_batches": 2}, 2), ({"limit_train_batches": 1}, 1)], ids=["accumulated", "limited"])
def test_epochs_of_so_many_steps_are_counted_as_the_trainer_cuts_them(options, steps):
    events = Events()
    task = in_steps(4, events, **options)
    assert task.loss.epochs[0] == (0, 4 // steps)
    assert events.seen[-1] == "validated"
    assert events.seen[-2] == (4 // steps - 1, 4)


def test_number_of_epochs_ends_a_training_before_its_steps():
    events = Events()
    task = make_task(SVLSLoss(), max_steps=8)
    make_trainer(max_epochs=2, callbacks=[events]).fit(task, loader(*[make_batch()] * 3))
    assert events.seen[-1] == (1, 6)
    with pytest.raises(ValueError, match="`max_steps` to be greater than 0"):
        make_task(SVLSLoss(), max_steps=0)


@pytest.mark.parametrize("loss", [SVLSLoss(), NACLLoss(), DiceCELoss()], ids=["svls", "nacl", "dice_ce"])
def test_half_precision_training_stays_near_full_precision(loss):
    def fit(precision):
        task = make_task(loss, optimizer=partial(torch.optim.SGD, lr=0.1))
        trainer = make_trainer(max_epochs=2, precision=precision)
        trainer.fit(task, loader(make_batch()), loader(make_batch(1)))
        return trainer.callback_metrics

    full, half = fit("32-true"), fit("bf16-mixed")
    assert half["train/loss"].item() == pytest.approx(full["train/loss"].item(), rel=0.02)
    assert half["val/nll"].item() == pytest.approx(full["val/nll"].item(), rel=0.02)
    assert half["train/loss"].item() != full["train/loss"].item()  # the precision was used


class Learned(nn.Module):
    """A loss with a parameter of its own and both hooks."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.epochs, self.scores = [], []

    def forward(self, logits, label):
        return nn.functional.cross_entropy(logits, label[:, 0]) * self.scale

    def on_epoch(self, epoch, max_epochs):
        self.epochs.append((epoch, max_epochs))

    def on_validation(self, scores):
        self.scores.append(scores["dice"])


def test_losses_with_state_are_trained_and_told_of_epochs():
    loss = Learned()
    task = make_task(loss, optimizer=partial(torch.optim.SGD, lr=0.1))
    make_trainer(max_epochs=2).fit(task, loader(make_batch()), loader(make_batch(1)))
    assert loss.epochs == [(0, 2), (1, 2)]
    assert len(loss.scores) == 2
    assert loss.scale.item() < 1
    assert "loss.scale" in task.state_dict()


class Weights(L.Callback):
    """The scheduled weights that each batch was trained with."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, task, *_):
        self.seen.append({name: round(float(weight), 6) for name, weight in task.loss.weights.items()})


def scheduled() -> SegmentationTask:
    terms = {
        "ce": {"weight": Linear(1.0, 0.0, by="step"), "term": CrossEntropy()},
        "dml": {"weight": Linear(0.0, 1.0), "term": DiceSemimetric()},
    }
    return make_task(CompoundLoss(OneHotTarget(), terms), optimizer=partial(torch.optim.SGD, lr=0.01))


def test_resumed_run_goes_on_with_the_schedules(tmp_path):
    batches, whole, before, after = [make_batch()] * 2, Weights(), Weights(), Weights()
    make_trainer(max_epochs=3, callbacks=[whole]).fit(scheduled(), loader(*batches))
    assert whole.seen == [{"ce": round(1 - step / 5, 6), "dml": step // 2 / 2} for step in range(6)]

    class Cut(L.Callback):
        def on_train_epoch_end(self, trainer, task):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "two.ckpt")
                trainer.should_stop = True

    make_trainer(max_epochs=3, callbacks=[before, Cut()], enable_checkpointing=True, default_root_dir=tmp_path).fit(scheduled(), loader(*batches))
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]
    assert state["loss.levels.ce.value"].item() == pytest.approx(1 - 3 / 5)
    assert state["loss.levels.dml.value"].item() == 0.5
    task = scheduled()
    make_trainer(max_epochs=3, callbacks=[after]).fit(task, loader(*batches), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert before.seen + after.seen == whole.seen


def test_accumulated_batches_share_a_step():
    weights = Weights()
    make_trainer(max_epochs=2, callbacks=[weights], accumulate_grad_batches=2).fit(scheduled(), loader(*[make_batch()] * 4))
    assert [seen["ce"] for seen in weights.seen] == pytest.approx([1, 1, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 0, 0], abs=1e-5)


def test_schedule_by_epoch_needs_a_number_of_epochs():
    with pytest.raises(ValueError, match=r"Set `trainer\.max_epochs`"):
        make_trainer(max_epochs=-1, max_steps=3).fit(scheduled(), loader(make_batch()))


def crac() -> SegmentationTask:
    return make_task(CRaCLoss(num_classes=3, margin=2.0), optimizer=partial(torch.optim.SGD, lr=0.1))


def test_validation_logits_set_the_multipliers():
    """With one window per volume the windows' logits are the network's."""
    task, train, val = crac(), make_batch(), [make_batch(1), make_batch(2)]
    val[1]["case_index"] += 1
    make_trainer(max_epochs=1, num_sanity_val_steps=1).fit(task, loader(train), loader(*val))
    expected = CRaCLoss(num_classes=3, margin=2.0)
    with torch.no_grad():
        for batch in val:
            expected.on_validation_batch(task(batch["image"]), batch["label"])
    expected.on_validation({})
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(task.loss.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert task.loss.parts["crac"].updates == 1
    assert "val/dice" in task.trainer.callback_metrics


def test_images_are_validated_in_one_piece_over_flips_and_scales():
    torch.manual_seed(0)
    window = WholeImage(2, multiple=8, flip_axes=[1], scales=[0.5, 1.0])
    task = SegmentationTask(nn.Conv2d(1, 3, 3, padding=1), CRaCLoss(num_classes=3, margin=2.0), SCHEMA, window)
    image, label = torch.randn(2, 1, 13, 9), torch.randint(0, 3, (2, 1, 13, 9))
    batch = {"image": image, "label": label, "case_index": torch.arange(2), "case_id": ["a", "b"], "spacing": torch.ones(2, 2)}
    trainer = make_trainer(max_epochs=1)
    trainer.fit(task, loader(batch), loader(batch))
    evaluation, loss = SegmentationEvaluation(SCHEMA), CRaCLoss(num_classes=3, margin=2.0)
    with torch.no_grad():
        probs, logits = window.with_logits(task.model, image)
    evaluation.update(probs, label, batch["case_index"])
    assert trainer.callback_metrics["val/ece"].item() == pytest.approx(evaluation.compute().scalars()["ece"], abs=1e-6)
    loss.on_validation_batch(logits, label)
    loss.on_validation({})
    for name, value in loss.state_dict().items():
        torch.testing.assert_close(task.loss.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_resumed_run_goes_on_with_the_multipliers(tmp_path):
    def fit(task, epochs, **options):
        trainer = make_trainer(max_epochs=epochs)
        trainer.fit(task, loader(make_batch()), loader(make_batch(1)), **options)
        return trainer

    whole, first, second = crac(), crac(), crac()
    fit(whole, 4)
    fit(first, 2).save_checkpoint(tmp_path / "two.ckpt")
    fit(second, 4, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert (whole.loss.parts["crac"].multiplier[0] > 1e-3).all()  # of the boundary: the labels are noise
    assert whole.loss.parts["crac"].updates == 4
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("regions", [1, 2])
def test_a_schema_of_regions_reads_logits_by_a_sigmoid(regions):
    schema = LabelSchema(["whole", "core"][:regions], background=None, activation="sigmoid")
    torch.manual_seed(0)
    network = nn.Conv3d(1, regions, 3, padding=1)
    task = SegmentationTask(network, SVLSLoss(activation="sigmoid"), schema, SlidingWindow(PATCH))
    batch = make_batch(1)
    batch["label"] = torch.cat([batch["label"] > 0, batch["label"] > 1], dim=1)[:, :regions].int()
    total, _ = task.losses(task.model(batch["image"]), batch)
    torch.testing.assert_close(total, SVLSLoss(activation="sigmoid")(network(batch["image"]), batch["label"]))
    (logged,) = make_trainer().validate(task, loader(batch), verbose=False)
    evaluation = SegmentationEvaluation(schema)
    with torch.no_grad():
        evaluation.update(network(batch["image"]).sigmoid(), batch["label"], batch["case_index"])
    expected = evaluation.compute().scalars()
    assert {key: logged[f"val/{key}"] for key in expected} == pytest.approx(expected, abs=1e-5)
    assert f"dice/{schema.names[-1]}" in expected


def test_a_loss_for_classes_is_refused_where_there_are_regions():
    schema = LabelSchema(["whole"], background=None, activation="sigmoid")
    with pytest.raises(ValueError, match="activation=sigmoid, but got softmax in its OneHotTarget"):
        SegmentationTask(nn.Conv3d(1, 1, 1), DiceCELoss(), schema, SlidingWindow(PATCH))
