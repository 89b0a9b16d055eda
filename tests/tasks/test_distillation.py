"""A student and its teachers: what the loss is handed, and what is left alone."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from pictures import make_scenes
from teachers import CARD, IMAGES, REGIONS, write_pointwise, write_teacher
from torch import Tensor, nn
from torch.utils.data import DataLoader
from volumes import blob, save

from densecal.data import DataCard, SegmentationData, load_card
from densecal.data.card import Augmentation
from densecal.data.soft_labels import channels
from densecal.inference import Predictor, WholeImage, cases_of_split, write_prediction
from densecal.losses import CompoundLoss, CrossEntropyLoss, DeepSupervisionLoss, DistillationLoss
from densecal.ops.activation import probabilities
from densecal.targets import TeacherTarget
from densecal.tasks import CachedTeachers, DistillationTask, OnlineTeachers
from densecal.terms import CrossEntropy, NeighbourConstraint

CARDS = {"3d": CARD, "2d": IMAGES}
each_kind = pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())


def make_batch(card: DataCard, size: int = 2, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 3, (size, 1, *card.patch_size), generator=generator)
    label[0, 0, 0] = -100
    return {
        "image": torch.randn(size, card.image_channels, *card.patch_size, generator=generator),
        "label": label,
        "case_index": torch.arange(size),
        "case_id": [f"c{n}" for n in range(size)],
    }


class Student(nn.Sequential):
    def __init__(self, card: DataCard):
        super().__init__({2: nn.Conv2d, 3: nn.Conv3d}[card.spatial_dims](card.image_channels, 3, 3, padding=1))


class DeepStudent(Student):
    """A second output of half the resolution while it is trained."""

    def forward(self, image: Tensor) -> Any:
        logits = super().forward(image)
        return [logits, logits[..., ::2, ::2] if logits.ndim == 4 else logits[..., ::2, ::2, ::2]] if self.training else logits


def make_task(card: DataCard, teachers: Any, loss: nn.Module | None = None, student: type[nn.Module] = Student) -> DistillationTask:
    torch.manual_seed(5)
    window = WholeImage(card.spatial_dims, multiple=2)
    return DistillationTask(student(card), loss or DistillationLoss(), card.schema, window, teachers, optimizer=partial(torch.optim.SGD, lr=0.1))


def make_trainer(**options: Any) -> L.Trainer:
    quiet = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(accelerator="cpu", **(quiet | options))


def loader(*batches: Any) -> DataLoader:
    return DataLoader(batches, batch_size=None)


@pytest.fixture
def two(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Checkpoints of two architectures for the test's card."""
    card = request.getfixturevalue("card")
    return [
        str(write_teacher(tmp_path / "a.ckpt", card)),
        str(write_teacher(tmp_path / "b.ckpt", card, model="segresnet", seed=1, init_filters=8, blocks_down=[1, 1], blocks_up=[1])),
    ]


@each_kind
@pytest.mark.parametrize("student", [Student, DeepStudent], ids=["plain", "deep-supervision"])
def test_loss_is_handed_what_each_teacher_says_of_the_patch(card, student, two):
    task, batch = make_task(card, OnlineTeachers(two, card=card), student=student), make_batch(card)
    outputs = task.model(batch["image"])
    total, parts = task.losses(outputs, batch)
    with torch.no_grad():
        said = torch.stack([Predictor.from_run(path).model(batch["image"]) for path in two])
    assert said.shape == (2, 2, 3, *card.patch_size)
    assert (said[0] - said[1]).abs().max() > 0.1
    loss = DeepSupervisionLoss(DistillationLoss(), spatial_dims=card.spatial_dims)
    torch.testing.assert_close(total, loss(outputs, batch["label"], context={"teacher_logits": said}))
    assert set(parts) == {"ce", "dml"}


@each_kind
def test_teachers_are_frozen_and_no_part_of_the_student(card, two):
    teachers = OnlineTeachers(two, card=card)
    task = make_task(card, teachers)
    own = make_task(card, teachers).model
    assert {id(p) for p in task.parameters()} == {id(p) for p in task.model.parameters()}
    assert set(task.state_dict()) == {f"model.{name}" for name in own.state_dict()}
    before = [{name: value.clone() for name, value in one.model.state_dict().items()} for one in teachers.predictors]
    student = {name: value.clone() for name, value in task.model.state_dict().items()}
    make_trainer().fit(task, loader(make_batch(card)))
    for one, weights in zip(teachers.predictors, before, strict=True):
        assert not any(module.training for module in one.model.modules())
        assert not any(p.requires_grad or p.grad is not None for p in one.model.parameters())
        assert all(torch.equal(value, weights[name]) for name, value in one.model.state_dict().items())
    assert any(not torch.equal(value, student[name]) for name, value in task.model.state_dict().items())


def test_teachers_draw_nothing(tmp_path):
    """Dropout of a teacher would make its words depend on the student's draws."""
    teachers = OnlineTeachers([str(write_teacher(tmp_path / "t.ckpt", channels=[4, 8], dropout=0.5))], card=CARD)
    task, batch = make_task(CARD, teachers), make_batch(CARD)
    task.train()
    state = torch.get_rng_state()
    first = task._context(batch)["teacher_logits"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, task._context(batch)["teacher_logits"])


@each_kind
def test_overlapping_regions_are_taught_channel_by_channel(card, tmp_path):
    """A channel per region, each with an activation of its own; a pixel may be in several."""
    card = replace(card, regions=REGIONS)
    two = [str(write_teacher(tmp_path / f"{seed}.ckpt", card, seed=seed)) for seed in (1, 2)]
    loss = DistillationLoss(activation="sigmoid", mix=1.0, weight_ce=1.0, weight_overlap=0.0)
    task, batch = make_task(card, OnlineTeachers(two, card=card), loss), make_batch(card)
    batch["label"] = (torch.rand(2, 3, *card.patch_size) < 0.5).long()
    task.train()
    logits = task.model(batch["image"])
    total, _ = task.losses(logits, batch)
    with torch.no_grad():
        said = sum(Predictor.from_run(path).model(batch["image"]).sigmoid() for path in two) / 2
    torch.testing.assert_close(total, nn.functional.binary_cross_entropy_with_logits(logits, said))


def test_terms_that_learn_from_validation_see_teachers_of_whole_cases(tmp_path):
    path = str(write_teacher(tmp_path / "t.ckpt"))
    constraint = NeighbourConstraint(num_classes=3, margin=2.0)
    loss = CompoundLoss(TeacherTarget(), {"ce": {"term": CrossEntropy()}, "crac": {"weight": 0.1, "term": constraint}})
    task = make_task(CARD, OnlineTeachers([path], card=CARD), loss)
    whole = make_batch(replace(CARD, patch_size=[11, 9, 13]), 1)  # no multiple of the teacher's strides
    make_trainer().fit(task, loader(make_batch(CARD)), loader(whole))
    assert constraint.updates == 1
    predictor = Predictor.from_run(path)
    with torch.no_grad():
        expected = predictor.window.with_logits(predictor.model, whole["image"])[1]
    torch.testing.assert_close(task.eval()._context(whole)["teacher_logits"][0], expected)


def test_loss_that_does_not_listen_is_refused(tmp_path):
    teachers = OnlineTeachers([str(write_teacher(tmp_path / "t.ckpt"))], card=CARD)
    with pytest.raises(ValueError, match=r"learns from teachers, but CrossEntropyLoss does not\. Choose loss=distillation"):
        make_task(CARD, teachers, CrossEntropyLoss())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"classes": ["background", "right", "left"]},
            r"knows the classes \['background', 'left', 'right'\], but blobs has the classes \['background', 'right', 'left'\]",
        ),
        ({"classes": ["background", "left"]}, "knows the classes"),
        ({"regions": REGIONS}, r"knows the classes \['background', 'left', 'right'\], but blobs has the regions \{'left': \['left'\], 'right'"),
        ({"image_channels": 2}, r"takes 1 channel\(s\) in 3D, but blobs has 2 in 3D"),
        ({"patch_size": [8, 8], "foreground_fraction": None, "normalisation": "zscore"}, r"takes 1 channel\(s\) in 3D, but blobs has 1 in 2D"),
        ({"normalisation": "percentile"}, "trained with data.normalisation=zscore, but the student has percentile.*distillation=cached"),
        ({"spacing": [2.0, 1.0, 1.0]}, r"data\.spacing=None, but the student has \[2.0, 1.0, 1.0\]"),
        ({"patch_size": [9, 8, 8]}, r"cannot take patches of 9 x 8 x 8 \(.*trained on 8 x 8 x 8"),
    ],
    ids=["other-order", "fewer-classes", "regions", "channels", "dimensions", "normalisation", "spacing", "patch"],
)
def test_teacher_that_does_not_fit_is_named(change, message, tmp_path):
    path = write_teacher(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=message) as refused:
        OnlineTeachers([str(path)], card=replace(CARD, **change))
    assert str(refused.value).startswith(f"{path}: the teacher ")


@pytest.mark.parametrize("kind", [OnlineTeachers, CachedTeachers])
def test_no_teacher_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match="Expected at least one teacher, but got none"):
        kind([], card=CARD)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        kind([str(tmp_path / "nowhere")], card=CARD)


def test_checkpoint_knows_its_teachers_by_content(tmp_path):
    path = write_teacher(tmp_path / "t.ckpt")
    task = make_task(CARD, OnlineTeachers([str(path)], card=CARD))
    trainer = make_trainer()
    trainer.fit(task, loader(make_batch(CARD)))
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    elsewhere = path.rename(tmp_path / "moved.ckpt")
    again = make_task(CARD, OnlineTeachers([str(elsewhere)], card=CARD))
    make_trainer(max_epochs=2).fit(again, loader(make_batch(CARD)), ckpt_path=tmp_path / "student.ckpt", weights_only=True)
    other = make_task(CARD, OnlineTeachers([str(write_teacher(elsewhere, seed=3))], card=CARD))
    with pytest.raises(ValueError, match="files have changed since"):
        make_trainer(max_epochs=2).fit(other, loader(make_batch(CARD)), ckpt_path=tmp_path / "student.ckpt", weights_only=True)


# Written probabilities.


def folder_of(path: Path, **manifest: Any) -> str:
    path.mkdir()
    if manifest:
        (path / "soft_labels.json").write_text(json.dumps(manifest))
    return str(path)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_cached_probabilities_teach_as_their_logits_do(activation, temperature, tmp_path):
    card = CARD if activation == "softmax" else replace(CARD, regions=REGIONS)
    teachers = CachedTeachers([folder_of(tmp_path / name, teacher=name, **channels(card)) for name in ("a", "b")], card=card)
    assert teachers.fingerprints == ("a", "b")
    z = 2 * torch.randn(2, 2, 3, *CARD.patch_size, generator=torch.Generator().manual_seed(3))
    probs = z.softmax(2) if activation == "softmax" else z.sigmoid()
    batch = make_batch(CARD) | {f"teacher_probs_{number}": one for number, one in enumerate(probs)}
    if activation == "sigmoid":
        batch["label"] = (torch.rand(2, 3, *CARD.patch_size) < 0.5).long()
    task = make_task(card, teachers, DistillationLoss(temperature=temperature, activation=activation))
    task.train()
    logits = task.model(batch["image"])
    total, _ = task.losses(logits, batch)
    torch.testing.assert_close(total, task.loss(logits, batch["label"], context={"teacher_logits": z}))


def test_whole_cases_have_no_cached_probabilities(tmp_path):
    teachers = CachedTeachers([folder_of(tmp_path / "a")], card=CARD)
    with pytest.raises(ValueError, match=r"only training cases have soft labels.*distillation=online"):
        make_task(CARD, teachers).eval().losses(torch.zeros(2, 3, *CARD.patch_size), make_batch(CARD))


def test_cached_probabilities_of_other_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"soft labels are of the classes \['a', 'b', 'c'\], but blobs has"):
        CachedTeachers([folder_of(tmp_path / "a", classes=["a", "b", "c"])], card=CARD)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ({}, r"are of the classes \['left', 'right', 'both'\], but blobs has \['background', 'left', 'right'\]"),
        ({"left": [0], "right": [2], "both": [1, 2]}, r"are of the regions \{'left': \['left'\], .*, but blobs has \{'left': \['background'\]"),
    ],
    ids=["classes", "other-regions"],
)
def test_teachers_of_other_regions_are_refused(regions, message, tmp_path):
    taught = replace(CARD, regions=REGIONS)
    folder, path = folder_of(tmp_path / "soft", teacher="a", **channels(taught)), write_teacher(tmp_path / "t.ckpt", taught)
    OnlineTeachers([str(path)], card=taught)
    CachedTeachers([folder], card=taught)
    other = replace(CARD, regions=regions)
    with pytest.raises(ValueError, match=message):
        CachedTeachers([folder], card=other)
    with pytest.raises(ValueError, match=r"the teacher knows the regions \{'left': \['left'\]"):
        OnlineTeachers([str(path)], card=other)


def volumes(root: Path) -> DataCard:
    """Volumes smaller than the patch along one axis and larger along the others, mirrored."""
    for number in range(5):
        image, label = blob((10, 13, 7), seed=number)
        save(root / "images" / f"b{number}.nii.gz", image)
        save(root / "labels" / f"b{number}.nii.gz", label)
    mirrored = Augmentation(affine_probability=0, contrast_probability=0, noise_probability=0, bias_probability=0, flip_axes=[0, 1, 2])
    return replace(CARD, root=str(root), layout="paired", augment=True, augmentation=mirrored, batch_size=2, num_workers=0, foreground_fraction=0.5)


def scenes(root: Path) -> DataCard:
    """Images cropped and mirrored, in colours as they are."""
    pipeline = {"RandomCrop": {"pad_if_needed": True}, "HorizontalFlip": {"p": 0.5}}
    return replace(load_card(make_scenes(root)), root=str(root), pipeline=pipeline, patch_size=[48, 32])


@pytest.mark.parametrize(
    ("make", "regions"),
    [(volumes, {}), (scenes, {}), (volumes, {"left": [1]}), (scenes, {"car": ["car"], "on earth": ["car", "road"]})],
    ids=["volumes", "images", "a-region-of-volumes", "regions-of-images"],
)
def test_written_soft_labels_stay_with_their_pixels(make, regions, tmp_path):
    """A teacher that looks at one pixel at a time says of a patch what it has said of the image there: cut and mirrored alike, to the precision they are kept in."""
    card = replace(make(tmp_path), regions=regions)
    path = write_pointwise(tmp_path / "teacher.ckpt", card)
    predictor, folder = Predictor.from_run(path, trust_config=True), tmp_path / "soft"  # a network of the test's own
    for case in cases_of_split(card, "train")[1]:
        write_prediction(predictor(case.image), folder, case.id, ["soft_label"])
    online, cached = OnlineTeachers([str(path)], card=card, trust_config=True), CachedTeachers([str(folder)], card=card)
    data = SegmentationData(card, progress=False, training_companions=cached.companions)
    padded = 0
    for batch in data.train_dataloader():
        valid = (batch["label"][:, 0] != card.ignore_index).unsqueeze(1)
        now, before = (probabilities(teachers.logits(batch)[0], card.schema.activation) for teachers in (online, cached))
        assert now.std() > 0.05
        torch.testing.assert_close(torch.where(valid, before, 0.0), torch.where(valid, now, 0.0), rtol=0, atol=1e-3)
        padded += int((~valid).sum())
    assert padded
    assert "teacher_probs_0" not in next(iter(data.val_dataloader()))
