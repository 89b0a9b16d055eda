"""Metrics of this package in MONAI workflows and on Ignite engines."""

import csv

import pytest
import torch
from cases import make_case
from torch import nn

from densecal.integrations.monai import MetricHandler
from densecal.labels import LabelSchema
from densecal.metrics import (
    DiceScore,
    ExpectedCalibrationError,
    FineGrainedOverlap,
    NegativeLogLikelihood,
    SegmentationEvaluation,
    dice_score,
    expected_calibration_error,
    fine_grained_overlap,
    negative_log_likelihood,
    overlap_counts,
)
from densecal.metrics.inputs import read_pixels

pytest.importorskip("monai")
pytest.importorskip("ignite")

from ignite.engine import Engine
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import MetricsSaver, from_engine
from monai.transforms import Activationsd, AsDiscreted, Compose

SPATIAL = (6, 7)


class Network(nn.Module):
    """Logits are the image itself."""

    def forward(self, image):
        return 1.0 * image


def samples(number=5, spatial=SPATIAL):
    """Images that are logits, and label maps with one channel, as MONAI has them."""
    case = make_case(spatial, batch=number, dtype=torch.float32)
    return [
        {"image": MetaTensor(logits, meta={"filename_or_obj": f"{i}.nii.gz"}), "label": label.unsqueeze(0)}
        for i, (logits, label) in enumerate(zip(case.logits, case.label_map, strict=True))
    ]


def evaluate(data, *, batch_size=2, **options):
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=DataLoader(Dataset(data), batch_size=batch_size), network=Network(), **options
    )
    evaluator.run()
    return evaluator.state


def together(data):
    return torch.stack([sample["image"].as_tensor() for sample in data]).softmax(1), torch.stack([sample["label"] for sample in data])


@pytest.mark.parametrize("decollate", [True, False], ids=["lists", "batches"])
@pytest.mark.parametrize("where", ["network", "handler"])
def test_handler_in_a_workflow_gives_the_value_of_all_images(decollate, where):
    data = samples()
    softmax = where == "network"
    if softmax and not decollate:
        options = {"prepare_batch": lambda batch, *_, **__: (batch["image"].softmax(1).as_tensor(), batch["label"])}
    else:
        options = {"postprocessing": Activationsd(keys="pred", softmax=True)} if softmax else {}
    state = evaluate(
        data,
        decollate=decollate,
        key_val_metric={"ece": MetricHandler(ExpectedCalibrationError(num_bins=10), from_logits=not softmax)},
        additional_metrics={
            "dice": MetricHandler(DiceScore(3, average="none"), output_transform=from_engine(["pred", "label"]), from_logits=not softmax)
        },
        val_handlers=[MetricHandler(NegativeLogLikelihood(), "nll", from_logits=not softmax)],
        **options,
    )
    probs, label = together(data)
    assert state.metrics["ece"] == pytest.approx(expected_calibration_error(probs, label, num_bins=10).item(), rel=1e-6)
    assert state.best_metric == state.metrics["ece"]
    torch.testing.assert_close(state.metrics["dice"], dice_score(probs, label).nanmean(0))
    assert state.metrics["nll"] == pytest.approx(negative_log_likelihood(probs, label).item(), rel=1e-6)


def test_handler_before_the_postprocessing_sees_confidences():
    """MONAI's own recipes leave 0 and 1 to those who look afterwards, whose calibration error is the error rate."""
    data = samples()
    state = evaluate(
        data,
        key_val_metric={"ece": MetricHandler(ExpectedCalibrationError(), from_logits=True, before_postprocessing=True)},
        additional_metrics={"late": MetricHandler(ExpectedCalibrationError())},
        postprocessing=Compose(
            [Activationsd(keys="pred", softmax=True), AsDiscreted(keys=["pred", "label"], argmax=[True, False], to_onehot=[3, None])]
        ),
    )
    probs, label = together(data)
    valid = label[:, 0] != -100
    assert state.metrics["ece"] == pytest.approx(expected_calibration_error(probs, label).item(), rel=1e-6)
    assert state.metrics["late"] == pytest.approx(1 - (probs.argmax(1) == label[:, 0])[valid].double().mean().item(), rel=1e-6)


def test_handler_images_of_several_sizes():
    data = [samples(1, (6, 7))[0], samples(2, (4, 9))[1]]
    state = evaluate(data, batch_size=1, key_val_metric={"nll": MetricHandler(NegativeLogLikelihood(), from_logits=True)})
    values, counts = zip(*((negative_log_likelihood(*together([one])).item(), int((one["label"] != -100).sum())) for one in data), strict=True)
    expected = sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
    assert state.metrics["nll"] == pytest.approx(expected, rel=1e-6)


def test_handler_keeps_the_value_of_each_image_for_the_saver(tmp_path):
    data = samples()
    state = evaluate(
        data,
        key_val_metric={"dice": MetricHandler(DiceScore(3, average="none"), from_logits=True, save_details=True)},
        additional_metrics={"ece": MetricHandler(ExpectedCalibrationError(), from_logits=True, save_details=True)},
        val_handlers=[MetricsSaver(str(tmp_path), metric_details="*", batch_transform=lambda batch: [one["image"].meta for one in batch])],
    )
    probs, label = together(data)
    torch.testing.assert_close(state.metric_details["dice"], dice_score(probs, label), equal_nan=True)
    errors = torch.stack([expected_calibration_error(p[None], y[None]) for p, y in zip(probs, label, strict=True)])
    torch.testing.assert_close(state.metric_details["ece"], errors.unsqueeze(1))
    # All images together are not the mean of the images.
    assert state.metrics["ece"] == pytest.approx(expected_calibration_error(probs, label).item(), rel=1e-6)
    with open(tmp_path / "ece_raw.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["filename"] for row in rows] == [f"{i}.nii.gz" for i in range(5)]
    assert [float(row["class0"]) for row in rows] == pytest.approx(errors.tolist(), abs=1e-4)


def test_handler_starts_anew_each_epoch():
    engine = Engine(lambda engine, batch: {"pred": batch[0], "label": batch[1]})
    MetricHandler(ExpectedCalibrationError(), save_details=True).attach(engine, "ece")
    data = [together(samples())]
    first = engine.run(data).metrics["ece"]
    assert len(engine.state.metric_details["ece"]) == 5
    assert engine.run(data, max_epochs=3).metrics["ece"] == first
    assert len(engine.state.metric_details["ece"]) == 5


def test_handler_details_of_all_processes_rank_by_rank(monkeypatch):
    engine = Engine(lambda engine, batch: {"pred": batch[0], "label": batch[1]})
    handler = MetricHandler(DiceScore(3, average="none", sync_on_compute=False), "dice", save_details=True)
    handler.attach(engine)
    elsewhere, nowhere = torch.rand(2, 3, dtype=torch.float64), torch.zeros(0, 1, dtype=torch.float64)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr("densecal.integrations.monai.gather_all_tensors", lambda details: [details, nowhere, elsewhere])
    probs, label = together(samples())
    engine.run([(probs, label)])
    torch.testing.assert_close(engine.state.metric_details["dice"], torch.cat([dice_score(probs, label), elsewhere]), equal_nan=True)


def test_handler_named_values_and_regions():
    probs, label = together(samples())
    engine = Engine(lambda engine, batch: batch)
    MetricHandler(FineGrainedOverlap(3), "overlap", output_transform=lambda output: output).attach(engine)
    state = engine.run([(probs, label)])
    pixels = read_pixels(probs, label, ignore_index=-100)
    assert state.metrics["overlap_iou_image"] == fine_grained_overlap(*overlap_counts(pixels))["iou_image"].item()
    logits, regions = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3, 5, dtype=torch.long)
    engine = Engine(lambda engine, batch: {"pred": batch[0], "label": batch[1]})
    MetricHandler(DiceScore(3, activation="sigmoid"), "dice", from_logits=True).attach(engine)
    expected = dice_score(logits.sigmoid(), regions, activation="sigmoid").mean().item()
    assert engine.run([(logits, regions)]).metrics["dice"] == pytest.approx(expected)


def test_handler_whole_evaluation_with_the_number_of_each_case():
    data = [sample | {"case_index": torch.tensor(i)} for i, sample in enumerate(samples())]
    evaluation = SegmentationEvaluation(LabelSchema(("background", "anterior", "posterior")))
    engine = Engine(lambda engine, batch: (batch["image"].as_tensor(), batch["label"], batch["case_index"]))
    MetricHandler(evaluation, "test", output_transform=lambda output: output, from_logits=True).attach(engine)
    state = engine.run(DataLoader(Dataset(data), batch_size=2))
    probs, label = together(data)
    assert state.metrics["test_ece"] == pytest.approx(expected_calibration_error(probs, label).item(), rel=1e-6)
    assert state.metrics["test_dice/anterior"] == pytest.approx(dice_score(probs, label).nanmean(0)[1].item(), rel=1e-6)


def test_handler_errors():
    with pytest.raises(ValueError, match=r"Expected `metric` to take probabilities, .* softmax would be applied twice"):
        MetricHandler(ExpectedCalibrationError(from_logits=True), from_logits=True)
    with pytest.raises(TypeError, match=r"Expected `metric` to be a torchmetrics.Metric, .* but got str"):
        MetricHandler("ece")
    engine = Engine(lambda engine, batch: {"pred": batch[0], "label": batch[1]})
    with pytest.raises(ValueError, match="Expected a name for the metric's value"):
        MetricHandler(ExpectedCalibrationError()).attach(engine)
    with pytest.raises(ValueError, match=r"Expected a MONAI workflow, .* but got Engine"):
        MetricHandler(ExpectedCalibrationError(), "ece", before_postprocessing=True).attach(engine)
    MetricHandler(FineGrainedOverlap(3), "overlap", save_details=True).attach(engine)
    with pytest.raises(TypeError, match="Expected one value or one per class for `save_details`, but FineGrainedOverlap has several named ones"):
        engine.run([together(samples())])
