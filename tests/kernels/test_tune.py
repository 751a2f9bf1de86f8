"""Tiles measured on a machine: the fastest right ones are kept, and used from then on."""

import json

import mlx.core as mx
import pytest

import metal_host
from blockffn_mlx import device, kernels
from blockffn_mlx.cli.bench import main
from blockffn_mlx.kernels import tiles, tune

ON_GPU = device.gpu_backend() is not None
pytestmark = pytest.mark.skipif(
    ON_GPU or metal_host.compiler() is None, reason="measured in the harness, by a made-up clock"
)
SIZES = ["--hidden-size", "64", "--num-experts", "9", "--expert-size", "32"]


@pytest.fixture
def clock(monkeypatch):
    """Seconds by the tile's fields: 4 simdgroups and depth 2 are fastest."""

    def seconds(self, candidates):
        costs = {"octets": {1: 1.5}, "simdgroups": {4: 0.5, 8: 0.8, 16: 1}, "depth": {2: 0.7}}
        return [
            sum(
                costs.get(field, {}).get(value, 1.0)
                for tile in pair
                for field, value in tile._asdict().items()
            )
            for pair in candidates
        ]

    monkeypatch.setattr(tune.Bench, "seconds", seconds)


def run(capsys, monkeypatch, *flags) -> str:
    monkeypatch.setattr("sys.argv", ["blockffn-bench", "kernels", "--tune", *SIZES, *flags])
    kernels.build_kernel.cache_clear()
    with metal_host.harness():
        status = main()
    kernels.build_kernel.cache_clear()
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def test_the_fastest_tiles_are_kept(clock, capsys, monkeypatch):
    default = tiles.choose_tiles(8, "metal", mx.float16, None)
    document = json.loads(run(capsys, monkeypatch, "--tokens", "8", "--dtype", "float16", "--json"))
    (row,) = document["rows"]
    assert row["before"]["up"] == list(default.up) and row["after"]["up"][2:5] == [2, 4, 2]
    assert row["after_us"] < row["before_us"] and row["tried"] > 10 and row["wrong"] == []
    tiles.tuned_tables.cache_clear()  # as at the next start
    chosen = tiles.choose_tiles(8, "metal", mx.float16, None)
    assert chosen.up[2:5] == chosen.down[2:5] == (2, 4, 2)
    other_lengths = [t for t in tiles.TILES["metal"] if t.up.tokens != 8]
    assert all(t in tiles.tile_table("metal", mx.float16, None) for t in other_lengths)
    assert tiles.choose_tiles(8, "metal", mx.bfloat16, None) == default


def test_a_wrong_tile_is_left_out(clock, capsys, monkeypatch):
    """However fast it is."""
    original = kernels.Call.__call__

    def spoiled(call, *inputs):
        wrong = dict(call.template).get("SIMDGROUPS") == 4
        return [y + wrong for y in original(call, *inputs)]

    monkeypatch.setattr(kernels.Call, "__call__", spoiled)
    out = run(capsys, monkeypatch, "--tokens", "8", "--dtype", "float32")
    assert "left out: up (8, " in out and "wrong results" in out
    assert tiles.choose_tiles(8, "metal", mx.float32, None).up.simdgroups == 8


def test_every_neighbour_stays_inside_the_limits():
    for table in tiles.TILES.values():
        for pair in table:
            for tile in pair:
                for field in tune.VALUES:
                    for other in tune.neighbours(tile, field, "metal", mx.float16):
                        assert 32 * other.simdgroups <= 1024
                        partials = other.simdgroups * other.tokens * (8 * other.octets + 4)
                        assert 4 * partials + 1024 <= 32768


@pytest.mark.parametrize("damage", ["", "[]", '{"metal float16 plain": [[1]]}', "{}"])
def test_a_damaged_table_is_none(damage):
    table = tiles.TILES["metal"]
    tiles.keep_table("metal", mx.float16, None, table)
    assert tiles.tuned_tables()
    tiles._tuned_file().write_text(damage)
    tiles.tuned_tables.cache_clear()
    assert tiles.tuned_tables() == {}
    assert tiles.tile_table("metal", mx.float16, None) == table


def test_without_a_gpu_nothing_is_tuned(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["blockffn-bench", "kernels", "--tune"])
    assert main() == 1
    assert "no GPU here" in capsys.readouterr().err
