"""The harness itself: it finds planted faults, refuses what breaks a limit, and counts right."""

import mlx.core as mx
import numpy as np
import pytest

import metal_host

pytestmark = pytest.mark.skipif(metal_host.compiler() is None, reason=metal_host.NO_COMPILER)

INDEX = "uint i = thread_position_in_grid.x;\n"
SHARED = INDEX + "threadgroup float a[64];\n"
SYNC = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"


def run(body, *, mode="check", grid=64, group=64, size=64, header="", inputs=None, **options):
    """One kernel from float x [size] (and other inputs) to float y [size]."""
    inputs = {"x": mx.arange(size).astype(mx.float32)} if inputs is None else inputs
    kernel = metal_host.MetalKernel(
        name="planted", input_names=list(inputs), output_names=["y"], source=body, header=header
    )
    (y,) = kernel(
        inputs=list(inputs.values()),
        output_shapes=[(size,)],
        output_dtypes=[mx.float32],
        grid=(grid, 1, 1),
        threadgroup=(group, 1, 1),
        mode=mode,
        **options,
    )
    return np.array(y), kernel.stats


# name: (body with the fault, what the message says, the builds that find it, body without it)
ALL, CHECK = ("fast", "check", "as"), ("check",)
FAULTS = {
    "simd operation in a branch": (
        INDEX + "float s = 0; if (i % 32 < 20) { s = simd_sum(x[i]); } y[i] = s;",
        "not all lanes reached the same simd operation",
        ALL,
        INDEX + "y[i] = simd_sum(i % 32 < 20 ? x[i] : 0.0f);",
    ),
    "different simd operations": (
        INDEX + "if (i % 32 < 20) { y[i] = simd_sum(x[i]); } else { y[i] = simd_max(x[i]); }",
        "different simd operations",
        ALL,
        INDEX + "float s = simd_sum(x[i]), m = simd_max(x[i]); y[i] = i % 32 < 20 ? s : m;",
    ),
    "barrier after a return": (
        SHARED + "a[i] = x[i]; if (i > 40) { return; }" + SYNC + "y[i] = a[i];",
        "threadgroup_barrier reached by 41 of 64 threads",
        ALL,
        SHARED + "a[i] = x[i];" + SYNC + "if (i > 40) { return; } y[i] = a[i];",
    ),
    "barrier in a branch": (
        SHARED + "a[i] = x[i]; if (i < 32) {" + SYNC + "} else {" + SYNC + "} y[i] = a[63 - i];",
        "wait at different threadgroup_barriers",
        ALL,
        SHARED + "a[i] = x[i];" + SYNC + "y[i] = a[63 - i];",
    ),
    "read past a buffer": (
        INDEX + "y[i] = x[i + 1];",
        "buffer 'x' byte 256 of 256",
        ALL,
        INDEX + "y[i] = x[min(i + 1, 63u)];",
    ),
    "write past a buffer": (
        INDEX + "y[i + 1] = x[i]; if (i == 0) { y[0] = 0; }",
        "buffer 'y' byte 256 of 256",
        ALL,
        INDEX + "y[i] = x[i];",
    ),
    "read before a buffer": (
        INDEX + "const device float* p = x - 1; y[i] = p[i];",
        "out-of-bounds read of 4 bytes at kernel.metal:6: buffer 'x' byte -4",
        CHECK,
        INDEX + "const device float* p = x; y[i] = p[i];",
    ),
    "write past a threadgroup array": (
        SHARED + "device float* unused = y; a[i] = x[i]; threadgroup float* p = a;"
        "if (i == 0) { p[64] = 1; }" + SYNC + "y[i] = a[i];",
        "threadgroup variable 'a'",
        ALL,
        SHARED + "a[i] = x[i];" + SYNC + "y[i] = a[i];",
    ),
    "index past an array of a thread": (
        INDEX + "float a[4] = {0, 1, 2, 3}; y[i] = a[i % 5];",
        "array index outside its declared size",
        CHECK,
        INDEX + "float a[4] = {0, 1, 2, 3}; y[i] = a[i % 4];",
    ),
    "write to an input": (
        INDEX + "((device float*)x)[i] = 1; y[i] = 0;",
        "the input buffer 'x'",
        ("fast", "as"),
        INDEX + "y[i] = 0;",
    ),
    "no barrier": (
        SHARED + "a[i] = x[i]; y[i] = a[(i + 32) % 64];",
        "race",
        CHECK,
        SHARED + "a[i] = x[i];" + SYNC + "y[i] = a[(i + 32) % 64];",
    ),
    "a barrier that orders other memory": (
        SHARED + "a[i] = x[i]; threadgroup_barrier(mem_flags::mem_none); y[i] = a[(i + 32) % 64];",
        "race write/read",
        CHECK,
        SHARED + "a[i] = x[i];" + SYNC + "y[i] = a[(i + 32) % 64];",
    ),
    "a barrier of the simdgroup only": (
        SHARED
        + "a[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[(i + 32) % 64];",
        "race",
        CHECK,
        SHARED
        + "a[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup);"
        + "y[i] = a[i / 32 * 32 + (i + 1) % 32];",
    ),
    "no barrier before memory is used again": (
        SHARED + "a[i] = x[i];" + SYNC + "float s = a[63 - i]; a[i] = s; y[i] = s;",
        "race read/write",
        CHECK,
        SHARED + "a[i] = x[i];" + SYNC + "float s = a[63 - i];" + SYNC + "a[i] = s; y[i] = s;",
    ),
    "two threadgroups write one place": (
        INDEX + "y[i % 32] = x[i]; if (i >= 32) { y[i] = 0; }",
        "race write/write",
        CHECK,
        INDEX + "y[i] = x[i];",
    ),
    "unwritten threadgroup memory": (
        SHARED + "if (i < 60) { a[i] = x[i]; }" + SYNC + "y[i] = a[i];",
        "uninitialised read",
        CHECK,
        SHARED + "a[i] = i < 60 ? x[i] : 0.0f;" + SYNC + "y[i] = a[i];",
    ),
    "an output read before it is written": (
        INDEX + "y[i] += x[i];",
        "uninitialised read",
        CHECK,
        INDEX + "y[i] = x[i]; y[i] += x[i];",
    ),
    "a device pointer to threadgroup memory": (
        SHARED + "a[i] = x[i]; device float* p = a; y[i] = p[i];",
        "cannot initialize a variable of type 'device float *'",
        ("as",),
        SHARED + "a[i] = x[i]; threadgroup float* p = a; y[i] = p[i];",
    ),
    "signed overflow of an offset": (
        INDEX + "int offset = (int(i) + 2) * (1 << 30); y[i] = x[offset & 63];",
        "integer overflow at kernel.metal:6",
        CHECK,
        INDEX + "long offset = (long(i) + 2) * (1 << 30); y[i] = x[offset & 63];",
    ),
    "unsigned overflow of an offset": (
        INDEX + "uint offset = (i + 2) * 0x40000000u; y[i] = x[offset & 63];",
        "integer overflow at kernel.metal:6",
        CHECK,
        INDEX + "ulong offset = (ulong(i) + 2) * 0x40000000u; y[i] = x[offset & 63];",
    ),
    "a vector load from an odd address": (
        INDEX + "const device float4* p = (const device float4*)(x + 1);"
        "float4 v = p[i % 8]; y[i] = v.x;",
        "misaligned access",
        CHECK,
        INDEX + "const device float4* p = (const device float4*)(x + 4);"
        "float4 v = p[i % 8]; y[i] = v.x;",
    ),
    "division by zero": (
        INDEX + "uint n = uint(x[i]); y[i] = 5 / n;",
        "integer division by zero",
        ALL,
        INDEX + "uint n = uint(x[i]) + 1; y[i] = 5 / n;",
    ),
    "too much threadgroup memory": (
        INDEX + "threadgroup float a[8193]; a[i] = x[i]; y[i] = a[i];",
        "32784 bytes of threadgroup memory, the limit is 32768",
        ALL,
        INDEX + "threadgroup float a[8192]; a[i] = x[i]; y[i] = a[i];",
    ),
    "no end": (
        INDEX + "float v = x[i]; while (v >= 0) { v = v > 9 ? 0 : v + 1; } y[i] = v;",
        "timeout",
        ALL,
        INDEX + "float v = x[i]; while (v >= 9) { v -= 1; } y[i] = v;",
    ),
}


@pytest.mark.parametrize(
    "name, mode", [(name, mode) for name, fault in FAULTS.items() for mode in fault[2]]
)
def test_planted_fault(name, mode):
    faulty, message, _, sound = FAULTS[name]
    group = 32 if "two threadgroups" in name else 64
    with pytest.raises(metal_host.MetalError) as error:
        run(faulty, mode=mode, group=group, timeout=0.2)
    assert message in str(error.value)
    run(sound, mode=mode, group=group)


@pytest.mark.parametrize("mode", ALL)
def test_partial_last_threadgroup(mode):
    """Metal launches exactly the grid: a kernel that counts on whole threadgroups is found out."""
    y, stats = run(INDEX + "y[i] = x[i];", mode=mode, grid=50, size=50, group=32)
    assert np.array_equal(y, np.arange(50)) and (stats.groups, stats.threads) == (2, 50)
    whole = SHARED + "uint t = thread_index_in_threadgroup; a[t] = x[i];" + SYNC
    with pytest.raises(metal_host.MetalError, match="uninitialised read"):
        run(whole + "y[i] = a[31 - t];", grid=50, size=50, group=32)
    last = "threads_per_threadgroup.x - 1 - t"
    y, _ = run(whole + f"y[i] = a[{last}];", mode=mode, grid=50, size=50, group=32)
    assert np.array_equal(y, np.r_[np.arange(31, -1, -1), np.arange(49, 31, -1)])


def test_unwritten_output_and_absent_lanes():
    y, stats = run(INDEX + "if (i < 50) { y[i] = x[i]; }")
    assert stats.unwritten == 14 * 4 and np.isnan(y[50:]).all()
    # a lane that does not exist hands over poison, not zero
    y, _ = run(INDEX + "y[i] = simd_shuffle(x[i], 31);", grid=20, size=20, group=32)
    assert np.isnan(y).all()


def test_scratch_that_an_earlier_kernel_left_unwritten():
    scratch = metal_host.MetalKernel(
        name="scratch", input_names=["x"], output_names=["h"],
        source=INDEX + "if (i < 60) { h[i] = x[i]; }",
    )  # fmt: skip
    (h,) = scratch(
        inputs=[mx.ones((64,))], output_shapes=[(64,)], output_dtypes=[mx.float32],
        grid=(64, 1, 1), threadgroup=(64, 1, 1), mode="check",
    )  # fmt: skip
    run(INDEX + "y[i] = i < 60 ? h[i] : 0.0f;", inputs={"h": h})
    with pytest.raises(metal_host.MetalError, match="uninitialised read .* buffer 'h' byte 240"):
        run(INDEX + "y[i] = h[i];", inputs={"h": h})


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_result_does_not_depend_on_the_order_of_threads(order):
    body = SHARED + "a[i] = x[i];" + SYNC + "y[i] = simd_sum(a[63 - i]);"
    y, _ = run(body, order=order, seed=3)
    assert np.array_equal(y, np.repeat([np.arange(32, 64).sum(), np.arange(32).sum()], 32))


def captured(body, *, size=64, header="", grid=64, group=64, inputs=None, dtype=mx.float32):
    inputs = {"x": mx.ones((size,), dtype)} if inputs is None else inputs
    kernel = mx.fast.metal_kernel(
        name="limits", input_names=list(inputs), output_names=["y"], source=body, header=header
    )
    (launch,) = metal_host.launches(
        lambda *arrays: kernel(
            inputs=list(arrays),
            output_shapes=[(64,)],
            output_dtypes=[dtype],
            grid=(grid, 1, 1),
            threadgroup=(group, 1, 1),
        ),
        *inputs.values(),
    )
    return launch


FIRST = "inline float first(const device float* p) { return p[0]; }"
LIMITS = {
    "double": (dict(body=INDEX + "double z = 1; y[i] = z;"), "not in MSL"),
    "no address space": (
        dict(body=INDEX + "y[i] = f(x);", header="inline float f(const float* p) { return 1; }"),
        "without an address space",
    ),
    "cast to another address space": (
        dict(body=SHARED + "a[i] = x[i];\ndevice float* p = (device float*)a; y[i] = p[i];"),
        "cast to another address space at kernel.metal:8",
    ),
    "seven elements lie in constant": (
        dict(body=INDEX + "y[i] = first(x);", header=FIRST, size=7),
        "no matching function for call to 'first'",
    ),
    "float to bfloat": (dict(body=INDEX + "y[i] = 1.0f;", dtype=mx.bfloat16), "bfloat"),
    "recursion": (
        dict(
            body=INDEX + "y[i] = f(3);",
            header="inline float f(int n) { return n < 1 ? 1.0f : f(n - 1); }",
        ),
        "recursion: f",
    ),
    "2048 threads": (dict(body=INDEX + "y[i] = x[i];", grid=4096, group=2048), "2048 threads"),
    "32 buffers": (
        dict(body=INDEX + "y[i] = x0[i];", inputs={f"x{k}": mx.ones((64,)) for k in range(31)}),
        "32 buffers, the limit is 31",
    ),
    "36000 bytes": (
        dict(body=INDEX + "threadgroup float a[9000]; a[i] = x[i]; y[i] = a[i];"),
        "36000 bytes of threadgroup memory",
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_static_limit(name):
    case, message = LIMITS[name]
    assert any(message in found for found in metal_host.limits(captured(**case)))


def test_static_limits_pass_what_is_right():
    assert metal_host.limits(captured(INDEX + "y[i] = first(x);", header=FIRST)) == []
    body = SHARED + "a[i] = x[i];" + SYNC + "y[i] = simd_sum(a[i]);"
    assert metal_host.limits(captured(body)) == []


def test_counters():
    body = (
        SHARED
        + "float s = x[i] + x[i / 32 * 32];\n"  # 64 floats, and one of each simdgroup
        + "for (int k = 0; k < 2; ++k) { s += x[2 * (i % 32) + k]; }\n"  # every second float, twice
        + "a[i] = s;"
        + SYNC
        + "y[i] = simd_sum(a[63 - i]);"
    )
    _, stats = run(body, count=True)
    assert (stats.groups, stats.threads, stats.simd_ops, stats.barriers) == (1, 64, 2, 1)
    assert stats.threadgroup_bytes == 256
    x, y = stats.buffers["x"], stats.buffers["y"]
    # by simdgroup: 128 bytes, 4 bytes, and 32 floats over two lines, two times
    assert (x.loads, x.bytes, x.lines) == (2 * 4, 2 * (128 + 4 + 2 * 128), 2 * (1 + 1 + 2 * 2))
    assert (x.distinct, x.stored) == (256, 0)
    assert (y.loads, y.stored) == (0, 256)


def test_loads_apart_count_each():
    """A byte that a simdgroup loads again, after a sync or at another place, is loaded again."""
    again = INDEX + "float s = x[0];\n s += simd_sum(s) + x[0]; y[i] = s + x[i % 2];"
    _, stats = run(again, count=True, grid=32, size=32, group=32)
    assert stats.buffers["x"].bytes in (4 + 4 + 8, 4 + 8)  # the compiler may keep x[0]
    assert stats.buffers["x"].distinct == 8


def test_half_precision_rounds_every_operation():
    header = "template <typename T> T twice(T a, T b) { return a * b + a; }"
    for dtype in (mx.float16, mx.bfloat16):
        a = mx.array(np.linspace(0.1, 3, 64).astype(np.float32)).astype(dtype)
        kernel = metal_host.MetalKernel(
            name="rounding", input_names=["a", "b"], output_names=["y"],
            source=INDEX + "y[i] = twice(a[i], b[i]);", header=header,
        )  # fmt: skip
        (y,) = kernel(
            inputs=[a, a[::-1]], output_shapes=[(64,)], output_dtypes=[dtype],
            grid=(64, 1, 1), threadgroup=(64, 1, 1),
        )  # fmt: skip
        assert mx.array_equal(y, a * a[::-1] + a)
