"""The EAGLE-2 head against the original code's numbers, its cache, its files."""

import json
import pickle
import shutil
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

import metal_host
from blockffn_mlx import device
from blockffn_mlx.ffn import MAX_CHUNK
from blockffn_mlx.kernels.kernel import build_kernel
from blockffn_mlx.models.eagle import EagleHead
from blockffn_mlx.quantisation import MODE_DEFAULTS
from blockffn_mlx.speculative import load_draft
from blockffn_mlx.speculative.eagle_drafter import EagleDrafter
from blockffn_mlx.speculative.tree import path_to
from helpers.heads import HEAD, random_head, save_head
from helpers.models import tiny_model


@pytest.fixture(scope="module")
def target(golden):
    return golden("gqa_block")[0]


@pytest.fixture(scope="module")
def data():
    return np.load(HEAD / "golden.npz")


def settings(data) -> dict[str, int]:
    return {name: int(data[name]) for name in ("top_k", "depth", "total_tokens")}


def test_golden_outputs(target, data):
    draft = load_draft(HEAD, target)
    ids = data["token_ids"][0].tolist()
    draft.observe(mx.array(data["hidden"]), ids[:-1])
    out = draft.catch_up(ids[-1])
    assert np.abs(np.array(out) - data["out_hidden"]).max() < 1e-4
    assert np.abs(np.array(draft.logprobs(out)) - data["draft_logprobs"]).max() < 1e-3


def assert_golden_trees(draft, data):
    for suffix in ("", "2"):
        hidden, ids = mx.array(data["hidden" + suffix]), mx.array(data["token_ids" + suffix])
        tree = draft.propose(hidden, ids, **settings(data))
        assert tree.tokens.tolist() == data["tree_tokens" + suffix][0].tolist()
        assert np.array_equal(np.array(tree.mask), data["tree_mask" + suffix][0, 0])
        assert tree.positions.tolist() == data["tree_positions" + suffix].tolist()
        paths = [[n for n in row if n >= 0] for row in data["retrieve" + suffix].tolist()]
        assert sorted(tree.paths) == sorted(paths)


def test_golden_trees_of_both_rounds(target, data):
    draft = load_draft(HEAD, target)
    assert_golden_trees(draft, data)
    draft.reset()
    assert_golden_trees(draft, data)


@pytest.mark.skipif(device.gpu_backend() is not None, reason="watched in the harness")
@pytest.mark.skipif(metal_host.compiler() is None, reason=metal_host.NO_COMPILER)
def test_golden_trees_through_the_kernels(target, data, monkeypatch):
    monkeypatch.setattr(EagleDrafter, "backend", lambda self: "metal")
    build_kernel.cache_clear()
    mx.disable_compile()  # the harness computes at once
    try:
        with metal_host.harness() as runs:
            assert_golden_trees(load_draft(HEAD, target), data)
    finally:
        mx.enable_compile()
    build_kernel.cache_clear()
    names = {run.name.removeprefix("blockffn_") for run in runs}
    assert names == {"top_tokens", "grow_beams", "best_tree"}


def test_a_smaller_tree_is_the_better_part_of_a_larger_one(target, data):
    """What `ranks` promises, and the policy relies on."""
    hidden, ids = mx.array(data["hidden"]), mx.array(data["token_ids"])
    trees = {}
    for size in (40, 12):
        draft = load_draft(HEAD, target)
        trees[size] = draft.propose(hidden, ids, top_k=4, depth=3, total_tokens=size)
    large = trees[40]
    kept = [node for node, rank in enumerate(large.ranks.tolist()) if rank < 12]
    assert [large.tokens.tolist()[node] for node in kept] == trees[12].tokens.tolist()


def test_prefill_in_chunks_fills_the_same_cache(target, data):
    hidden, ids = mx.array(data["hidden"]), data["token_ids"][0].tolist()
    whole = load_draft(HEAD, target)
    chunked = EagleDrafter(whole.head, target, max_waiting=4)
    whole.observe(hidden, ids[:-1])
    for start in range(0, 21, 5):
        chunked.observe(hidden[:, start : start + 5], ids[:-1][start : start + 5])
    assert chunked.cache[0].offset == 20 and chunked.length == whole.length == 21
    outs = [draft.catch_up(ids[-1])[:, -1] for draft in (whole, chunked)]
    assert mx.abs(outs[0] - outs[1]).max() < 1e-5
    for draft in (whole, chunked):
        assert draft.cache[0].offset == 21
    keys = [draft.cache[0].keys_and_values()[0] for draft in (whole, chunked)]
    assert mx.abs(keys[0] - keys[1]).max() < 1e-5


def test_no_pass_on_cuda_has_a_length_that_would_be_planned(target, data, monkeypatch):
    """Hundreds of rows wait after plain steps; MLX's attention plans at every new length."""
    monkeypatch.setattr(device, "compute_backend", lambda: "cuda")
    draft = load_draft(HEAD, target)
    assert EagleDrafter(draft.head, target).max_waiting == draft.max_waiting == MAX_CHUNK
    monkeypatch.undo()  # MLX computes
    hidden, lengths = mx.array(data["hidden"][:, :1]), []
    run = EagleHead.draft

    def counted(self, rows, *rest):
        lengths.append(rows.num_rows)
        return run(self, rows, *rest)

    monkeypatch.setattr(EagleHead, "draft", counted)
    draft.observe(mx.repeat(hidden, 150, axis=1), [5] * 150)
    draft.catch_up(6)
    assert lengths == [64, 64, 22] and draft.cache[0].offset == 150


def test_drafting_leaves_no_scratch_rows(target, data):
    draft = load_draft(HEAD, target)
    draft.propose(mx.array(data["hidden"]), mx.array(data["token_ids"]), **settings(data))
    assert draft.cache[0].offset == draft.length == 21


@pytest.mark.parametrize("top_k", [1, 3, 10, 400])
@pytest.mark.parametrize("depth", [0, 1, 6])
@pytest.mark.parametrize("total_tokens", [1, 2, 33, 64])
def test_any_shape_gives_a_tree(target, data, top_k, depth, total_tokens):
    if top_k == 400 and depth > 0:
        top_k = 30  # the square of the vocabulary per level is no use to anyone
    draft = load_draft(HEAD, target)
    hidden, ids = mx.array(data["hidden"]), mx.array(data["token_ids"])
    tree = draft.propose(hidden, ids, top_k=top_k, depth=depth, total_tokens=total_tokens)
    top_k = min(top_k, 384)
    assert len(tree) == min(total_tokens, 1 + top_k + depth * top_k**2)
    assert all(p < i for i, p in enumerate(tree.parents.tolist()))
    assert max(tree.positions.tolist()) <= depth + 1


def test_levels_that_rounds_seldom_reach_are_not_drafted(target, data):
    """Each level is a pass of the head; how far rounds get decides how many are run."""
    hidden = mx.array(data["hidden"])
    draft = load_draft(HEAD, target)
    draft.observe(hidden, data["token_ids"][0, :-1].tolist())

    def levels_after(accepted: list[int]) -> int:
        for count in accepted:
            draft.draft(7, 32, 63)
            held = min(count, draft.drafted_levels)
            draft.observe(hidden[:, : held + 1], [7] * (held + 1))
        return draft.worthwhile_levels()

    assert levels_after([6] * 20) == draft.depth + 1
    assert levels_after([0] * 40) == 1
    assert 2 <= levels_after([2] * 60) <= 4
    assert levels_after([6] * 40) == draft.depth + 1  # a better text is noticed
    draft.draft(7, 32, 63)
    before = list(draft.tried)
    draft.observe(hidden[:, :1], [7])
    draft.observe(hidden[:, :1], [7])  # a plain step: no round, nothing to learn
    assert [t > b for t, b in zip(draft.tried, before, strict=True)].count(True) == 1
    draft.reset()
    assert not any(draft.tried)


def reference_tree(draft, rows, tokens, top_k, depth, total_tokens):
    """EAGLE-2 from its definition: every beam's path is run from scratch."""
    head, length = draft.head, len(rows)

    def logprobs_after(path):
        cache, hidden = [KVCache() for _ in head.layers], mx.stack(rows)[None]
        following = draft.embed(mx.array(tokens[1:]))
        out = head(following, hidden, cache, mx.arange(length))[:, -1:]
        for place, token in enumerate(path):
            out = head(draft.embed(mx.array([token])), out, cache, mx.array([length + place]))
        return np.array(draft.logprobs(out))[0, 0]

    candidates, beams = [], [((), 0.0)]
    for _ in range(depth + 1):
        level = []
        for path, score in beams:
            found = logprobs_after(path)
            best = np.argsort(-found)[:top_k]
            level += [((*path, int(token)), score + found[token]) for token in best]
        candidates += level
        beams = sorted(level, key=lambda candidate: -candidate[1])[:top_k]
    chosen = sorted(candidates, key=lambda candidate: -candidate[1])[: total_tokens - 1]
    return sorted(path for path, _ in chosen)


@pytest.mark.parametrize("seed", range(4))
def test_trees_of_a_head_whose_attention_matters(seed):
    """The golden head is nearly deaf to its past; this one is not."""
    model = tiny_model()
    mx.random.seed(seed)
    head = random_head(model)
    head.load_weights(
        [(n, 4 * v) for n, v in tree_flatten(head.parameters()) if "self_attn" in n], strict=False
    )
    draft = EagleDrafter(head, model)
    hidden, tokens = mx.random.normal((1, 6, 48)), [1, 2, 3, 4, 5, 6, 7]
    expected = reference_tree(draft, list(hidden[0]), tokens, 3, 3, 24)
    tree = draft.propose(hidden, mx.array([tokens]), top_k=3, depth=3, total_tokens=24)
    names, parents = tree.tokens.tolist(), tree.parents.tolist()
    found = [tuple(names[n] for n in path_to(parents, node)[1:]) for node in range(1, len(tree))]
    assert sorted(found) == expected


@pytest.mark.parametrize("norms", [(), ("input_norm2",), ("input_norm1", "input_norm2")])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("attention", ["vanilla", "mla"])
def test_norms_bias_and_head_shapes_come_from_the_files(tmp_path, norms, bias, attention):
    """One row by hand: with one row, attention returns its own value."""
    model = tiny_model(attention_type=attention, rms_norm_eps=1e-3)
    head = random_head(model, norms=norms, bias=bias)
    save_head(tmp_path / "head", head)
    draft = load_draft(tmp_path / "head", model)
    hidden = mx.random.normal((1, 1, 48))
    draft.observe(hidden, [5])
    out = np.array(draft.catch_up(9))[0, 0]

    w = {name: np.array(value, np.float64) for name, value in tree_flatten(head.parameters())}

    def norm(x, name):
        return x / np.sqrt((x**2).mean() + 1e-3) * w[f"{name}.weight"]

    e = np.array(model.model.embed_tokens.weight, np.float64)[9] * model.args.scale_emb
    h = np.array(hidden, np.float64)[0, 0]
    e = norm(e, "input_norm1") if "input_norm1" in norms else e
    h = norm(h, "input_norm2") if "input_norm2" in norms else h
    x = w["fc.weight"] @ np.concatenate([e, h]) + w.get("fc.bias", 0)
    value = w["layers.0.self_attn.v_proj.weight"] @ x
    x = x + w["layers.0.self_attn.o_proj.weight"] @ np.tile(value, 3)
    normed = norm(x, "layers.0.post_attention_layernorm")
    gate = w["layers.0.mlp.gate_proj.weight"] @ normed
    up = w["layers.0.mlp.up_proj.weight"] @ normed
    x = x + w["layers.0.mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
    assert np.abs(out - x).max() < 1e-4 * np.abs(x).max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", [None, "affine", "mxfp8", "nvfp4"])
def test_a_reduced_vocabulary_takes_rows_of_the_targets_head(tied, mode):
    model = tiny_model(tie_word_embeddings=tied, hidden_size=64, dim_model_base=16)
    if mode:
        nn.quantize(
            model,
            *MODE_DEFAULTS[mode][:2],
            mode=mode,
            class_predicate=lambda n, m: "embed" in n or "head" in n,
        )
    rows = mx.array([5, 60, 0, 17])
    hidden = mx.random.normal((1, 3, 64))
    found = model.logits_for(rows)(hidden)
    assert mx.abs(found - model.logits(hidden)[..., rows]).max() < 1e-4


def test_unused_tensors_are_ignored(tmp_path, target, data):
    weights = mx.load(str(HEAD / "model.safetensors"))
    weights |= {
        "embed_tokens.weight": mx.zeros((384, 128)),
        "layers.0.input_layernorm.weight": mx.zeros(128),
        "layers.0.self_attn.rotary_emb.inv_freq": mx.zeros(16),
    }
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    shutil.copy(HEAD / "config.json", tmp_path)
    assert_golden_trees(load_draft(tmp_path, target), data)


def test_propose_refuses_what_does_not_fit(target, data):
    draft = load_draft(HEAD, target)
    hidden, ids = mx.array(data["hidden"]), mx.array(data["token_ids"])
    with pytest.raises(ValueError, match="1 to 64 nodes, got 65"):
        draft.propose(hidden, ids, total_tokens=65)
    with pytest.raises(ValueError, match="one sequence at a time"):
        draft.propose(mx.repeat(hidden, 2, axis=0), ids)
    with pytest.raises(ValueError, match="21 hidden states so far need 22 tokens, got 21"):
        draft.propose(hidden, ids[:, :-1])


def test_rows_start_where_an_unseen_conversation_ended(target, data):
    """After a reset with an offset, positions count from there."""
    draft = load_draft(HEAD, target)
    draft.reset(40)
    hidden = mx.array(data["hidden"])[:, :3]
    tree = draft.propose(hidden, mx.array([[0] * 40 + [5, 6, 7, 8]]), 2, 1, 5)
    assert draft.length == 43 and len(tree) == 5
    assert isinstance(draft, EagleDrafter) and draft.cache[0].offset == 3


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_converted_head_drafts_like_the_published_one(converted, target, data, tmp_path, bits):
    shutil.copytree(HEAD, tmp_path / "published")
    (tmp_path / "published" / "freq_384.pkl").write_bytes(pickle.dumps(list(range(384))))
    out = tmp_path / "out"
    command = ["--hf-path", tmp_path / "published", "--mlx-path", out]
    command += ["--draft-for", converted("gqa_block"), "--json"]
    command += ["-q", "--q-bits", bits] if bits else []
    code = "import sys; from blockffn_mlx.cli.convert import main; sys.exit(main())"
    run = [sys.executable, "-c", code, *map(str, command)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    parameters = sum(w.size for w in mx.load(str(HEAD / "model.safetensors")).values())
    assert report["layout"] == "EAGLE head" and report["parameters"] == parameters
    origin = json.loads((out / "config.json").read_text())["blockffn_mlx"]
    assert origin["source"] == "published"  # a local folder's name, not where it lies
    assert not list(out.glob("*.pkl")) and (out / "freq_384.json").exists()
    draft = load_draft(out, target)
    assert draft.frequent.size == 384
    if bits is None:
        assert report["bits_per_weight"] == 32
        assert_golden_trees(draft, data)
    else:
        assert report["bits_per_weight"] < bits + 1.5
        assert isinstance(draft.head.fc, nn.QuantizedLinear) and draft.head.fc.bits == bits
        ids = data["token_ids"][0].tolist()
        draft.observe(mx.array(data["hidden"]), ids[:-1])
        error = mx.abs(draft.catch_up(ids[-1]) - mx.array(data["out_hidden"])).mean().item()
        assert error < {4: 0.2, 8: 0.02}[bits] * np.abs(data["out_hidden"]).mean()
