"""The sizes at which a kernel goes another way, and the tiles that other machines take."""

import mlx.core as mx
import pytest

import metal_host.run
from blockffn_mlx import kernels
from blockffn_mlx.analysis import doctor
from blockffn_mlx.kernels import KERNELS, TILES, random_layer
from helpers.ffn_cases import TOLERANCE, Case
from helpers.kernel_runs import BACKEND, check, in_harness, needs_gpu_or_compiler, running

pytestmark = needs_gpu_or_compiler


@pytest.mark.parametrize("case", [
    Case(3, 33, 32, 64, union="full"),
    Case(9, 65, 32, 64, mx.float16),
    Case(40, 129, 32, 64, mx.bfloat16),  # more words of the union than simdgroups
    Case(64, 256, 32, 32, union="single"),
], ids=str)  # fmt: skip
def test_unions_of_many_words(case):
    """A word holds 32 experts; simdgroups share words and tokens in several ways."""
    check(case)


@pytest.mark.parametrize("tokens", [1, 8, 33, 64])
@pytest.mark.parametrize("experts", [1, 32, 33, 65, 129, 256])
def test_the_list_of_the_union(tokens, experts):
    """Every single token can add an expert to it, and every expert can be the only one."""
    layer = random_layer(tokens, experts, 32, 64, 0, mx.bfloat16)
    token, expert = mx.arange(experts) % tokens, mx.arange(experts)
    for used in (expert % 3 == 0, expert == experts - 1, expert == 0):
        scores = mx.zeros_like(layer.scores)
        scores[token, expert] = used.astype(scores.dtype)
        with running():
            _, active = KERNELS["up"].launch(layer.x, scores, layer.up, act="relu", backend=BACKEND)
            mx.eval(active)
        listed = [e for e in range(experts) if used[e].item()]
        assert active.tolist() == [len(listed), *listed, *[0] * (experts - len(listed))]


def test_a_single_threadgroup_leaves_the_list():
    """As many rows as one tile has, of the only expert."""
    layer = random_layer(3, 1, 32, 64, 1, mx.bfloat16)
    tile = kernels.Tile(8, True, 4, 8, 1)
    with running():
        _, active = KERNELS["up"].launch(
            layer.x, layer.scores, layer.up, act="relu", backend=BACKEND, tile=tile
        )
        mx.eval(active)
    assert active.tolist() == [1, 0]


@in_harness
@pytest.mark.parametrize("tokens, packing", [(1, (0, 0)), (9, (4, 32))])
@pytest.mark.parametrize("name", KERNELS)
def test_no_load_leaves_its_array_even_where_its_value_is_not_used(name, tokens, packing):
    """What the optimiser of one compiler drops, that of another may execute."""
    kernel = KERNELS[name]
    if packing[0] and not kernel.projection:
        pytest.skip("takes no weights")
    # all experts active: the list is full
    sample = kernel.sample(random_layer(tokens, 9, 32, 64, 9, mx.bfloat16, packing))
    with running("literal"):
        mx.eval(kernel.run(sample, BACKEND))


def fitting(tile: kernels.Tile) -> kernels.Tile:
    """With as many simdgroups as a Mac's threadgroup memory has room for."""
    while 4 * tile.simdgroups * tile.tokens * (8 * tile.octets + 4) > 31 << 10:
        tile = tile._replace(simdgroups=tile.simdgroups // 2)
    return tile


# Depths of 2 and more, tokens on their way ahead, 4 octets: what no table of Metal's has yet.
FOREIGN = [
    (index, *pair)
    for index, pair in enumerate(
        dict.fromkeys(
            (name, fitting(tile))
            for table in TILES
            if table != "metal"
            for tiles in TILES[table]
            for name, tile in tiles._asdict().items()
        )
    )
]
DTYPES = list(TOLERANCE)
PACKINGS = list(doctor.PACKINGS.values())


@in_harness
@pytest.mark.parametrize("index, name, tile", FOREIGN)
def test_tiles_of_other_machines(index, name, tile, monkeypatch):
    """A tile that is measured to be faster on some chip has to be right already."""
    dtype, packing = DTYPES[index % 3], PACKINGS[index // 3 % 3]
    if tile.staged:  # for 16 bits, in as much threadgroup memory as an H100 has
        dtype = mx.bfloat16
        monkeypatch.setattr(metal_host.run, "THREADGROUP_MEMORY", 232448)
    tokens = max(1, tile.tokens - 1)
    layer = random_layer(tokens, 37, 96, 160, 11, dtype, packing)
    sample = KERNELS[name].sample(layer)
    here = sample._replace(settings={**sample.settings, "tile": tile})
    with running():
        found = KERNELS[name].run(here, BACKEND)
        mx.eval(found)
    assert doctor.relative_error(found, KERNELS[name].run(sample.widened())) < TOLERANCE[dtype]
