"""A draft head compiled gives what its layer gives, and notices when it is changed."""

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache

from blockffn_mlx import device
from blockffn_mlx.kernels import graph, probe
from blockffn_mlx.kernels.draft_input import consecutive
from blockffn_mlx.models import eagle_pieces
from blockffn_mlx.models.attend import AncestorMask
from blockffn_mlx.models.eagle import EagleHead, HeadArgs
from blockffn_mlx.models.eagle_pieces import DraftRows
from helpers.kernel_runs import BACKEND, ON_GPU, needs_gpu_or_compiler, running


def make_head(**changed) -> EagleHead:
    mx.random.seed(2)
    args = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4)
    head = EagleHead(HeadArgs(**args | {"num_key_value_heads": 2, "fc_bias": True} | changed))
    head.eval()
    mx.eval(head.parameters())
    return head


def draft(head: EagleHead) -> mx.array:
    """Rows of a sequence, one of them alone, and two levels of beams."""
    cache, width = [KVCache() for _ in head.layers], head.args.hidden_size
    given = mx.random.normal((2, 1, 12, width), key=mx.random.key(1))
    out, at = [], 0
    for length, mask in ((5, None), (1, None), (3, 3), (3, 6)):
        x = given[:, :, at : at + length]
        if mask:
            mask = AncestorMask(6, mask, among=mx.random.uniform(shape=(3, mask)) < 0.5)
        rows = DraftRows(x[0, 0], consecutive(0, length), 1.0, x[1], consecutive(0, length), length)
        out.append(head.draft(rows, cache, mx.arange(at, at + length), mask or "causal"))
        at += length
    return mx.concatenate(out, axis=1)


def both_ways(monkeypatch, head: EagleHead) -> tuple[mx.array, mx.array]:
    mx.random.seed(4)
    expected = draft(head)
    mx.random.seed(4)
    with monkeypatch.context() as patch:
        patch.setattr(eagle_pieces, "is_tracing", lambda: True)  # as if for a GPU
        return draft(head), expected


HEADS = {
    "plain": {},
    "norms": {"input_norms": ("input_norm1", "input_norm2"), "fc_bias": False},
    "shared heads": {"num_key_value_heads": 1},
    "linear scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
}


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("name", HEADS)
def test_compiled_heads_draft_the_same(monkeypatch, name, bits):
    head = make_head(**HEADS[name])
    if bits:
        nn.quantize(head, 32, bits)
    found, expected = both_ways(monkeypatch, head)
    assert head.compiled.maps is not None
    assert mx.abs(found - expected).max() < 1e-5 * mx.abs(expected).max()


@needs_gpu_or_compiler
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("name", ["plain", "norms"])
def test_kernels_draft_the_same(monkeypatch, name, bits):
    """Eight launches a pass beside rotation, cache and attention: five of linear maps."""
    head = make_head(**HEADS[name])
    if bits:
        nn.quantize(head, 32, bits)
    mx.random.seed(4)
    expected = draft(head)
    mx.random.seed(4)
    monkeypatch.setattr(eagle_pieces, "is_tracing", lambda: True)
    monkeypatch.setattr(device, "kernel_backend", lambda: BACKEND)
    monkeypatch.setattr(probe, "works", lambda *_, **__: True)
    mx.disable_compile()
    try:
        with running() as runs:
            found = draft(head)
            mx.eval(found)
    finally:
        mx.enable_compile()
    maps = ["residual_down", "down", "rotate", "residual_down", "normed", "residual_down"]
    names = [run.name.removeprefix("blockffn_").removesuffix("_affine") for run in runs]
    assert ON_GPU or names[:7] == names[-7:] == ["draft_input", *maps]
    assert mx.abs(found - expected).max() < 1e-4 * mx.abs(expected).max()


def test_a_pass_of_a_draft_is_twelve_launches(monkeypatch):
    """Each takes 5 to 8 us of the host, and a round has three to six passes."""
    head = make_head(num_attention_heads=2)
    for backend in ("gpu_backend", "compute_backend", "kernel_backend"):
        monkeypatch.setattr(device, backend, lambda: "metal")
    monkeypatch.setattr(probe, "works", lambda *_, **__: True)

    cache = KVCache()
    mx.eval(cache.update_and_fetch(*mx.zeros((2, 1, 2, 6, 32))))

    def run(x, words):
        mask = AncestorMask(6, 10, words=words)
        rows = DraftRows(x, consecutive(0, 10), 1.0, x[None], consecutive(0, 10), 10)
        return head.draft(rows, [cache], mx.arange(10), mask)

    found = graph.trace(run, mx.zeros((10, 64)), mx.zeros((2, 10), mx.uint32)).launches
    names = [launch.name for launch in found]
    assert len(names) <= 12, " ".join(names)


@pytest.mark.parametrize(
    "changed", [{"num_hidden_layers": 2}, {"attention_bias": True}, {"mlp_bias": True}]
)
def test_other_heads_take_their_layers(monkeypatch, changed):
    head = make_head(**changed)
    found, expected = both_ways(monkeypatch, head)
    assert head.compiled.maps is None and mx.array_equal(found, expected)


def test_new_weights_are_noticed(monkeypatch):
    head = make_head()
    first, _ = both_ways(monkeypatch, head)
    assert copy.deepcopy(head).compiled.maps is None
    head.layers[0].mlp.up_proj.weight = head.layers[0].mlp.up_proj.weight * 1.5
    found, expected = both_ways(monkeypatch, head)
    assert mx.abs(found - expected).max() < 1e-5 and mx.abs(found - first).max() > 1e-3


def test_a_cpu_takes_the_layers():
    head = make_head()
    draft(head)
    if device.compute_backend() == "cpu":
        assert head.compiled.maps is None
