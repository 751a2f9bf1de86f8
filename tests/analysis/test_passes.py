"""Graphs of whole passes, and predicted times beside the times that people measured."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from blockffn_mlx import device
from blockffn_mlx.analysis.passes import (
    model_from_config,
    read_config,
    trace_layer,
    trace_pass,
    trace_passes,
)
from blockffn_mlx.cli.bench import main
from blockffn_mlx.kernels import normed
from blockffn_mlx.kernels.graph import Graph, trace
from blockffn_mlx.kernels.predict import CHIPS, launch_seconds, predict_pass, union_share

SHAPES = Path(__file__).parents[2] / "bench" / "shapes"
SPARSE, DENSE = (read_config(str(SHAPES / f"{name}-3b.json")) for name in ("blockffn", "llama"))

# Configs of the models that others measured; sizes from their published config.json.
QWEN3_8B = dict(
    model_type="qwen3", hidden_size=4096, num_hidden_layers=36, intermediate_size=12288,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936,
    tie_word_embeddings=False, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=40960,
)  # fmt: skip
LFM2 = dict(
    vocab_size=65536, hidden_size=2048, num_attention_heads=32, num_key_value_heads=8,
    max_position_embeddings=128000, norm_eps=1e-5, conv_bias=False, conv_L_cache=3, rope_theta=1e6,
)  # fmt: skip
LFM2_1B = LFM2 | dict(
    model_type="lfm2", num_hidden_layers=16, block_dim=2048, block_ff_dim=12288,
    block_multiple_of=256, block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=True,
    full_attn_idxs=[2, 5, 8, 10, 12, 14],
)  # fmt: skip
LFM2_8B = LFM2 | dict(
    model_type="lfm2_moe", intermediate_size=7168, moe_intermediate_size=1792, num_dense_layers=2,
    num_hidden_layers=24, num_experts=32, num_experts_per_tok=4, norm_topk_prob=True,
    use_expert_bias=True, full_attn_idxs=[2, 6, 10, 14, 18, 21],
)  # fmt: skip


def small(config: dict, layers: int) -> dict:
    return config | dict(num_hidden_layers=layers, hidden_size=256, vocab_size=512)


def gpu_seconds(chip: str, graph: Graph, active: float = 1.0) -> float:
    return sum(launch_seconds(CHIPS[chip], launch, active) for launch in graph.launches)


def decode(config: dict, bits: int | None = None, context: int = 200) -> Graph:
    return trace_passes(model_from_config(config, bits), 8, context).decode


def linear(rows: int, out: int, width: int, bits: int = 0, dtype: mx.Dtype = mx.bfloat16) -> Graph:
    x, weight = mx.zeros((rows, width), dtype), mx.zeros((out, width), dtype)
    if not bits:
        return trace(lambda x, w: x @ w.T, x, weight)
    packed = mx.quantize(weight, 64, bits)
    return trace(lambda x, *w: mx.quantized_matmul(x, *w, group_size=64, bits=bits), x, *packed)


def test_a_layer_of_llama_is_what_mlx_launches():
    graph = decode(small(DENSE, 4))
    at = [i for i, launch in enumerate(graph.launches) if launch.kind == "attention"]
    names = sorted(launch.name for launch in graph.launches[at[1] : at[2]])
    assert names == sorted(
        ["Attention", "Activation", *["Matmul"] * 7, *["rms_norm"] * 2, *["rope"] * 2]
        + [*["SliceUpdate"] * 2, *["Add"] * 2]
    )
    assert graph.launches_per_layer(4) == 17


@pytest.mark.parametrize(
    "bits, tokens, launches", [(None, 1, 8), (4, 1, 8), (8, 1, 8), (None, 8, 9), (4, 8, 9)]
)
def test_a_layer_of_ours_launches_as_little_as_it_can(bits, tokens, launches):
    """3 products, rotation, a cache write, attention, 2 kernels; for a chunk a copy."""
    model = model_from_config(small(SPARSE, 4) | dict(expert_size=32, num_experts=32), bits)
    passes = trace_passes(model, tokens, 200)
    assert passes.chunk.launches_per_layer(4) == launches


def test_views_cost_nothing_and_what_moves_data_is_a_copy():
    def names(function, *shapes):
        return [x.name for x in trace(function, *(mx.zeros(shape) for shape in shapes)).launches]

    assert names(lambda x: x.reshape(2, 3, 4).swapaxes(0, 1)[:, 1:], (6, 4)) == []
    assert names(lambda x: x.swapaxes(0, 1).reshape(-1), (6, 4)) == ["Copy"]
    assert names(lambda x: x.swapaxes(0, 1).reshape(-1), (1, 4)) == []
    assert names(lambda x: mx.split(x, 2, axis=1)[1].reshape(6, 2, 1), (6, 4)) == []
    assert names(lambda x: mx.split(x, 2, axis=1)[1].reshape(12), (6, 4)) == ["Copy"]
    assert names(lambda x, w: x @ w.T, (2, 4), (8, 4)) == ["Matmul"]
    assert names(lambda x, w: x @ w[:, ::2], (2, 4), (4, 6)) == ["Copy", "Matmul"]
    broadcast = trace(lambda x, y: x + y, mx.zeros((64, 8)), mx.zeros((8,)))
    assert broadcast.bytes() == 4 * (2 * 64 * 8 + 8)


def test_bytes_of_a_step_are_those_of_its_weights():
    model = model_from_config(DENSE)
    graph = trace_pass(model, model_cache := make_prompt_cache(model), 1, again=True)
    weights = 2 * 2_930_000_000
    assert graph.bytes() == pytest.approx(weights, rel=0.02)
    assert all(layer.keys.shape == (1, 4, 256, 128) for layer in model_cache)
    assert sum(2 * x.rows * x.weights for x in graph.launches) == pytest.approx(weights, rel=0.02)


def test_the_graph_leaves_the_model_and_its_weights_as_they_were():
    model = model_from_config(small(SPARSE, 2) | dict(expert_size=32, num_experts=16))
    before = model(mx.array([[1, 2, 3]]))
    trace_passes(model, 4, 300)
    assert mx.array_equal(model(mx.array([[1, 2, 3]])), before)


@pytest.mark.parametrize(
    "bits, limit, buffers", [(None, 40, 55), (None, 50, 37), (4, 40, 10), (4, 50, 8)]
)
def test_command_buffers_by_the_size_rule(bits, limit, buffers):
    """Counted before from the rule alone, with the weights' elements only."""
    assert decode(SPARSE, bits).command_buffers(10**6, limit) == pytest.approx(buffers, abs=1)


# (what, predicted seconds, measured seconds or their middle); the table of measurements with its
# sources is in docs/predictions.md.
def measured_on_apple(monkeypatch):
    gigabytes = 14336 * 4096 * 4.5 / 8 / 1e9
    yield (
        "gemv, M1",
        gpu_seconds("M1", linear(1, 384, 51868, dtype=mx.float32)),
        384 * 51868 * 4 / (0.9 * 66.7e9),
    )
    for rows, speed in ((1, 551), (2, 545), (3, 488), (4, 377), (6, 206), (8, 153)):
        packed = gpu_seconds("M5 Max", linear(rows, 4096, 14336, 4))
        yield f"4 bits, {rows} rows, M5 Max", packed, gigabytes / speed
    yield (
        "gemv wall, M5 Max",
        gpu_seconds("M5 Max", linear(1, 14336, 4096)),
        14336 * 4096 * 2 / 478e9,
    )
    yield "4-bit gemv, M5", gpu_seconds("M5", linear(1, 14336, 4096, 4)), 0.415e-3
    chain = trace(lambda x: [x := x + 1 for _ in range(3200)][-1], mx.zeros((8,)))
    yield "3,200 small kernels, M3 Ultra", gpu_seconds("M3 Ultra", chain), 8.8e-3
    chip = CHIPS["M4 Pro"]
    for name, config, bits, speed in (
        ("Qwen3-8B 8 bits", QWEN3_8B, 8, 28.1),
        ("LFM2.5-1.2B bf16", LFM2_1B, None, 100.7),
        ("LFM2.5-8B-A1B 8 bits", LFM2_8B, 8, 114),
    ):
        graph = decode(config, bits)
        yield f"{name}, M4 Pro", predict_pass(chip, graph, overlapped=True).seconds, 1 / speed
    for bits, share in ((4, 0.525), (None, 0.76)):  # of the gemv wall, a dense model
        graph = decode(DENSE, bits)
        cost = predict_pass(CHIPS["M5 Max"], graph, overlapped=True)
        yield f"dense decode, {bits or 16} bits, M5 Max", cost.seconds, cost.bytes / (share * 478e9)


# Whole passes of the 3B shapes through MLX's CUDA build, and the kernels by themselves. Our own are
# those of docs/passes.md, steps on an H200 and prompts on an H100: the host binds both. They were
# measured when norms still had launches of their own.
def measured_on_the_h100(monkeypatch):
    monkeypatch.setattr(normed, "MOST_TOKENS", 0)
    chip = CHIPS["H100"]
    for bits, milliseconds in ((None, 6.4), (4, 4.3)):
        cost = predict_pass(chip, decode(DENSE, bits), overlapped=True)
        yield f"llama decode, {bits or 16} bits", cost.seconds, milliseconds / 1e3
    model = model_from_config(DENSE)
    for tokens, milliseconds in ((128, 11), (512, 11), (2048, 27)):
        cost = predict_pass(chip, trace_pass(model, None, tokens))
        yield f"llama, prompt of {tokens}", cost.seconds, milliseconds / 1e3
    ours = model_from_config(SPARSE)
    cache = make_prompt_cache(ours)
    trace_pass(ours, cache, 64, logits=False)
    graph = trace_pass(ours, cache, 1, again=True)
    for what, milliseconds in (("decode", 3.62), ("a step waited for", 3.98)):
        cost = predict_pass(chip, graph, 0.125, overlapped=what == "decode")
        yield f"ours, {what}", cost.seconds, milliseconds / 1e3
    yield "ours, on the GPU", cost.gpu, 1.55e-3
    for experts, *times in ((16, 12.1, 12.3), (40, 20.5, 21.1), (128, 50.7, 51.9)):
        for tokens, microseconds in zip((1, 8), times, strict=True):
            cost = gpu_seconds("H100", trace_layer(tokens, 128, 128, 2048), experts / 128)
            yield f"{experts} experts, {tokens} tokens", cost, microseconds / 1e6


@pytest.mark.parametrize("rows", [measured_on_apple, measured_on_the_h100])
def test_predictions_come_within_a_quarter_of_what_was_measured(monkeypatch, rows):
    off = {name: predicted / measured - 1 for name, predicted, measured in rows(monkeypatch)}
    print({name: f"{error:+.0%}" for name, error in off.items()})
    assert all(abs(error) < 0.25 for error in off.values()), off


def test_shares_of_a_chunk_go_through_both_that_are_known():
    assert union_share(1, 0.875, 0.71) == pytest.approx(0.125)
    assert union_share(8, 0.875, 0.71) == pytest.approx(0.29)
    assert 0.29 < union_share(32, 0.875, 0.71) < 0.5
    assert union_share(8, 0.8, 0.8) == pytest.approx(0.2)


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["blockffn-bench", "predict", *arguments])
    status = main()
    return status, *capsys.readouterr()


def test_command(monkeypatch, capsys):
    models = [str(SHAPES / "blockffn-3b.json"), str(SHAPES / "llama-3b.json")]
    flags = ["--model", *models, "--q-bits", "4", "--model-chip", "m4-max"]
    status, out, _ = run(monkeypatch, capsys, *flags, "--json")
    document = json.loads(out)
    assert status == 0 and document["kind"] == "prediction"
    sparse, dense = (model["rows"][0] for model in document["models"])
    assert sparse["chip"] == "M4 Max" and sparse["pass"] == "decode"
    assert sparse["bytes"] < 0.4 * dense["bytes"] and sparse["seconds"] < dense["seconds"]
    assert [row["tokens"] for row in document["models"][0]["rows"]] == [1, 8, 512]
    status, out, _ = run(monkeypatch, capsys, *flags)
    assert status == 0 and out.startswith("PREDICTION, not a measurement")


def test_command_knows_the_demo(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "--model", "demo", "--json")
    assert status == 0 and json.loads(out)["models"][0]["num_layers"] == 10


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "demo", "--model-chip", "M9"], "no chip 'M9'"),
        (["--model", "./nowhere"], "nowhere"),
        (["--model", "demo", "--tokens", "0"], "positive"),
        (["--model", "demo", "--tls", "0.5"], "--tls and --cls"),
    ],
)
def test_command_refuses_in_one_line(monkeypatch, capsys, flags, message):
    status, out, err = run(monkeypatch, capsys, *flags)
    assert status == 1 and not out
    assert message in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("bits", [None, 4])
def test_the_limits_save_most_commits_of_a_pass(bits):
    """Counted on the graph of a token through the 3B model, by MLX's own rule."""
    graph = decode(SPARSE, bits)
    limits = device.command_buffer_limits("Apple M4 Max", 64 << 30).values()
    before, after = graph.command_buffers(50, 50), graph.command_buffers(*limits)
    assert after <= 8 and (before >= 4 * after if bits is None else before >= 2 * after)
