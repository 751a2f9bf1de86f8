"""Kernels that are wrong, raise, stall or crash are turned off alone, and generation goes on."""

import os
import re
import subprocess
import sys
import warnings

import mlx.core as mx
import pytest

import metal_host
from blockffn_mlx import device, kernels
from blockffn_mlx.ffn import plan
from blockffn_mlx.kernels import Call, probe, text, verdicts
from blockffn_mlx.quantisation import Quantization
from helpers.kernel_runs import BACKEND, in_harness, running
from helpers.models import tiny_model

pytestmark = pytest.mark.skipif(
    BACKEND == "metal" and metal_host.compiler() is None and not mx.metal.is_available(),
    reason=metal_host.NO_COMPILER,
)
PACKED = Quantization(32, 4, "affine")
ORIGINAL_CALL, ORIGINAL_SOURCE = Call.__call__, text.read_source


@pytest.fixture(autouse=True)
def fresh_probe(monkeypatch):
    monkeypatch.setattr(probe, "SIZES", (9, 32, 128, 5))
    probe.verdict.cache_clear()
    yield
    probe.verdict.cache_clear()


def works(name: str, num_tokens: int, packing=None) -> bool:
    kernel = kernels.KERNELS[name]
    return probe.works(kernel, num_tokens, mx.float32, packing, backend=BACKEND)


@pytest.mark.parametrize("packing", [None, PACKED])
@pytest.mark.parametrize("name", kernels.KERNELS)
def test_right_kernels_pass(name, packing):
    with running() as runs:
        assert works(name, 70 if kernels.KERNELS[name].long else 5, packing)
    assert not runs or {r.name.removesuffix("_affine") for r in runs} == {f"blockffn_{name}"}


@in_harness
def test_nothing_is_asked_where_the_gpu_is_elsewhere():
    """A graph that is made here for a Mac has the kernels in it."""
    assert works("up", 1)


def swap_operands(monkeypatch):
    """The matrix product takes its operands the wrong way round: right up to 4 tokens."""

    def swapped(name, replaced):
        source = ORIGINAL_SOURCE(name, replaced)
        right = "simdgroup_multiply_accumulate(c, a, b, c)"
        return source.replace(right, right.replace("a, b", "b, a"))

    monkeypatch.setattr(text, "read_source", swapped)


def spoil(monkeypatch, act):
    """Does something to the up and down kernel's tile of 5 to 8 tokens."""

    def call(self, *inputs):
        outputs = ORIGINAL_CALL(self, *inputs)
        return act(outputs) if dict(self.template).get("TOKENS") == 8 else outputs

    monkeypatch.setattr(Call, "__call__", call)


def be_off(monkeypatch):
    spoil(monkeypatch, lambda outputs: [outputs[0] * 1.1, *outputs[1:]])


def raise_something(monkeypatch):
    def fail(outputs):
        raise OverflowError("no such luck")  # MLX raises more than RuntimeError

    spoil(monkeypatch, fail)


def stall(monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(probe, "monotonic", lambda: seconds[0])

    def wait(outputs):
        seconds[0] += 100
        return outputs

    spoil(monkeypatch, wait)


FAULTS = {
    "gives wrong results": swap_operands,
    "gives wrong results here": be_off,
    r"does not run here \(no such luck\)": raise_something,
    r"stalls \(.*100 s": stall,
}


@in_harness
@pytest.mark.parametrize("said", FAULTS)
def test_generation_goes_on_without_a_faulty_class(monkeypatch, said):
    """The right tokens, one line for a class, and the next start knows without trying.

    Fused kernels that are off give way to the others, and those to plain operations.
    """
    model = tiny_model(hidden_size=64, expert_size=32, num_attention_heads=4)
    prompt, step = mx.array([[5, 9, 2, 17, 30, 4, 8]]), mx.array([[11]])
    cache = model.make_cache()
    expected = [model(prompt, cache), model(step, cache)]
    mx.eval(expected)
    monkeypatch.setattr(device, "kernel_backend", lambda: "metal")
    FAULTS[said](monkeypatch)
    for start in ("first", "second"):
        kernels_seen = []
        with running() as runs, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache = model.make_cache()
            found = [model(prompt, cache)]
            mx.eval(found)
            tried = len(runs)
            found.append(model(step, cache))
            mx.eval(found)
            kernels_seen = [run.name for run in runs]
        lines = [str(w.message) for w in caught if w.category is probe.KernelWarning]
        assert 1 <= len(lines) == len(set(lines)) <= 4  # two fused kernels, two others
        assert all("5 to 8 tokens" in line and re.search(said, line) for line in lines)
        for mine, theirs in zip(found, expected, strict=True):
            assert mx.array_equal(mine.argmax(-1), theirs.argmax(-1))
            assert mx.abs(mine - theirs).max() < 1e-4 * mx.abs(theirs).max()
        assert "blockffn_routed_up" in kernels_seen[tried:]  # one token: its classes are right
        assert start == "first" or tried == 0
        probe.verdict.cache_clear()
        plan.forget()


CRASH = """
import os, sys
from blockffn_mlx.kernels import verdicts
verdicts.folder = lambda: __import__("pathlib").Path(sys.argv[1])
with verdicts.trying(sys.argv[2]):
    os.kill(os.getpid(), 9)
"""


@in_harness
def test_a_start_that_died_in_a_kernel_tells_the_next(monkeypatch):
    monkeypatch.setattr(device, "gpu_backend", lambda: BACKEND)
    monkeypatch.setattr(probe, "find_fault", lambda tile_class: None)
    kernel = kernels.KERNELS["up"]
    first = probe.tile_classes(kernel, BACKEND, mx.float32, None)[0]
    died = subprocess.run([sys.executable, "-c", CRASH, str(verdicts.folder()), first.key])
    assert died.returncode == -9 and list(verdicts.folder().glob("*.trying"))
    with pytest.warns(probe.KernelWarning, match="up for 1 token in .* hung or crashed"):
        assert not works("up", 1)
    assert works("up", 2)  # another class
    assert not list(verdicts.folder().glob("*.trying"))
    probe.verdict.cache_clear()
    with pytest.warns(probe.KernelWarning, match="hung or crashed"):
        assert not works("up", 1)  # still known
    verdicts.forget()
    probe.verdict.cache_clear()
    assert works("up", 1)


def test_a_note_of_a_living_process_is_no_crash():
    with verdicts.trying("some class"):
        note = next(verdicts.folder().glob("*.trying"))
        other = note.with_name(note.name.replace(f".{os.getpid()}.", f".{os.getppid()}."))
        note.rename(other)
        assert verdicts.kept("some class") is None
        other.unlink()


@pytest.mark.parametrize("damage", ["", "[]", '{"verdicts": 3}', "\0"])
def test_damaged_verdicts_are_none(damage):
    verdicts.keep("a class", verdicts.RIGHT)
    assert verdicts.kept("a class") == verdicts.RIGHT
    file = next(verdicts.folder().glob("*.json"))
    file.write_text(damage)
    assert verdicts.kept("a class") is None


def test_verdicts_are_of_one_machine_and_version(monkeypatch):
    verdicts.keep("a class", verdicts.RIGHT)
    for module, name in ((device, "name"), (device, "system_build")):
        with monkeypatch.context() as patch:
            verdicts.fingerprint.cache_clear()
            patch.setattr(module, name, lambda: "another")
            assert verdicts.kept("a class") is None
    verdicts.fingerprint.cache_clear()
    assert verdicts.kept("a class") == verdicts.RIGHT


def test_a_disk_that_takes_nothing_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(verdicts, "folder", lambda: tmp_path / "file" / "below")
    with verdicts.trying("a class"):
        verdicts.keep("a class", verdicts.RIGHT)
    assert verdicts.kept("a class") is None
