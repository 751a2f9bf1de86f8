"""Runs kernels on this machine's GPU, or in the Metal harness where there is none."""

from contextlib import contextmanager

import mlx.core as mx
import pytest

import blockffn_mlx as bf
import metal_host
from blockffn_mlx import kernels
from helpers.ffn_cases import TOLERANCE, Case, float64, relative_error

ON_GPU = mx.metal.is_available() or mx.cuda.is_available()
BACKEND = "cuda" if mx.cuda.is_available() else "metal"
needs_gpu_or_compiler = pytest.mark.skipif(
    not ON_GPU and metal_host.compiler() is None, reason=metal_host.NO_COMPILER
)
in_harness = pytest.mark.skipif(ON_GPU, reason="shows what only the harness can see")


@contextmanager
def running(mode: str = "fast", **options):
    """Runs kernels on this machine's GPU, or in the harness; yields its runs, if any."""
    kernels.build_kernel.cache_clear()
    try:
        if ON_GPU:
            yield []
        else:
            with metal_host.harness(mode, **options) as runs:
                yield runs
            assert runs, "no kernel came to the harness"
    finally:
        kernels.build_kernel.cache_clear()


def result(case: Case, operands) -> mx.array:
    x, scores, up, down = operands
    out = bf.ffn.chunk_union_ffn(x, scores, up, down, act=case.act, backend=BACKEND)
    mx.eval(out)
    assert out.dtype == case.dtype and out.shape == x.shape
    return out


def check(case: Case, mode: str = "fast", **options) -> list[metal_host.Run]:
    *operands, expected = case.operands()
    with running(mode, **options) as runs:
        out = result(case, operands)
    if case.union == "empty":
        assert mx.array_equal(out, mx.zeros_like(out))
    silent = float64(operands[1]).any(-1)  # tokens without any expert get exact zeros
    assert not float64(out)[~silent].any()
    assert relative_error(out, expected) < TOLERANCE[case.dtype]
    return runs
