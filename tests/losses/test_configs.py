"""Each config lists every argument its constructor takes, with the same default; every method has one; compositions build."""

import inspect
from pathlib import Path

import pytest
from conftest import ROOT

from densecal.cli.configuration import CommandError, build
from densecal.registry import LOSSES, TARGETS, TERMS

hydra = pytest.importorskip("hydra")
yaml = pytest.importorskip("yaml")
accepted = pytest.importorskip("densecal.cli.configuration").accepted

GROUPS = {"loss": LOSSES, "target": TARGETS, "term": TERMS}
FILES = [path for group in GROUPS for path in sorted((ROOT / "configs" / group).glob("*.yaml"))]
# Compositions take objects, not settings: `loss=compound` has its own form, and deep supervision wraps whatever loss was chosen.
COMPOSITIONS = {"compound", "deep_supervision"}
INJECTED = {"activation", "case_ids", "ignore_index", "num_classes"}
# Second names, so that MONAI's calls work; a config has the first.
ALIASES = {"nacl": {"classes", "dim", "kernel_ops", "distance_type", "alpha", "padding_mode"}}


@pytest.mark.parametrize("path", [p for p in FILES if p.stem not in COMPOSITIONS], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_config_equals_the_constructor(path: Path):
    config = yaml.safe_load(path.read_text())
    if path.parent.name == "term":
        assert set(config) == {"weight", "term"}
        config = config["term"]
    target = hydra.utils.get_object(config.pop("_target_"))
    for name, node in config.items():
        if isinstance(node, dict):  # a schedule: all its arguments, too
            listed = set(node) - {"_target_"}
            config[name] = hydra.utils.instantiate(node)
            assert listed == set(inspect.signature(type(config[name])).parameters), name
    assert target is GROUPS[path.parent.name][path.stem]
    parameters = {name: p.default for name, p in inspect.signature(target).parameters.items() if name not in INJECTED | ALIASES.get(path.stem, set())}
    assert config == parameters
    for name, default in parameters.items():
        assert type(config[name]) is type(default), name


@pytest.mark.parametrize("group", GROUPS)
def test_every_method_has_a_config(group):
    assert {p.stem for p in FILES if p.parent.name == group} | COMPOSITIONS >= set(GROUPS[group].list())


@pytest.fixture
def compose(tmp_path):
    """Compose overrides over a primary config that has a loss and nothing else."""
    (tmp_path / "primary.yaml").write_text("defaults:\n  - loss: ce\n  - _self_\n")

    def run(*overrides):
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
            config = hydra.compose("primary", [*overrides, f"hydra.searchpath=[file://{ROOT / 'configs'}]"])
        return build(config.loss, "loss", ignore_index=255, num_classes=3, case_ids=["a", "b"])

    return run


@pytest.mark.parametrize("name", [p.stem for p in FILES if p.parent.name == "loss"])
def test_loss_builds_from_its_name(compose, name):
    loss = compose(f"loss={name}")
    assert type(loss) is LOSSES[name]
    assert loss.ignore_index == 255


def test_any_target_with_any_terms(compose):
    loss = compose("loss=compound", "target=svls", "term=[ce,dml]", "loss.target.sigma=2.0", "loss.terms.dml.weight=0.75")
    assert type(loss.target) is TARGETS["svls"]
    assert loss.target.sigma == 2.0
    assert loss.weights == {"ce": 1.0, "dml": 0.75}


def test_preset_with_another_target_is_refused(compose):
    with pytest.raises(CommandError, match="unexpected keyword argument 'target'"):
        compose("loss=svls", "+target=label_smoothing")
