"""blockffn-doctor: says what runs here, and that wrong kernels are wrong."""

import json
import warnings
from dataclasses import replace

import mlx.core as mx
import pytest

import metal_host
from blockffn_mlx import device, kernels
from blockffn_mlx.analysis import doctor
from blockffn_mlx.cli import common
from blockffn_mlx.cli import doctor as command
from blockffn_mlx.kernels import grouped_tiles
from blockffn_mlx.kernels.probe import KernelWarning

ON_GPU = device.gpu_backend() is not None


@pytest.fixture(autouse=True)
def few_checks(monkeypatch):
    monkeypatch.setattr(doctor, "TOKENS", (1, 8))
    monkeypatch.setattr(doctor, "SIZES", (9, 32, 64, 4))
    monkeypatch.setattr(doctor, "seconds_per_call", lambda function, x: 1e-6)


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["blockffn-doctor", *arguments])
    status = command.main()
    return status, capsys.readouterr().out


def test_every_line_is_right_here(monkeypatch, capsys):
    status, out = run(monkeypatch, capsys)
    assert status == 0 and "WRONG" not in out and out.count("right") >= len(doctor.PACKINGS)
    if not ON_GPU:
        assert "No Metal code was run" in " ".join(out.split())


def test_json_is_one_document(monkeypatch, capsys):
    status, out = run(monkeypatch, capsys, "--json")
    document = json.loads(out)
    assert status == 0 and document["right"] is True
    assert document["mlx"] and document["device"] and document["memory_bytes"] > 2**30
    assert {row["weights"] for row in document["kernels"]} == set(doctor.PACKINGS)
    assert all(row["right"] and row["errors"]["8"] < 1e-2 for row in document["kernels"])


@pytest.mark.parametrize("fault", [1.001, float("nan")])
def test_a_wrong_result_is_status_1(monkeypatch, capsys, fault):
    right = doctor.layer_launch
    wrong = replace(doctor.LAYER, launch=lambda *a, **k: right(*a, **k) * fault)
    monkeypatch.setattr(doctor, "LAYER", wrong)
    monkeypatch.setattr(device, "gpu_backend", lambda: None)
    status, out = run(monkeypatch, capsys)
    assert status == 1 and "WRONG" in out


def test_a_kernel_that_does_not_build_is_status_1(monkeypatch, capsys):
    """Without Metal a Metal kernel cannot run: that is a verdict, not a traceback."""
    if mx.metal.is_available():
        pytest.skip("builds here")
    monkeypatch.setattr(device, "gpu_backend", lambda: "metal")
    status, out = run(monkeypatch, capsys)
    assert status == 1 and "WRONG" in out and "No Metal back-end" in out


@pytest.mark.skipif(ON_GPU, reason="the kernels run on this GPU")
@pytest.mark.skipif(metal_host.compiler() is None, reason=metal_host.NO_COMPILER)
@pytest.mark.parametrize("wrong", [None, *kernels.KERNELS])
def test_metal_kernels_in_the_harness(monkeypatch, wrong):
    """Every kernel in every tile class has its line, and a wrong one is found."""
    monkeypatch.setattr(doctor, "PACKINGS", {"plain": (0, 0), "4-bit": (4, 32)})
    monkeypatch.setattr(doctor, "TOLERANCE", {mx.float16: 2e-3})
    original = kernels.Call.__call__

    def spoiled(call, *inputs):
        outputs = original(call, *inputs)
        return [y + 0.5 * (call.kernel.name == wrong) for y in outputs]

    monkeypatch.setattr(kernels.Call, "__call__", spoiled)
    kernels.build_kernel.cache_clear()
    with metal_host.harness() as runs:
        verdicts = list(doctor.examine("metal"))
    kernels.build_kernel.cache_clear()
    assert runs and {v.kernel for v in verdicts} == set(kernels.KERNELS)
    for name, kernel in kernels.KERNELS.items():
        tokens = [v.tokens for v in verdicts if v.kernel == name]
        table = grouped_tiles.GROUPED_TILES if kernel.long else kernels.TILES
        assert len(tokens) == (2 * len(table["metal"]) if kernel.projection else 1)
    assert [v for v in verdicts if v.right != (v.kernel != wrong)] == []


def test_commands_say_in_one_line_what_happens_to_a_kernel(capsys):
    def command():
        warnings.warn("the metal kernel up stalls", KernelWarning, stacklevel=2)
        warnings.warn("something else", UserWarning, stacklevel=2)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning
        assert common.run_main("blockffn-chat", command) == 0
        warnings.showwarning = shown
    assert capsys.readouterr().err.startswith("blockffn-chat: the metal kernel up stalls\n")
