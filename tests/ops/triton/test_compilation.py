"""The kernels compile for a GPU that is not there: what the interpreter runs is not yet what the compiler takes."""

import inspect
import re

import pytest
import torch

from densecal.ops import mean_kernel, svls_kernel
from densecal.ops.label_losses import CrossEntropyPart, LabelShares, MarginPart, NeighbourPart, OverlapPart

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.compiler")
backends = pytest.importorskip("triton.backends.compiler")

POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
POINTERS |= {torch.uint8: "*u8", torch.int16: "*i16", torch.int64: "*i64"}


def compile_call(kernel, arguments, constants):
    """Compile a kernel for an H100 as a launch with these arguments would, and return its PTX and what the assembler says."""
    names = list(inspect.signature(kernel.fn).parameters)
    values = dict(zip(names, arguments, strict=False)) | {name: value for name, value in constants.items() if name in names}
    signature, fixed, attributes = {}, {}, {}
    for place, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[place,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int) and name not in constants and value != 1:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
        else:
            signature[name], fixed[place,] = "constexpr", value
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    made = triton.compile(source, target=backends.GPUTarget("cuda", 90, 32), options={"num_warps": constants["num_warps"]})
    return made.asm["ptx"]


@pytest.fixture
def record(monkeypatch, tmp_path):
    """Put a recorder in the place of a module's kernel; gives the kernel and the list of its calls."""

    def install(module):
        from densecal.ops.triton.label_losses import INTERPRETED

        if INTERPRETED:
            pytest.skip("Triton interprets in this process")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        calls = []

        class Recorder:
            def __getitem__(self, grid):
                return lambda *arguments, **constants: calls.append((arguments, constants))

        kernel = module._kernel
        monkeypatch.setattr(module, "_kernel", Recorder())
        return kernel, calls

    return install


@pytest.mark.parametrize("kind", ["all-parts", "boundary-half"])
def test_kernel_compiles(kind, record):
    from densecal.ops.triton import label_losses as module

    kernel, calls = record(module)
    if kind == "all-parts":
        logits, labels = torch.zeros(1, 5, 2, 16, 16, requires_grad=True), torch.zeros(1, 2, 16, 16, dtype=torch.int16)
        shares = LabelShares(svls_kernel(3, 1.0, 3), "zeros")
        parts = [
            CrossEntropyPart(shares, torch.ones(5)),
            OverlapPart(shares),
            NeighbourPart(LabelShares(mean_kernel(3, 3), "renormalize"), "l2"),
            MarginPart(1.0, True, 0.5, 0.5, detached=True),
        ]
    else:
        logits, labels = torch.zeros(1, 20, 16, 32, dtype=torch.bfloat16, requires_grad=True), torch.zeros(1, 16, 32, dtype=torch.uint8)
        parts = [CrossEntropyPart(LabelShares(smoothing=torch.tensor(0.5), boundary=(3, 3)))]
    results = module.label_losses(logits, labels, parts, ignore_index=255, per_pixel=kind == "boundary-half")
    sum(value.sum() for result in results for value in vars(result).values() if value.requires_grad).backward()
    forward, backward = (compile_call(kernel, *call) for call in calls)
    # The logits of neighbouring pixels are read, and their gradients written, in vectors.
    assert re.search(r"ld\.global[^\n]*\.v[24]|cp\.async[^\n]*, 0x(8|10),", forward)
    assert re.search(r"st\.global[^\n]*\.v[24]", backward)
    for text in (forward, backward):
        assert "atom" not in text  # sums in a fixed order
        assert not re.search(r"[ls][dt]\.local", text)


@pytest.mark.parametrize("kind", ["top_label", "classwise"])
@pytest.mark.parametrize("from_logits", [False, True], ids=["probs", "logits"])
def test_kernel_of_bins_compiles(kind, from_logits, record):
    from densecal.ops.triton import calibration_bins as module

    kernel, calls = record(module)
    values, labels = torch.zeros(1, 20, 32, 32, dtype=torch.bfloat16 if from_logits else torch.float32), torch.zeros(1, 32, 32, dtype=torch.uint8)
    options = {"mask": labels == 0, "threshold": 0.25} if kind == "classwise" else {}
    module.calibration_bins(values, labels, num_bins=15, kind=kind, from_logits=from_logits, ignore_index=255, **options)
    (text,) = (compile_call(kernel, *call) for call in calls)
    assert re.search(r"ld\.global[^\n]*\.v[24]|cp\.async[^\n]*, 0x(8|10),", text)
    assert "atom" not in text
    assert not re.search(r"[ls][dt]\.local", text)


@pytest.mark.parametrize("kind", ["window", "boundary-half"])
def test_kernel_of_shares_compiles(kind, record):
    from densecal.ops.triton import label_shares as module

    kernel, calls = record(module)
    if kind == "window":
        labels, shares, dtype = torch.zeros(1, 2, 16, 16, dtype=torch.uint8), LabelShares(svls_kernel(3, 1.0, 3), "zeros"), torch.float32
    else:
        labels, dtype = torch.zeros(1, 16, 32, dtype=torch.int64), torch.bfloat16
        shares = LabelShares(smoothing=0.5, boundary=(3, 3))
    module.label_shares(labels, 20, shares, ignore_index=255, dtype=dtype)
    (text,) = (compile_call(kernel, *call) for call in calls)
    assert re.search(r"st\.global[^\n]*\.v[24]", text)  # shares of neighbouring pixels are written in vectors
    assert not re.search(r"[ls][dt]\.local", text)
