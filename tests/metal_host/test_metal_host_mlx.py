"""The harness on MLX's own kernels: the headers that travel in the wheel, against MLX on the CPU.

On a Mac these kernels are what MLX's operations run, so there is nothing to compare there.
"""

import struct
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest

import metal_host
from helpers.ffn_cases import TOLERANCE, float64, relative_error

pytestmark = pytest.mark.skipif(metal_host.compiler() is None, reason=metal_host.NO_COMPILER)

NAMES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}
KERNELS = "mlx/backend/metal/kernels/"
QUANTIZED = ["steel/gemm/gemm.h", "quantized_utils.h", "quantized.h"]
EMPTY = np.zeros(16, np.uint8)  # a buffer that a function constant switches off


@dataclass
class HeaderKernel:
    """One kernel of MLX's headers.

    Attributes:
        instance: its name with template arguments.
        headers: what to include, below mlx/backend/metal/kernels.
        constants: function constants.
    """

    instance: str
    headers: list[str]
    constants: dict[int, int | bool] = field(default_factory=dict)

    def __call__(self, buffers, output, grid, threadgroup, mode, **options) -> mx.array:
        """buffers: {index: value}, output: (index, shape, dtype); scalars are numpy ones."""
        includes = "".join(f'#include "{KERNELS}{h}"\n' for h in ["utils.h", *self.headers])
        parameters, text = metal_host.translate(
            includes,
            self.instance,
            roots=[metal_host.MLX_HEADERS],
            constants=self.constants,
        )
        index, shape, dtype = output
        bound = []
        for i in range(max(p.buffer for p in parameters) + 1):
            if i == index:
                data = np.zeros(mx.zeros(shape, dtype).nbytes, np.uint8)
                bound.append(metal_host.Buffer("output", data, writable=True, initialised=False))
            else:
                bound.append(metal_host.Buffer(f"buffer {i}", as_bytes(buffers.get(i, EMPTY))))
        library = metal_host.build(text, mode)
        metal_host.dispatch(library, bound, grid, threadgroup, **options)
        return mx.array(bound[index].data).view(dtype).reshape(shape)


def as_bytes(value) -> np.ndarray:
    if isinstance(value, mx.array):
        return np.array(mx.contiguous(value).reshape(-1).view(mx.uint8))
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint8).copy()
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def array(rng, *shape, dtype=mx.float32) -> mx.array:
    return mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)


def assert_close(got: mx.array, want: mx.array):
    assert relative_error(got, float64(want)) < TOLERANCE[got.dtype]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture(params=["fast", "check"])
def mode(request):
    return request.param


each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


@each_dtype
@pytest.mark.parametrize(
    "kernel, size, threads", [("softmax_single_row", 500, 128), ("softmax_looped", 4500, 1024)]
)
def test_softmax(mode, rng, dtype, kernel, size, threads):
    x = array(rng, 2, size, dtype=dtype)
    run = HeaderKernel(f"{kernel}<{NAMES[dtype]}, float>", ["softmax.h"])
    buffers = {0: x, 2: np.int32(size)}
    got = run(buffers, (1, x.shape, dtype), (2 * threads, 1, 1), (threads, 1, 1), mode)
    assert_close(got, mx.softmax(x.astype(mx.float32), axis=-1))


@each_dtype
def test_logsumexp(mode, rng, dtype):
    x = array(rng, 3, 500, dtype=dtype)
    run = HeaderKernel(f"logsumexp<{NAMES[dtype]}>", ["logsumexp.h"])
    got = run({0: x, 2: np.int32(500)}, (1, (3,), dtype), (3 * 128, 1, 1), (128, 1, 1), mode)
    assert_close(got, mx.logsumexp(x.astype(mx.float32), axis=-1))


def quantized(rng, rows, width, bits, dtype):
    weight, scales, biases = mx.quantize(array(rng, rows, width), group_size=64, bits=bits)
    packed = (weight, scales.astype(dtype), biases.astype(dtype))
    full = [a.astype(mx.float32) if a.dtype != mx.uint32 else a for a in packed]
    return packed, mx.dequantize(*full, group_size=64, bits=bits)


@each_dtype
@pytest.mark.parametrize("bits", [4, 8])
def test_affine_qmv_fast(mode, rng, dtype, bits):
    rows, width = 16, 512
    packed, full = quantized(rng, rows, width, bits, dtype)
    x = array(rng, 2, width, dtype=dtype)
    run = HeaderKernel(f"affine_qmv_fast<{NAMES[dtype]}, 64, {bits}, false>", QUANTIZED)
    got = run(
        {**dict(enumerate((*packed, x))), 5: np.int32(width), 6: np.int32(rows)},
        (4, (2, rows), dtype),
        (2 * 32, rows // 8 * 2, 1),
        (32, 2, 1),
        mode,
    )
    assert_close(got, x.astype(mx.float32) @ full.T)


@each_dtype
@pytest.mark.parametrize("bits", [4, 8])
def test_affine_qmm_t(mode, rng, dtype, bits):
    tokens, rows, width = 37, 64, 128
    packed, full = quantized(rng, rows, width, bits, dtype)
    x = array(rng, tokens, width, dtype=dtype)
    run = HeaderKernel(
        f"affine_qmm_t<{NAMES[dtype]}, 64, {bits}, true, false>",
        QUANTIZED,
    )
    sizes = {5: np.int32(width), 6: np.int32(rows), 7: np.int32(tokens)}
    got = run(
        {**dict(enumerate((*packed, x))), **sizes},
        (4, (tokens, rows), dtype),
        (rows // 32 * 32, (tokens + 31) // 32 * 2, 2),
        (32, 2, 2),
        mode,
    )
    assert_close(got, x.astype(mx.float32) @ full.T)


@each_dtype
def test_steel_gemm(mode, rng, dtype):
    m, n, k = 45, 50, 40  # ragged in all three
    a, b = array(rng, m, k, dtype=dtype), array(rng, n, k, dtype=dtype)
    run = HeaderKernel(
        f"gemm<{NAMES[dtype]}, 32, 32, 16, 2, 2, false, true>",
        ["steel/gemm/gemm.h", "steel/gemm/kernels/steel_gemm_fused.h"],
        constants={200: False, 201: False, 202: False},
    )
    tiles_n, tiles_m = (n + 31) // 32, (m + 31) // 32
    params = struct.pack("8i3q3i4x", m, n, k, k, k, n, tiles_n, tiles_m, 0, 0, 0, 0, k // 16, 1)
    got = run(
        {0: a, 1: b, 4: params, 6: np.ones(1, np.int32), 7: np.zeros(2, np.int64)},
        (3, (m, n), dtype),
        (tiles_n * 32, tiles_m * 2, 2),
        (32, 2, 2),
        mode,
    )
    assert_close(got, a.astype(mx.float32) @ b.astype(mx.float32).T)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_sdpa_vector(mode, rng, dtype):
    heads, kv_heads, queries, keys, dim = 4, 2, 2, 37, 64
    q = array(rng, 1, heads, queries, dim, dtype=dtype)
    k, v = (array(rng, 1, kv_heads, keys, dim, dtype=dtype) for _ in range(2))
    scale = dim**-0.5
    run = HeaderKernel(f"sdpa_vector<{NAMES[dtype]}, {dim}>", ["sdpa_vector.h"], constants={22: 1})
    head, row = np.uint64(keys * dim), np.uint64(dim)
    got = run(
        {0: q, 1: k, 2: v, 4: np.int32(heads // kv_heads), 5: np.int32(keys), 6: head, 7: row,
         8: head, 9: row, 10: np.float32(scale)},
        (3, q.shape, dtype),
        (heads * 1024, queries, 1),
        (1024, 1, 1),
        mode,
    )  # fmt: skip
    q, k, v = (a.astype(mx.float32) for a in (q, k, v))
    want = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
    assert_close(got, want)


def test_affine_dequantize(mode, rng):
    rows, width = 4, 128
    w = array(rng, rows, width)
    packed = mx.quantize(w, group_size=64, bits=4)
    run = HeaderKernel("affine_dequantize<float, 64, 4>", QUANTIZED)
    got = run(
        dict(enumerate(packed)),
        (3, w.shape, mx.float32),
        (width // 2, rows, 1),
        (32, 1, 1),
        mode,
    )
    assert_close(got, mx.dequantize(*packed, group_size=64, bits=4))
