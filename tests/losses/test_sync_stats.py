"""Statistics over ranks: two processes with a part of the batch each have the loss and the gradient of one process with all of it."""

import pytest
import torch
from cases import make_case
from commands import run_ranks

from densecal.losses import CompoundLoss, DiceCELoss, DiceSemimetricLoss, JaccardMetricLoss, ML1ACELoss
from densecal.registry import TERMS
from densecal.targets import OneHotTarget, SVLSTarget
from densecal.terms import BootstrappedCrossEntropy, CrossEntropy, DiceSemimetric, MarginalL1ACE, NeighbourPenalty

CLASSES = 3
AVERAGES = [{"weight_batch": 1.0}, {"weight_batch": 0.0, "weight_image": 1.0}, {"weight_batch": 0.2, "weight_image": 0.3, "weight_class": 0.5}]
SYNCED = sorted(name for name in TERMS.list() if TERMS[name].can_sync_stats)
NEEDS = {"sc_bce": {"perturbation": torch.tensor([0.1, 0.2, 0.0, 0.15])}}


def losses(sync_stats):
    """Name and loss: every term that can sync, the presets, the averages of the overlaps, sums, class weights, smoothed and soft targets."""
    options = {"sync_stats": sync_stats}
    made = {}
    for name in SYNCED:
        target = OneHotTarget(activation="sigmoid" if name == "sc_bce" else "softmax")
        made[name] = CompoundLoss(
            target, {name: {"weight": 1.0, "term": TERMS[name](**({"num_classes": CLASSES} if name == "crac" else {}))}}, **options
        )
    made |= {"dice_ce": DiceCELoss(class_weights=[0.5, 1.0, 2.0], **options), "ml1_ace_soft": ML1ACELoss(binning="soft", **options)}
    made |= {f"jml-{number}": JaccardMetricLoss(weight_ce=0.0, weight_jml=1.0, **average, **options) for number, average in enumerate(AVERAGES)}
    made["sum"] = CompoundLoss(OneHotTarget(), {"ce": {"weight": 1.0, "term": CrossEntropy(reduction="sum")}}, **options)
    made["all-classes"] = DiceSemimetricLoss(active="all", include_background=False, log=True, **options)
    parts = {"ce": CrossEntropy(), "dml": DiceSemimetric(), "neighbour": NeighbourPenalty(), "ml1_ace": MarginalL1ACE()}
    made["svls"] = CompoundLoss(SVLSTarget(), {name: {"weight": 0.3, "term": term} for name, term in parts.items()}, **options)
    made["torch"] = DiceCELoss(backend="torch", **options)
    return made


def batch(kind):
    """Four images: a class that only the first holds, one image without a valid pixel, others with more and fewer of them."""
    case = make_case((6, 7), batch=4, num_classes=CLASSES, ignored=0.1, seed=3)
    labels = case.label_map.clone()
    labels[1:][labels[1:] == 2] = 1
    labels[2] = -100
    labels[3, :4] = -100
    return case.logits, torch.where((labels != -100).unsqueeze(1), case.soft_labels, -100.0) if kind == "soft" else labels


def results(make, shares, ddp=False):
    """Loss and gradient of a linear network's weights for one share of the batch after the other, by name."""
    found = {}
    for kind in ("map", "soft"):
        logits, labels = batch(kind)
        for name, loss in make.items():
            needs = NEEDS.get(name, {})
            network = torch.nn.Conv2d(CLASSES, CLASSES, 1, dtype=torch.float64)
            with torch.no_grad():
                network.weight.copy_(torch.eye(CLASSES)[..., None, None] + 0.1)
                network.bias.zero_()
            module = torch.nn.parallel.DistributedDataParallel(network) if ddp else network
            one = labels[shares]
            if name == "sc_bce" and kind == "map":  # regions
                one = torch.where((one != -100).unsqueeze(1), torch.nn.functional.one_hot(one.clamp_min(0), CLASSES).movedim(-1, 1), -100)
            value = loss(module(logits[shares]), one, context={key: side[shares] for key, side in needs.items()})
            value.backward()
            found[f"{name}-{kind}"] = [value.detach(), network.weight.grad, network.bias.grad]
    return found


_RANK = """
import torch
from losses.test_sync_stats import losses, results
for name, shares in (("even", [slice(0, 2), slice(2, 4)]), ("uneven", [slice(0, 1), slice(1, 4)]), ("empty", [slice(2, 3), [0, 1, 3]])):
    torch.save(results(losses(True), shares[rank], ddp=True), f"{folder}/{name}{rank}.pt")
torch.save(results(losses(False), slice(2 * rank, 2 * rank + 2), ddp=True), f"{folder}/apart{rank}.pt")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes found with DistributedDataParallel, by how the batch was divided."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(_RANK, folder)
    return {name: [torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in range(2)] for name in ("even", "uneven", "empty", "apart")}


@pytest.mark.parametrize("division", ["even", "uneven", "empty"])
def test_two_processes_have_the_loss_and_gradient_of_one(division, ranks):
    one = results(losses(False), slice(None))
    assert len(one) > 30
    for found in ranks[division]:
        assert found.keys() == one.keys()
        for name, expected in one.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_without_it_they_have_their_own(ranks):
    """Or else the test above could not fail."""
    one = results(losses(False), slice(None))
    for name in ("dice_ce-map", "jml-0-map", "ml1_ace-map", "ce-soft", "svls-map"):
        gradient = ranks["apart"][0][name][1]
        torch.testing.assert_close(gradient, ranks["apart"][1][name][1])  # averaged all the same
        assert not torch.allclose(gradient, one[name][1], rtol=1e-3), name


def test_one_process_is_left_alone():
    alone, synced = (results(losses(sync_stats), slice(None)) for sync_stats in (False, True))
    for name, expected in alone.items():
        assert all(map(torch.equal, synced[name], expected)), name


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (BootstrappedCrossEntropy(), "'one' is a BootstrappedCrossEntropy. Leave `sync_stats` out"),
        (CrossEntropy(reduction="none"), "'one' has reduction='none', which holds each rank's own pixels"),
    ],
    ids=["state-of-its-own", "no-reduction"],
)
def test_term_that_cannot_sync_refuses(term, message):
    with pytest.raises(ValueError, match=message):
        CompoundLoss(OneHotTarget(), {"one": {"weight": 1.0, "term": term}}, sync_stats=True)
