"""An output head over a few rows, by the kernel that CUDA takes, and over more by MLX."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from blockffn_mlx import device
from blockffn_mlx.kernels import probe
from blockffn_mlx.models.output import multiply
from helpers.kernel_runs import BACKEND, ON_GPU, needs_gpu_or_compiler, running


@needs_gpu_or_compiler
@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_few_rows_take_the_kernel_on_cuda(monkeypatch, kind, bits):
    sizes = (64, 48) if kind is nn.Linear else (48, 64)
    holder = nn.Module()
    holder.head = kind(*sizes, **({"bias": False} if kind is nn.Linear else {}))
    if bits:
        nn.quantize(holder, 32, bits)
    head = holder.head
    head.eval()
    x = mx.random.normal((1, 5, 64), key=mx.random.key(0))
    expected = head(x) if kind is nn.Linear else head.as_linear(x)
    assert mx.array_equal(multiply(head, x), expected) or ON_GPU
    monkeypatch.setattr(device, "compute_backend", lambda: "cuda")
    monkeypatch.setattr(device, "kernel_backend", lambda: BACKEND)
    monkeypatch.setattr(probe, "works", lambda *_, **__: True)
    with running() as runs:
        found = multiply(head, x)
        mx.eval(found)
    assert ON_GPU or [run.name.split("_affine")[0] for run in runs] == ["blockffn_down"]
    assert found.shape == expected.shape
    assert mx.abs(found - expected).max() < 1e-4 * mx.abs(expected).max()
    for other in (x[:, :1], mx.repeat(x, 4, axis=1), x.astype(mx.bfloat16)):
        mx.eval(multiply(head, other))  # MLX's own product: nothing is launched outside a harness
    head.train()
    mx.eval(multiply(head, x))
