"""Prefill that groups tokens by expert, in plain operations and in kernels, against the oracle."""

import mlx.core as mx
import numpy as np
import pytest

from blockffn_mlx import ffn, kernels
from blockffn_mlx.ffn import grouped
from blockffn_mlx.kernels import KERNELS, grouped_tiles, place, random_layer
from blockffn_mlx.quantisation import Plain, quantized
from helpers.ffn_cases import TOLERANCE, Case, float64, relative_error
from helpers.kernel_runs import BACKEND, ON_GPU, needs_gpu_or_compiler, running

DTYPES = [mx.bfloat16] if mx.cuda.is_available() else list(TOLERANCE)


def layer(tokens: int, experts: int, size: int, hidden: int, density: float):
    key = mx.random.split(mx.random.key(tokens), 5)
    x = mx.random.normal((tokens, hidden), key=key[0])
    used = mx.random.uniform(shape=(tokens, experts), key=key[1]) < density
    scores = mx.where(used, mx.random.normal((tokens, experts), key=key[2]), 0)
    up = mx.random.normal((experts, size, hidden), key=key[3]) / hidden**0.5
    down = mx.random.normal((experts, hidden, size), key=key[4]) / size**0.5
    return x, scores, Plain(up), Plain(down)


def by_expert(operands, act="silu") -> mx.array:
    x, scores, up, down = operands
    loads = (scores != 0).sum(axis=0).tolist()
    return grouped.by_expert(x, scores, up.plain(), down.plain(), loads, act=act)


@pytest.mark.parametrize("act", ["silu", "relu"])
@pytest.mark.parametrize("tokens, experts, density", [(70, 9, 0.2), (65, 40, 0.05), (130, 1, 1.0)])
def test_grouped_matches_dense(tokens, experts, density, act):
    operands = layer(tokens, experts, 32, 96, density)
    out = by_expert(operands, act)
    expected = ffn.dense_ffn(*operands, act=act)
    assert mx.abs(out - expected).max() <= 1e-5 * mx.abs(expected).max()


def test_busy_experts_do_not_pad_the_others():
    """Loads of 96 and of about 5 tokens: a class each, and far fewer rows than 16 * 96."""
    x, scores, up, down = layer(96, 16, 32, 64, 0.05)
    scores[:, :3] = 1.0
    loads = (scores != 0).sum(axis=0).tolist()
    classes = grouped.load_classes(loads)
    assert len(classes) == grouped.NUM_CLASSES and sum(map(len, classes)) == sum(map(bool, loads))
    assert grouped.padded_rows(loads) <= 4 * 96 + 12 * 32
    out = by_expert((x, scores, up, down))
    expected = ffn.dense_ffn(x, scores, up, down)
    assert mx.abs(out - expected).max() <= 1e-5 * mx.abs(expected).max()


@pytest.mark.parametrize("bits", [None, 4])
def test_long_prompts_are_grouped_where_it_saves(monkeypatch, bits):
    """The layer takes the grouped path by itself, with packed weights too, else the dense one."""
    taken = []
    original = grouped.by_expert
    monkeypatch.setattr(grouped, "by_expert", lambda *a, **k: taken.append(1) or original(*a, **k))
    for density, times in ((0.1, 1), (0.9, 0)):
        x, scores, up, down = layer(512, 16, 32, 64, density)
        if bits:
            up, down = (quantized(w.weight, 32, bits) for w in (up, down))
        taken.clear()
        arrays = [w.arrays if bits else w.weight for w in (up, down)]
        out = ffn.chunk_union_ffn(x, scores, *arrays)
        expected = ffn.dense_ffn(x, scores, up, down)
        assert mx.abs(out - expected).max() <= 1e-5 * mx.abs(expected).max()
        assert len(taken) == times
    compiled = mx.compile(ffn.chunk_union_ffn)(x, scores, *arrays)
    assert mx.abs(compiled - expected).max() <= 1e-5 * mx.abs(expected).max()


def test_no_active_pair_gives_zeros():
    assert not mx.any(by_expert(layer(66, 4, 32, 64, 0.0)))


# How tokens are spread over experts: a share of all pairs, or what is special about some experts.
LOADS = ("none", "few", "half", "all", "one takes all", "only the last")


def spread(scores: np.ndarray, loads: str, rng) -> np.ndarray:
    """Scores [T, E] with some of them 0."""
    if loads == "only the last":
        return np.where(np.arange(scores.shape[1]) == scores.shape[1] - 1, scores, 0)
    share = {"none": 0, "few": 0.05, "half": 0.5, "all": 1}.get(loads, 0.1)
    kept = rng.random(scores.shape) < share
    if loads == "one takes all":
        kept[:, scores.shape[1] // 2] = True
    return np.where(kept, scores, 0)


def check(case: Case, loads: str, mode: str = "fast", **options):
    """The kernels' layer against float64."""
    case_scores = case.scores
    object.__setattr__(
        case, "scores", lambda rng: spread(case_scores(rng), loads, np.random.default_rng(7))
    )
    *operands, expected = case.operands()
    with running(mode, **options) as runs:
        x, scores, up, down = operands
        out = ffn.chunk_union_ffn(x, scores, up, down, act=case.act, backend=BACKEND)
        mx.eval(out)
    assert out.dtype == case.dtype and out.shape == x.shape
    silent = float64(scores).any(-1)
    assert not float64(out)[~silent].any()
    assert relative_error(out, expected) < TOLERANCE[case.dtype]
    assert ON_GPU or [run.name.split("_affine")[0] for run in runs] == [
        "blockffn_place", "blockffn_grouped_up", "blockffn_grouped_down",
    ]  # fmt: skip
    return runs


@needs_gpu_or_compiler
@pytest.mark.parametrize("case, loads", [
    (Case(65, 9, 32, 64, DTYPES[-1], union="full"), "none"),
    (Case(65, 33, 32, 96, DTYPES[0], union="full"), "few"),
    (Case(127, 5, 96, 160, DTYPES[-1], union="full", act="relu"), "half"),
    (Case(70, 3, 64, 64, DTYPES[-1], union="full", bits=4, group_size=32), "all"),
    (Case(140, 12, 32, 64, DTYPES[-1], union="full", bits=8), "one takes all"),
    (Case(66, 256, 32, 32, DTYPES[-1], union="full"), "only the last"),
], ids=str)  # fmt: skip
def test_kernels_match_the_oracle(case, loads):
    """Each is checked for races, and for reads of what nothing wrote."""
    check(case, loads, "check")


@needs_gpu_or_compiler
@pytest.mark.slow
@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, experts, size, hidden", [
    (65, 256, 32, 64), (127, 40, 96, 160), (512, 12, 64, 320), (1000, 7, 160, 96),
])  # fmt: skip
def test_kernels_match_the_oracle_everywhere(tokens, experts, size, hidden, dtype, bits, loads):
    case = Case(tokens, experts, size, hidden, dtype, "full", bits=bits, group_size=32)
    check(case, loads)


@needs_gpu_or_compiler
def test_an_overflow_beside_a_token_stays_there():
    """Weights that make every activation infinite, of an expert that one token alone uses."""
    case = Case(70, 8, 32, 64, DTYPES[-1], union="overflow")
    check(case, "all")


@needs_gpu_or_compiler
@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_lists_do_not_depend_on_the_order_of_threads(order):
    scores = KERNELS["place"].sample(random_layer(200, 40, 32, 32, 23, mx.float16)).operands[0]
    with running("check", order=order) if not ON_GPU else running():
        found = place.launch(scores, block=64, backend=BACKEND)
        mx.eval(found)
    expected = place.twin(scores, block=64)
    for a, b in zip(place.written(None, *found), expected, strict=True):
        assert mx.array_equal(a, b)


def test_tiles_fit_into_threadgroup_memory():
    for backend, table in grouped_tiles.GROUPED_TILES.items():
        assert [t.least for t in table] == sorted({t.least for t in table}, reverse=True)
        assert table[-1].least == 1
        for dtype in kernels.DTYPES:
            for bits in (None, 4, 8):
                packing = bits and quantized(mx.zeros((1, 32, 128)), 64, bits).format.packing
                for tiles in grouped_tiles.grouped_tiles(backend, dtype, packing):
                    for tile in (tiles.up, tiles.down):
                        assert tile.memory(dtype, packing) <= grouped_tiles.MEMORY[backend]
                        assert tile.tokens % (8 * tile.batch) == 0 and tile.stages >= 2
                    assert tiles.down.block % 32 == 0 and tiles.down.rows % 32 == 0
