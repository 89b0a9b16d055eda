"""Losses and metrics in ``transformers.Trainer``: logits at a fraction of the resolution, accumulated gradients, evaluation batch by batch."""

from types import SimpleNamespace

import pytest
import torch
from cases import make_case
from torch import nn

from densecal.integrations.huggingface import TrainerLoss, TrainerMetrics
from densecal.losses import CrossEntropyLoss, SVLSLoss
from densecal.metrics import DiceScore, ExpectedCalibrationError, dice_score, expected_calibration_error

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Model(nn.Module):
    """Logits at half the resolution, as a mapping with more in it than logits."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 0.5, 2.0]).reshape(1, 3, 1, 1))

    def forward(self, pixel_values, labels=None):
        return {"logits": self.scale * nn.functional.avg_pool2d(pixel_values, 2)}


def images(number=6, seed=0, ignored=0.3):
    case = make_case((8, 6), batch=number, seed=seed, dtype=torch.float32, ignored=ignored)
    return [{"pixel_values": image, "labels": label} for image, label in zip(case.logits, case.label_map, strict=True)]


def full_logits(model, data):
    batch = {key: torch.stack([one[key] for one in data]) for key in data[0]}
    logits = model(batch["pixel_values"])["logits"]
    return nn.functional.interpolate(logits, size=(8, 6), mode="bilinear", align_corners=False), batch["labels"]


def trainer_of(model, tmp_path, data, *, loss=None, metrics=None, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        **options,
    )
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        compute_loss_func=TrainerLoss(CrossEntropyLoss() if loss is None else loss),
        compute_metrics=None if metrics is None else TrainerMetrics(metrics),
    )


@pytest.mark.parametrize("batches", [(6, 1), (2, 3)], ids=["one-batch", "accumulated"])
def test_step_is_that_of_the_mean_over_all_pixels(batches, tmp_path):
    """However many batches a step is made of, and however many pixels each of them leaves out."""
    size, accumulated = batches
    data, model, reference = images(), Model(), Model()
    options = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}
    trainer_of(model, tmp_path, data, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, **options).train()
    CrossEntropyLoss()(*full_logits(reference, data)).backward()
    torch.testing.assert_close(model.scale.detach(), (reference.scale - 0.1 * reference.scale.grad).detach())
    assert reference.scale.grad.abs().max() > 0.01


@pytest.mark.parametrize("by_batch", [True, False], ids=["by-batch", "at-once"])
def test_metrics_are_those_of_the_whole_set(by_batch, tmp_path):
    data, model = images(5), Model()
    metrics = {"ece": ExpectedCalibrationError(), "dice": DiceScore(3, average="none")}
    trainer = trainer_of(model, tmp_path, data, metrics=metrics, per_device_eval_batch_size=2, batch_eval_metrics=by_batch)
    logits, labels = full_logits(model, data)
    for _ in range(2):  # each evaluation begins anew
        found = trainer.evaluate()
        assert found["eval_ece"] == pytest.approx(expected_calibration_error(logits.softmax(1), labels).item(), rel=1e-5)
        for c, value in enumerate(dice_score(logits.softmax(1), labels).nanmean(0).tolist()):
            assert found[f"eval_dice_{c}"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    "wrap", [lambda logits: SimpleNamespace(logits=logits), lambda logits: {"loss": 0, "logits": logits}, lambda logits: (logits, 1)]
)
def test_outputs_of_every_form(wrap):
    case = make_case((8, 6), dtype=torch.float32)
    value = TrainerLoss(SVLSLoss())(wrap(case.logits), case.label_map)
    torch.testing.assert_close(value, SVLSLoss()(case.logits, case.label_map))


def test_step_without_labels_is_zero():
    labels = torch.full((1, 4, 4), -100)
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    value = TrainerLoss(SVLSLoss())({"logits": logits}, labels, num_items_in_batch=torch.tensor(0))
    value.backward()
    assert value == 0
    assert not logits.grad.any()


def test_metrics_are_checked():
    with pytest.raises(TypeError, match=r"Expected metrics\['ece'\] to be a torchmetrics.Metric, but got str"):
        TrainerMetrics({"ece": "ece"})
