"""Kernels are built in a thread before they are needed, and the process ends well."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

import metal_host
from blockffn_mlx import device, kernels
from blockffn_mlx.ffn import warm
from blockffn_mlx.ffn.warm import Warmup, lengths
from helpers.deco_models import tiny
from helpers.models import tiny_model

pytestmark = [
    pytest.mark.skipif(device.gpu_backend() is not None, reason="watched in the harness"),
    pytest.mark.skipif(metal_host.compiler() is None, reason=metal_host.NO_COMPILER),
]
TESTS = Path(__file__).parents[1]
SIZES = dict(hidden_size=64, expert_size=32, num_attention_heads=4)


@pytest.fixture
def on_metal(monkeypatch):
    monkeypatch.setattr(device, "kernel_backend", lambda: "metal")
    monkeypatch.setattr(kernels.probe, "works", lambda *_, **__: True)
    kernels.build_kernel.cache_clear()
    with metal_host.harness() as runs:
        yield runs
    kernels.build_kernel.cache_clear()


@pytest.mark.parametrize(
    ("make", "kernel"), [(tiny_model, "routed_up"), (tiny, "norm_up")], ids=["blockffn", "deco"]
)
def test_every_length_is_built(on_metal, make, kernel):
    model = make(**SIZES)
    mx.eval(model.parameters())
    warmup = Warmup(model, longest=8)
    warmup.start()
    warmup.join()
    assert warmup.lengths == [1, 2, 4, 8]
    assert f"blockffn_{kernel}" in {run.name for run in on_metal}
    instances = {run.launch.instance for run in on_metal}
    logits = model(mx.array([[3, 4, 5]]), model.make_cache())  # takes the tile of four tokens
    mx.eval(logits)
    assert {run.launch.instance for run in on_metal} == instances


def test_a_long_chunk_comes_last(on_metal, monkeypatch):
    model = tiny_model(**SIZES)
    monkeypatch.setattr(warm, "lengths", lambda *_: lengths(*_)[-1:])
    warmup = Warmup(model)
    warmup.run()
    assert warmup.lengths == [65]
    assert "blockffn_grouped_up" in {run.name for run in on_metal}


def test_it_stops_when_it_is_told(on_metal):
    warmup = Warmup(tiny_model(**SIZES))
    warmup._stopped.set()
    warmup.start()
    warmup.stop()
    assert warmup.lengths == [] and not warmup.is_alive() and not on_metal


@pytest.mark.parametrize("bits", [3, 6])
def test_nothing_is_done_for_weights_that_no_kernel_takes(monkeypatch, bits):
    model = tiny_model(**SIZES)
    model.set_dtype(mx.bfloat16)
    monkeypatch.setattr(device, "kernel_backend", lambda: "cuda")
    assert lengths(model, 65) == [1, 8, 16, 32, 64, 65]
    nn.quantize(model, 32, bits, class_predicate=lambda _, m: hasattr(m, "to_quantized"))
    assert lengths(model, 65) == []


def test_nothing_is_done_without_kernels():
    warmup = Warmup(tiny_model(**SIZES))
    warmup.start()
    warmup.join()
    assert warmup.lengths == []


AT_THE_END = """
import metal_host
from blockffn_mlx import device
from blockffn_mlx.ffn.warm import Warmup
from blockffn_mlx.kernels import probe, verdicts
from helpers.models import tiny_model
from pathlib import Path
import sys
verdicts.folder = lambda: Path(sys.argv[1])
probe.SIZES = (9, 32, 64, 5)
device.kernel_backend = lambda: "metal"
with metal_host.harness():
    warmup = Warmup(tiny_model(hidden_size=64, expert_size=32, num_attention_heads=4), longest=2)
    warmup.start()
    warmup.join()
assert warmup.lengths == [1, 2]
"""


def test_the_process_ends_well_after_it(tmp_path):
    """With the probe of the classes in the same thread."""
    command = [sys.executable, "-c", AT_THE_END, str(tmp_path)]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
