"""Losses of this package in a MONAI trainer: MetaTensors, deep supervision, and the hooks of losses that learn as training goes on."""

import pytest
import torch
from cases import make_case
from torch import nn

from densecal.integrations.monai import LossHandler, MetricHandler
from densecal.losses import ASLPLoss, CompoundLoss, CRaCLoss, SVLSLoss
from densecal.losses import DeepSupervisionLoss as OurDeepSupervisionLoss
from densecal.metrics import NegativeLogLikelihood
from densecal.targets import OneHotTarget
from densecal.terms import Term

pytest.importorskip("monai")
pytest.importorskip("ignite")

from ignite.engine import Engine
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from monai.losses import DeepSupervisionLoss
from monai.transforms import Activationsd, AsDiscreted, Compose


class Network(nn.Module):
    """Logits are the image times a weight; while training at half the resolution as well, where that is asked for."""

    def __init__(self, deep=False):
        super().__init__()
        self.weight, self.deep = nn.Parameter(torch.ones(())), deep

    def forward(self, image):
        logits = self.weight * image
        return [logits, logits[..., ::2, ::2]] if self.deep and self.training else logits


class Probe(Term):
    """Keeps what it is told, in order."""

    wants_validation_logits = True

    def __init__(self):
        super().__init__()
        self.told = []

    def forward(self, logits, target, *, context=None):
        self.told.append("forward")
        return logits.mean()

    def on_epoch(self, epoch, max_epochs):
        self.told.append(("epoch", epoch, max_epochs))

    def on_step(self, step, max_steps):
        self.told.append(("step", step, max_steps))

    def on_epoch_end(self):
        self.told.append("end")

    def on_validation_batch(self, logits, target, *, context=None):
        self.told.append(("validation batch", logits))

    def on_validation(self, stats):
        self.told.append(("validation", dict(stats)))


def loader(number=4, spatial=(6, 8), batch_size=2):
    case = make_case(spatial, batch=number, dtype=torch.float32, ignored=0.0)
    data = [
        {"image": MetaTensor(image), "label": MetaTensor(label.unsqueeze(0).float())}
        for image, label in zip(case.logits, case.label_map, strict=True)
    ]
    return DataLoader(Dataset(data), batch_size=batch_size)


def trainer_of(loss, network, *, epochs=1, handlers=(), data=None):
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=loader() if data is None else data,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=loss,
        train_handlers=list(handlers),
    )


@pytest.mark.parametrize("deep", [None, DeepSupervisionLoss, OurDeepSupervisionLoss], ids=["plain", "monai-deep-supervision", "deep-supervision"])
def test_loss_in_a_supervised_trainer(deep):
    """MetaTensors with MONAI's floating labels, and deep supervision around: the step is that of a bare loop over plain tensors."""
    network, reference = Network(deep is not None), nn.Parameter(torch.ones(()))
    (batch,) = data = loader(batch_size=4)
    trainer_of(SVLSLoss() if deep is None else deep(SVLSLoss(), weights=[1.0, 0.5]), network, data=data).run()
    image, label = batch["image"].as_tensor(), batch["label"].as_tensor()
    expected = SVLSLoss()(reference * image, label.long())
    if deep:
        coarse = label[..., 1::2, 1::2]  # the label at the centre of each two by two, or just behind it
        expected = expected + 0.5 * SVLSLoss()(reference * image[..., ::2, ::2], coarse.long())
    expected.backward()
    torch.testing.assert_close(network.weight.detach(), 1.0 - 0.1 * reference.grad)
    assert reference.grad.abs() > 1e-3


def test_loss_handler_tells_everything_in_the_order_of_the_hooks():
    probe = Probe()
    loss = CompoundLoss(OneHotTarget(), {"probe": {"weight": 1.0, "term": probe}})
    network, data = Network(), loader()
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=data,
        network=network,
        key_val_metric={"nll": MetricHandler(NegativeLogLikelihood(), from_logits=True, before_postprocessing=True)},
        postprocessing=Compose([Activationsd(keys="pred", softmax=True), AsDiscreted(keys="pred", argmax=True)]),
    )
    handlers = [ValidationHandler(interval=1, validator=evaluator, epoch_level=True), LossHandler(loss, validator=evaluator)]
    trainer_of(loss, network, epochs=2, handlers=handlers, data=data).run()
    names = [told if isinstance(told, str) else told[0] for told in probe.told]
    epoch = ["epoch", "step", "forward", "step", "forward", "validation batch", "validation batch", "validation", "end"]
    assert names == 2 * epoch
    assert [told[1:] for told in probe.told if told[0] == "epoch"] == [(0, 2), (1, 2)]
    assert [told[1:] for told in probe.told if told[0] == "step"] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [list(told[1]) for told in probe.told if told[0] == "validation"] == [["nll"], ["nll"]]
    logits = next(told[1] for told in probe.told if told[0] == "validation batch")
    assert logits.shape == (2, 3, 6, 8)  # not yet decollated, nor a class
    assert not torch.equal(logits, logits.round())


def test_constraints_learn_in_a_monai_workflow():
    """CRaC's multipliers move with the validation logits; without the handler they would stay what they were."""
    loss, network, data = CRaCLoss(num_classes=3), Network(), loader()
    evaluator = SupervisedEvaluator(device=torch.device("cpu"), val_data_loader=data, network=network)
    before = loss.parts["crac"].multiplier.clone()
    handlers = [ValidationHandler(interval=1, validator=evaluator, epoch_level=True), LossHandler(loss, validator=evaluator)]
    trainer_of(loss, network, handlers=handlers, data=data).run()
    assert loss.parts["crac"].updates == 1
    assert not torch.equal(loss.parts["crac"].multiplier, before)


def test_loss_handler_has_nothing_to_tell_another_librarys_loss():
    network = Network()
    loss = nn.CrossEntropyLoss()
    trainer_of(lambda pred, label: loss(pred, label[:, 0].long()), network, handlers=[LossHandler(loss)]).run()
    assert network.weight != 1


def test_loss_handler_errors():
    with pytest.raises(ValueError, match=r"Expected a loss of predictions and labels alone, .* but ASLPLoss needs case_id"):
        LossHandler(DeepSupervisionLoss(ASLPLoss(case_ids=["a"])))
    with pytest.raises(ValueError, match="Expected a `validator`, from which CRaCLoss learns"):
        LossHandler(CRaCLoss(num_classes=3))
    with pytest.raises(ValueError, match=r"Expected a MONAI workflow, .* but got Engine"):
        LossHandler(CRaCLoss(num_classes=3), validator=Engine(lambda engine, batch: None)).attach(Engine(lambda engine, batch: None))
