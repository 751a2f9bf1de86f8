"""Every kernel's captured text compiles under the rules of each version of Metal."""

from dataclasses import replace
from functools import partial

import mlx.core as mx
import pytest

import metal_host
from blockffn_mlx.kernels import TILES, linear
from blockffn_mlx.quantisation import Format, Quantization
from helpers.kernel_variants import PACKINGS, variants

pytestmark = pytest.mark.skipif(metal_host.compiler() is None, reason=metal_host.NO_COMPILER)

EVERY = list(variants())
# every tile once, going round the dtypes and packings, and the kernels that have no tile
SAMPLE = [v for i, v in enumerate(EVERY) if not v.tile or i % 7 == i // 7 % len(PACKINGS)]
SAMPLE += {v.tile: v for v in EVERY if v.tile not in {s.tile for s in SAMPLE}}.values()


def all_refusals(variants, standards=metal_host.STANDARDS) -> list[str]:
    return [
        f"{variant} as {standard}: {line}"
        for variant in variants
        for standard in standards
        for line in metal_host.refusals(variant.launch(), standard)
    ]


def test_the_sample_has_every_tile_dtype_and_packing():
    for name in ("kernel", "dtype", "tile", "packing"):
        assert {getattr(v, name) for v in SAMPLE} == {getattr(v, name) for v in EVERY}


def test_sample_compiles():
    assert all_refusals(SAMPLE, ["metal4.1"]) == []
    assert all_refusals(SAMPLE[::5], ["c++14", "c++17", "c++20"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("standard", metal_host.STANDARDS)
def test_every_kernel_compiles(standard):
    assert all_refusals(EVERY, [standard]) == []


@pytest.mark.slow
@pytest.mark.parametrize("table", [t for t in TILES if t != "metal"])
def test_tiles_measured_on_other_machines_compile(table):
    assert all_refusals(variants(table), ["metal4.1", "c++14"]) == []


FAULTS = {
    # member functions and constructors without `thread`, as they were before macOS 27
    "metal4.1": (" const thread {", " const {"),
    # init statements came with C++17
    "c++14": (
        "const int ROWS = 8 * OCTETS,",
        "if (uint none = 0; none) {}\n  const int ROWS = 8 * OCTETS,",
    ),
    # a word of C++20
    "c++20": ("uint simdgroup, uint lane", "uint simdgroup, uint concept, uint lane"),
}


@pytest.mark.parametrize("standard", FAULTS)
def test_what_a_version_refuses_is_seen(standard):
    old, new = FAULTS[standard]
    for variant in [v for v in SAMPLE if v.kernel == "up" and not v.packing]:
        launch = variant.launch()
        assert old in launch.source
        faulty = replace(launch, source=launch.source.replace(old, new))
        assert metal_host.refusals(faulty, standard) != []


@pytest.mark.parametrize("joined", ["", "residual"])
@pytest.mark.parametrize("packing", [None, Quantization(64, 4, "affine")])
def test_a_linear_map_compiles(joined, packing):
    """Its list of experts is so short that it may lie in another address space."""
    form = Format(mx.bfloat16, packing)
    weight = mx.zeros((64, 128), mx.bfloat16)
    weights = [weight] if packing is None else list(mx.quantize(weight, 64, 4))
    for tokens in (1, 8, 17):
        x = mx.zeros((tokens, 128), mx.bfloat16)
        added = (mx.zeros((tokens, 64), mx.bfloat16), 0.5) if joined else ()
        launch = linear.arguments(tokens, 64, 128, form, joined=joined, backend="metal")
        mx.eval(x, weights, added[:1])
        (found,) = metal_host.launches(partial(linear.call, launch, x, weights, *added))
        there = found.source.replace("const device uint32_t* active", "const constant uint* active")
        assert there != found.source
        for source in (found.source, there):  # the second once the list has been computed
            for standard in ("metal4.1", "c++14"):
                assert metal_host.refusals(replace(found, source=source), standard) == []
