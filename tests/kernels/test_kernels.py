"""The kernels against float64: on Metal or CUDA where there is one, else in the Metal harness."""

import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import blockffn_mlx as bf
import metal_host
from blockffn_mlx import device, kernels
from blockffn_mlx.analysis import doctor
from blockffn_mlx.analysis.sparsity import sparsity_of_scores
from blockffn_mlx.checkpoints.load import DEMO_FOLDER, load
from blockffn_mlx.ffn import make_plan, plan
from blockffn_mlx.kernels import probe, projection
from blockffn_mlx.models.activation import record_router_scores
from blockffn_mlx.quantisation import expert_weights
from helpers.demo_text import PASSAGE, greedy
from helpers.ffn_cases import TOLERANCE, UNIONS, Case, float64, relative_error
from helpers.kernel_runs import (
    BACKEND,
    ON_GPU,
    check,
    in_harness,
    needs_gpu_or_compiler,
    result,
    running,
)
from helpers.models import TINY

pytestmark = needs_gpu_or_compiler

TOKENS = (1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 64)
EXPERTS = (1, 9, 40, 56, 128, 180, 256)
EXPERT_SIZES = (32, 64, 96, 128)
HIDDEN_SIZES = (64, 96, 128, 192, 256, 320, 512, 1024, 2048)
PACKINGS = ((0, 64), *itertools.product((4, 8), (32, 64, 128)))  # bits, group size


def sample(count_of_each: int, most_work: float, seed: int) -> list[Case]:
    """Every number of tokens with every dtype and packing, the rest drawn at random.

    most_work: of tokens x experts x expert size x hidden size, since the harness is slow.
    """
    rng = np.random.default_rng(seed)
    cases = []
    for tokens, dtype, packing in itertools.product(TOKENS, TOLERANCE, PACKINGS):
        for _ in range(count_of_each):
            while True:
                experts, size, hidden = (
                    int(rng.choice(c)) for c in (EXPERTS, EXPERT_SIZES, HIDDEN_SIZES)
                )
                if tokens * experts * size * hidden < most_work:
                    break
            union, act = str(rng.choice(UNIONS)), str(rng.choice(["silu", "relu"]))
            sizes = (tokens, experts, size, hidden)
            cases.append(Case(*sizes, dtype, union, act, *packing, seed=len(cases)))
    return cases


MATRIX = sample(1, 3e7, seed=20)
# For every run of the tests: each number of tokens once, going round the dtypes and packings.
KINDS = len(TOLERANCE) * len(PACKINGS)
SMALL = sample(1, 3e6, seed=21)
QUICK = [SMALL[KINDS * i + 8 * i % KINDS] for i in range(len(TOKENS))]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_matches_float64(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_matrix_matches_float64(case):
    check(case)


@pytest.mark.parametrize("union", UNIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_unions(union, dtype):
    """Empty, single, partial and full unions, and values that overflow beside active experts."""
    check(Case(5, 40, 32, 64, dtype, union))


@pytest.mark.parametrize("size", [(32, 2048), (128, 1024)], ids=str)
def test_large_sizes(size):
    check(Case(3, 16, *size, mx.bfloat16, "partial"))
    check(Case(9, 4, *size, mx.float32, "full", act="relu"))


@pytest.mark.parametrize("where", ["x", "scores", "up", "down"])
@pytest.mark.parametrize("case", [Case(3, 9, 32, 64), Case(9, 9, 32, 64, act="relu")], ids=str)
def test_nan_makes_nan(case, where):
    """Where the dense path has NaN, and nowhere else."""
    operands = dict(zip(("x", "scores", "up", "down"), case.operands()[:4], strict=True))
    token, expert = 1, 4
    operands["scores"][token, expert] = 1
    place = (token, 5 if where == "x" else expert) if where in ("x", "scores") else (expert, 3, 7)
    operands[where][place] = mx.nan
    expected = bf.ffn.chunk_union_ffn(*operands.values(), act=case.act, backend="dense")
    with running():
        out = result(case, operands.values())
    assert mx.isnan(expected).any()
    assert mx.array_equal(mx.isnan(out), mx.isnan(expected))


@pytest.mark.parametrize("width", [96, 512])  # no multiple of a window, and several
@pytest.mark.parametrize("tile", [(16, 2, 2, 1), (32, 4, 1, 2), (64, 2, 2, 1)], ids=str)
@pytest.mark.parametrize("name", [name for name, k in kernels.KERNELS.items() if k.can_stage])
def test_staged_tokens(name, tile, width):
    """CUDA's way for packed weights, at sizes that fit into Metal's threadgroup memory."""
    tokens, octets, simdgroups, depth = tile
    packing = (8, 32) if tokens == 64 else (4, 64 if width == 512 else 32)
    tile = kernels.Tile(tokens, True, octets, simdgroups, depth, staged=True)
    kernel, dtype = kernels.KERNELS[name], mx.float16 if depth == 2 else mx.bfloat16
    sample = kernel.sample(kernels.random_layer(tokens - 3, 9, 64, width, 5, dtype, packing))
    with running("check") as runs:
        found = kernel.launch(*sample.operands, **sample.settings, backend=BACKEND, tile=tile)
        found = kernel.written(sample, *(found if isinstance(found, tuple) else (found,)))
        mx.eval(found)
    assert ON_GPU or runs[-1].launch.grid  # PLACE
    assert ON_GPU or "StagedTokens" in runs[-1].launch.source
    assert probe.agree(found, kernel.exact(sample), dtype)


@pytest.mark.parametrize("packing", doctor.PACKINGS.values(), ids=doctor.PACKINGS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", kernels.KERNELS)
def test_every_kernel_matches_its_twin(name, dtype, packing):
    """At sizes that are no multiple of a tile: 13 tokens, 11 active experts of 37."""
    kernel = kernels.KERNELS[name]
    if packing[0] and not kernel.projection:
        pytest.skip("takes no weights")
    sample = kernel.sample(kernels.random_layer(13, 37, 96, 160, 11, dtype, packing))
    with running("check") as runs:
        found = kernel.run(sample, BACKEND)
        mx.eval(found)
    assert doctor.relative_error(found, kernel.run(sample.widened())) < TOLERANCE[dtype]
    # these leave room for all tokens unwritten
    whole = name not in ("up", "place", "grouped_up", "grouped_norm_up")
    assert ON_GPU or not whole or runs[-1].counters.unwritten == 0


@pytest.mark.parametrize("experts", [1, 3, 40, 180, 256])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_route_finds_the_same_experts(dtype, experts):
    logits = mx.random.normal((5, experts)).astype(dtype)
    logits[2] = -1  # a token without any expert
    weight = mx.random.normal((experts,)).astype(dtype)  # of either sign
    with running("check"):
        scores = kernels.route.launch(logits, weight, eps=1e-5, backend=BACKEND)
        mx.eval(scores)
    expected = kernels.route.twin(logits, weight, eps=1e-5)
    assert not mx.any(scores[2])
    assert mx.array_equal(scores != 0, expected != 0)
    limit = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 1e-2}[dtype]
    assert mx.abs(scores - expected).max() <= limit * mx.abs(expected).max()


# one case for each tile size, plain and packed, all dtypes
CHECKED = [
    Case(1, 40, 32, 96, mx.float32, "partial"),
    Case(2, 9, 32, 64, mx.bfloat16, "overflow"),
    Case(3, 9, 64, 128, mx.float16, "full", bits=4, group_size=32),
    Case(8, 9, 32, 64, mx.bfloat16, "partial", act="relu"),
    Case(9, 9, 32, 160, mx.float32, "full"),
    Case(17, 9, 64, 64, mx.bfloat16, "partial", bits=8, group_size=64),
    Case(33, 9, 32, 64, mx.float16, "overflow"),
    Case(5, 1, 32, 64, mx.float32, "empty"),
]


@in_harness
@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_every_access_is_sound_and_metal_would_take_the_source(case):
    """No access outside a buffer, no race, no read of what nothing wrote, whatever the order."""
    runs = check(case, "check", order="shuffled", seed=case.tokens, poison=0x7F)
    assert runs[-1].counters.unwritten == 0  # of y; scratch may stay partly unwritten
    for run in runs:
        assert metal_host.limits(run.launch) == []
        assert run.counters.threadgroup_bytes <= 32768


@in_harness
@pytest.mark.parametrize("case", CHECKED[:5:4], ids=str)
def test_threadgroups_that_take_several_tiles(case, monkeypatch):
    """With more tiles than threadgroups, each one uses its scratch again."""
    monkeypatch.setattr(projection, "max_threads", lambda backend: 3 * 256)
    plan.forget()
    runs = check(case, "check", order="shuffled")
    assert runs[0].counters.threads <= 3 * 256


@in_harness
@pytest.mark.parametrize("case", CHECKED[1:6:2], ids=str)
def test_result_does_not_depend_on_the_order_of_threads(case):
    *operands, _ = case.operands()
    outputs = []
    for order in ("forward", "backward"):
        with running(order=order):
            outputs.append(result(case, operands))
    assert mx.array_equal(*outputs)


def weight_bytes(case: Case, weights) -> int:
    """Bytes of the experts that are active, in all parts of a projection."""
    active = int(float64(case.operands()[1]).any(0).sum())
    parts = [weights] if isinstance(weights, mx.array) else weights
    return sum(p.nbytes for p in parts) * active // case.experts


@in_harness
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_weights_are_loaded_once(tokens, bits):
    case = Case(tokens, 24, 64, 128, mx.bfloat16, "partial", bits=bits)
    _, _, up, down, _ = case.operands()
    runs = {name: [] for name in ("up", "down")}
    for run in check(case, "check", count=True):
        for name in runs:
            if name in run.name:
                runs[name] += [run.counters.buffers.get(b) for b in ("weight", "scales", "biases")]
    for name, weights in (("up", up), ("down", down)):
        parts = [t for t in runs[name] if t]
        active = weight_bytes(case, weights)
        assert sum(t.distinct for t in parts) == active
        assert sum(t.bytes for t in parts) <= 1.05 * active
        # a line that is touched is taken whole, by this load and at most one beside it
        assert 128 * parts[0].lines <= 2 * parts[0].bytes


# Relative error (norm) of the logits; in bfloat16 every layer rounds, and so did the original.
GOLDEN = {"gqa_block": 1e-5, "mla_linear": 1e-5, "gqa_bf16_sharded": 2e-2}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_model(golden, monkeypatch, name):
    """The original code's logits, with every feed-forward layer in the kernels."""
    model, _, expected = golden(name)
    ids = mx.array(expected["input_ids"][:1])
    monkeypatch.setattr(device, "kernel_backend", lambda: BACKEND)
    monkeypatch.setattr(probe, "works", lambda *_, **__: True)
    with running() as runs:
        logits = model(ids)
        mx.eval(logits)
    assert ON_GPU or {run.name for run in runs} and len(runs) == 3 * len(model.layers)
    error = relative_error(logits, expected["logits"][:1].astype(np.float64))
    assert error < GOLDEN[name]


@pytest.mark.parametrize("packing", doctor.PACKINGS.values(), ids=doctor.PACKINGS)
@pytest.mark.parametrize("tokens", [1, 13])
def test_a_linear_map_is_the_projection_of_one_expert(tokens, packing):
    layer = kernels.random_layer(tokens, 8, 96, 160, 8, mx.float32, packing)
    expected = float64(layer.x) @ float64(layer.up.plain()[0]).T
    with running():
        for joined, added, right in (
            ("", (), expected),
            ("residual", (mx.ones((tokens, 96)), 0.5), 1 + 0.5 * expected),
        ):
            launch = kernels.linear.arguments(
                tokens, 96, 160, layer.up.format, joined=joined, backend=BACKEND
            )
            found = kernels.linear.call(launch, layer.x, [a[0] for a in layer.up.arrays], *added)
            assert relative_error(found, right) < TOLERANCE[mx.float32]


def test_the_demo_is_the_same_through_kernels_and_operations():
    """Packed weights: sparsity within 0.1 points, greedy tokens up to the first near-tie."""
    model, tokenizer = load(DEMO_FOLDER)
    model.set_dtype(mx.float32)
    text = [tokenizer.bos_token_id, *tokenizer.encode(PASSAGE, add_special_tokens=False)]

    def sparsity_and_tokens(backend: str) -> tuple[np.ndarray, list[int], int]:
        for layer in model.layers:
            layer.mlp.backend = backend
        cache = model.make_cache()
        with record_router_scores(model) as recorded:
            for begin in range(0, 48, 16):
                mx.eval(model(mx.array([text[begin : begin + 16]]), cache))
        result = sparsity_of_scores([mx.concatenate(p, axis=1) for p in recorded])
        return np.array([result.tls, result.cls]), *greedy(model, text[:11], 12)

    expected, expected_tokens, sure = sparsity_and_tokens("ops")
    with running() as runs:
        found, tokens, _ = sparsity_and_tokens(BACKEND)
    assert ON_GPU or len(runs) >= 3 * len(model.layers) * (3 + 12)
    # A score that rounds to 0 in one of them only is 4e-5 of TLS.
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert tokens[:sure] == expected_tokens[:sure] and sure > 4


def test_negative_router_norm_weights(monkeypatch):
    """They make the scores of active experts negative: active all the same."""
    sizes = dict(hidden_size=64, num_experts=9, expert_size=32)
    layer = bf.ffn.BlockFFN(bf.ModelArgs(**{**TINY, **sizes}))
    layer.router_norm.weight = mx.where(mx.arange(9) % 2 == 0, -1.5, 0.5)
    layer.eval()
    x = mx.random.normal((1, 5, 64))
    scores = layer.scores(x)
    assert (scores < 0).any().item() and (scores > 0).any().item()
    monkeypatch.setattr(device, "kernel_backend", lambda: None)
    expected = layer(x)
    monkeypatch.setattr(device, "kernel_backend", lambda: BACKEND)
    monkeypatch.setattr(probe, "works", lambda *_, **__: True)
    with running():
        out = layer(x)
        mx.eval(out)
    assert relative_error(out, float64(expected)) < TOLERANCE[mx.float32]


def test_environment_turns_kernels_off(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    for value, expected in ((None, "metal"), ("ops", None)):
        device.kernels_turned_off.cache_clear()
        monkeypatch.delenv("BLOCKFFN_KERNELS", raising=False)
        if value:
            monkeypatch.setenv("BLOCKFFN_KERNELS", value)
        assert device.kernel_backend() == kernels.available_backend() == expected
    device.kernels_turned_off.cache_clear()
    monkeypatch.setenv("BLOCKFFN_KERNELS", "off")
    with pytest.warns(UserWarning, match="BLOCKFFN_KERNELS=off changes nothing: write ops"):
        assert device.kernel_backend() == "metal"
    device.kernels_turned_off.cache_clear()


COVERED_LAYER = dict(hidden_size=64, num_experts=9, expert_size=32)
COVERED = Case(5, 9, 32, 64)
NOT_COVERED = {
    "257 experts": replace(COVERED, experts=257),
    "expert size": replace(COVERED, expert_size=40),
    "hidden size": replace(COVERED, hidden_size=72),
    "bits": replace(COVERED, bits=2, group_size=32),
}


@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_the_kernels_do_not_cover_goes_to_plain_operations(name, monkeypatch):
    monkeypatch.setattr(device, "kernel_backend", lambda: "metal")
    x, scores, up, down, _ = NOT_COVERED[name].operands()
    weights = [expert_weights(up, x.shape[1]), expert_weights(down, NOT_COVERED[name].expert_size)]
    sizes = kernels.Sizes.of(x, *weights)
    assert not kernels.covers(sizes) and kernels.covers(covered_sizes())
    assert make_plan(sizes, "silu").up is None and make_plan(covered_sizes(), "silu").up
    out = bf.ffn.chunk_union_ffn(x, scores, up, down)
    expected = bf.ffn.chunk_union_ffn(x, scores, up, down, backend="dense")
    assert relative_error(out, float64(expected)) < TOLERANCE[mx.float32]
    with pytest.raises(ValueError, match="the kernels take"):
        bf.ffn.chunk_union_ffn(x, scores, up, down, backend="metal")


def covered_sizes() -> kernels.Sizes:
    x, _, up, down, _ = COVERED.operands()
    return kernels.Sizes.of(x, expert_weights(up, 64), expert_weights(down, 32))


def test_a_batch_takes_the_kernels(monkeypatch):
    """Up to 64 tokens over all sequences, and the observer still sees [B, T, E]."""
    layer = bf.ffn.BlockFFN(bf.ModelArgs(**{**TINY, **COVERED_LAYER})).eval()
    x, seen = mx.random.normal((3, 5, 64)), []
    monkeypatch.setattr(device, "kernel_backend", lambda: None)
    expected = layer(x)
    monkeypatch.setattr(device, "kernel_backend", lambda: BACKEND)
    monkeypatch.setattr(probe, "works", lambda *_, **__: True)
    layer.observer = lambda logits, scores: seen.append((logits.shape, scores.shape))
    with running() as runs:
        out = layer(x)
        mx.eval(out)
    assert ON_GPU or [run.name for run in runs] == [
        "blockffn_route",
        "blockffn_up",
        "blockffn_down",
    ]
    assert seen == [((3, 5, 9), (3, 5, 9))] and out.shape == x.shape
    assert relative_error(out, float64(expected)) < TOLERANCE[mx.float32]
