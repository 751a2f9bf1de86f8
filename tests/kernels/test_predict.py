"""What `bench kernels` predicts: byte counts are the kernels' own, chips are found by name."""

import json

import mlx.core as mx
import pytest

import metal_host
from blockffn_mlx import kernels
from blockffn_mlx.analysis.passes import trace_layer
from blockffn_mlx.cli.bench import main
from blockffn_mlx.ffn import chunk_union_ffn
from blockffn_mlx.kernels.predict import CHIPS, find_chip
from helpers.ffn_cases import Case, float64


@pytest.mark.skipif(metal_host.compiler() is None, reason=metal_host.NO_COMPILER)
@pytest.mark.parametrize("tokens", [1, 8, 17])
@pytest.mark.parametrize("bits", [0, 4])
def test_bytes_are_those_that_the_kernels_move(tokens, bits):
    case = Case(tokens, 24, 64, 256, mx.bfloat16, "partial", bits=bits, group_size=64)
    x, scores, up, down, _ = case.operands()
    kernels.build_kernel.cache_clear()
    with metal_host.harness("check", count=True) as runs:
        chunk_union_ffn(x, scores, up, down, backend="metal")
    kernels.build_kernel.cache_clear()
    launches = trace_layer(tokens, 24, 64, 256, bits=bits).launches
    active = int(float64(scores).any(0).sum()) / 24
    for launch, run in zip(launches, runs, strict=True):
        assert launch.name in run.name and launch.kind == "experts"
        moved = sum(t.distinct + t.stored for t in run.counters.buffers.values())
        assert moved == pytest.approx(launch.bytes + active * launch.expert_bytes, rel=0.05)


def test_chips_are_found_as_people_write_them():
    for name in ("Apple M4 Max", "m4-max", "M4MAX", "M4 Max"):
        assert find_chip(name) == "M4 Max"
    assert find_chip("M3 Max 30-core") == "M3 Max 30-core"
    with pytest.raises(ValueError, match="M1, M1 Pro"):
        find_chip("M9")
    for family in range(1, 6):  # within a generation, more is more
        chips = [CHIPS[c] for c in CHIPS if c.startswith(f"M{family}")]
        for name in ("published", "bandwidth", "teraflops"):
            values = [getattr(chip, name) for chip in chips]
            assert values == sorted(values)
        assert all(0.5 < chip.bandwidth / chip.published < 1 for chip in chips)


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["blockffn-bench", "kernels", *arguments])
    status = main()
    return status, *capsys.readouterr()


def test_command_labels_a_prediction(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "--model-chip", "M2 Ultra", "--tokens", "4")
    assert status == 0 and out.startswith("PREDICTION, not a measurement: M2 Ultra")
    assert "dense" in out


def test_command_json(monkeypatch, capsys, tmp_path):
    sizes = dict(hidden_size=64, expert_size=32, num_experts=8, num_hidden_layers=3)
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    flags = ["--model-chip", "m1", "--model", str(tmp_path), "--active", "0.5", "--json"]
    status, out, _ = run(monkeypatch, capsys, *flags)
    document = json.loads(out)
    assert status == 0 and document["kind"] == "prediction" and document["num_layers"] == 3
    assert [(r["tokens"], r["active"]) for r in document["rows"]] == [(1, 4), (8, 4), (32, 4)]


def test_command_knows_the_demo(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "--model-chip", "m4", "--model", "demo", "--json")
    assert status == 0 and json.loads(out)["num_layers"] == 10


def test_command_measures_here(monkeypatch, capsys):
    sizes = ["--hidden-size", "64", "--expert-size", "32", "--num-experts", "8"]
    flags = [*sizes, "--tokens", "2", "--dtype", "float32", "--json"]
    status, out, _ = run(monkeypatch, capsys, *flags)
    document = json.loads(out)
    assert status == 0 and document["kind"] == "measurement"
    assert all(row["ratio"] > 0 for row in document["rows"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model-chip", "M9"], "no chip 'M9'"),
        (["--model-chip", "M1", "--active", "1.5"], "--active takes shares"),
        (["--model-chip", "M1", "--tokens", "0"], "positive"),
        (["--model-chip", "M1", "--model", "nowhere"], "give a converted folder, or demo"),
    ],
)
def test_command_refuses_in_one_line(monkeypatch, capsys, flags, message):
    status, out, err = run(monkeypatch, capsys, *flags)
    assert status == 1 and not out
    assert message in err and len(err.strip().splitlines()) == 1
