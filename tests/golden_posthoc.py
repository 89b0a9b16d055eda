"""The family of temperature scaling against the authors' numbers."""

from __future__ import annotations

import torch
from golden import handles

from densecal.posthoc import TemperatureScaling, local_temperature, vector_scale

PREFIX = "param.temperature_level_2_"


@handles("lts_temperature_scaling")
def temperature(case, tensors):
    scaling = TemperatureScaling(case["params"]["num_classes"])
    scaling.temperature.copy_(tensors["param.temperature_single"][0])
    scaling.num_pixels.fill_(1)
    torch.testing.assert_close(scaling(tensors["logits"]), tensors["output"].softmax(1), atol=1e-6, rtol=1e-5)


@handles("lts_vector_scaling")
def vector(case, tensors):
    scaled = vector_scale(tensors["logits"], tensors["param.vector_parameters"].flatten(), tensors["param.vector_offset"].flatten())
    torch.testing.assert_close(scaled, tensors["output"], atol=1e-6, rtol=1e-5)


@handles("lts_lts", "lts_ibts")
def local(case, tensors):
    """The published code adds 1 twice, and its image-based variant averages the temperature over the whole batch."""
    names = ["conv1", "conv2", "conv3", "conv4", "param1", "param2", "param3", "param_img"]
    temperature = local_temperature(
        tensors["logits"].double(),
        torch.cat([tensors[f"{PREFIX}{name}.weight"] for name in names]),
        torch.cat([tensors[f"{PREFIX}{name}.bias"] for name in names]),
        base=2.0,
        least=1e-8,
        image=tensors["image"].double(),
        image_weight=tensors[f"{PREFIX}conv_img.weight"],
        image_bias=tensors[f"{PREFIX}conv_img.bias"],
    )
    if case["stratum"] == "lts_ibts":
        temperature = temperature.mean()
    torch.testing.assert_close(tensors["logits"].double() / temperature, tensors["output"].double(), atol=1e-5, rtol=1e-5)
