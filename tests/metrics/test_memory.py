"""A validation of street scenes, made on the fly, in memory that does not grow with the number of images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# 19 classes. Peak memory is read after the second image, when everything was needed once, and at the end.
_PROCESS = """
import sys
from pathlib import Path
import torch
from densecal.labels import LabelSchema
from densecal.metrics import SegmentationEvaluation

images, size = int(sys.argv[1]), (int(sys.argv[3]), 2 * int(sys.argv[3]))
torch.set_num_threads(1)

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024

def scene(index):
    generator = torch.Generator().manual_seed(index)
    coarse = torch.randn(1, 19, 32, 64, generator=generator)
    logits = torch.nn.functional.interpolate(coarse, size, mode="bilinear").mul_(8)
    label = torch.nn.functional.interpolate(coarse + 0.3 * torch.randn(coarse.shape, generator=generator), size, mode="nearest").argmax(1)
    label[:, :64] = 255
    return logits.softmax(1), label

schema = LabelSchema(tuple(f"class {c}" for c in range(19)), ignore_index=255, background=None)
evaluation = SegmentationEvaluation(schema, boundary_width=3.0, detail=sys.argv[2] == "detail")
for index in range(images):
    evaluation.update(*scene(index), torch.tensor([index]))
    if index == 1:
        before = peak()
result = evaluation.compute()
assert len(result.cases) == images
assert 0 < result.pooled["all"]["ece_top_label"] < 1
print(before, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory where Linux tells it")
@pytest.mark.parametrize(
    ("images", "height", "detail"),
    [(8, 512, "plain"), pytest.param(100, 1024, "detail", marks=pytest.mark.slow)],
    ids=["8", "100-detail"],
)
def test_memory_does_not_grow_with_the_images(images, height, detail):
    # glibc keeps freed arrays for later as it sees fit, some 100 MiB of them after a while; here it gives back what is 64 KiB or more, so that memory is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _PROCESS, str(images), detail, str(height)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=environment)
    assert process.returncode == 0, process.stderr
    before, after = map(float, process.stdout.split())
    # One image's probabilities are 38 or 152 MiB; what is kept of it is 26 KiB.
    assert after < before + 30, f"{before:.0f} MiB after two images, {after:.0f} MiB after {images}"
    print(f"{before:.0f} MiB after two images, {after:.0f} MiB after {images}")
