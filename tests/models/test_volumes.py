"""Each network builds by name, maps (N, channels, *spatial) to (N, C, *spatial) and passes gradients to every parameter."""

import pytest
import torch

from densecal.registry import MODELS

SMALL = {
    "unet": ({"channels": (4, 8), "dropout": 0.1}, 8),
    "dynunet": ({"filters": (4, 8, 16), "deep_supervision_heads": 1}, 16),
    "segresnet": ({"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)}, 8),
    "swin_unetr": ({"feature_size": 12, "depths": (1, 1, 1, 1)}, 64),
}


def test_every_network_has_a_test():
    assert set(SMALL) == set(MODELS.list()) - {"smp"}  # for images, in test_images.py


@pytest.mark.parametrize("spatial_dims", [2, 3], ids=["2d", "3d"])
@pytest.mark.parametrize("name", SMALL)
def test_network_returns_logits_of_the_input_size(name, spatial_dims):
    options, side = SMALL[name]
    if name == "swin_unetr" and spatial_dims == 3:
        pytest.skip("64^3 takes seconds on a CPU; the 2D case runs the same wrapper")
    torch.manual_seed(0)
    model = MODELS.create(name, 2, 5, spatial_dims=spatial_dims, **options)
    image = torch.randn(2, 2, *[side] * spatial_dims)

    assert model.eval()(image).shape == (2, 5, *[side] * spatial_dims)

    model.train()(image).square().sum().backward()
    without_gradient = [n for n, p in model.named_parameters() if p.grad is None]
    # MONAI's DynUNet keeps each head twice in its module list, under two names but one parameter; nothing may be unused.
    assert not without_gradient


def test_unknown_network_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'segresnet'"):
        MODELS.create("segresnett", 1, 2)


def test_dynunet_adds_outputs_in_training_only():
    model = MODELS.create("dynunet", 1, 3, filters=(4, 8, 16), deep_supervision_heads=1, spatial_dims=2)
    image = torch.randn(1, 1, 16, 16)
    assert model.train()(image).shape == (1, 2, 3, 16, 16)
    assert model.eval()(image).shape == (1, 3, 16, 16)
