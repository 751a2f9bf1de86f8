"""What takes a BlockFFN takes a DECO: drafts, training, LoRA, predictions, several processes."""

import json
import sys

import mlx.core as mx
import pytest
from mlx_lm.utils import load as load_mlx_lm

import blockffn_mlx as bf
from blockffn_mlx.analysis.passes import model_from_config, trace_passes
from blockffn_mlx.cli import chat, generate, train, train_draft
from blockffn_mlx.cli import inspect as inspect_command
from blockffn_mlx.models import deco
from blockffn_mlx.speculative import load_draft
from helpers.commands import run_in_two_processes
from helpers.deco_models import TINY, tiny
from helpers.models import GOLDEN

SENTENCES = [
    "The mouse saw the fox and the fox saw the mouse in the old mill by the river.",
    "The owl left the forest and found the river, and the hare went home to the old mill.",
    "The brave mouse found the owl and the hare left the forest for the river and the mill.",
]
HEAD = """
output = "{folder}/head"
[data]
path = ["{folder}/data/train.jsonl"]
held_out = 0.3
[head]
intermediate_size = 64
[sparsity]
chunk_length = 16
[[stage]]
steps = 2
batch_size = 2
context = 32
lr = 1e-3
"""


@pytest.fixture
def data(tmp_path):
    """A folder of texts as `blockffn-train --data` takes it."""
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        lines = [json.dumps({"text": text}) for text in SENTENCES]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def run(monkeypatch, command, *flags) -> int:
    monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, flags)])
    return command.main()


def greedy(model, tokenizer, draft=None, **options) -> list[int]:
    responses = bf.stream_generate(
        model, tokenizer, [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4], 16, draft=draft, **options
    )
    return [response.token for response in responses]


def test_a_head_is_trained_and_drafts(converted, data, monkeypatch, capsys):
    folder = converted("deco_simple")
    (data / "head.toml").write_text(HEAD.format(folder=data))
    assert run(monkeypatch, train_draft, folder, data / "head.toml") == 0
    model, tokenizer = bf.load(str(folder))
    draft = load_draft(data / "head" / "draft", model)
    stats = bf.speculative.SpeculationStats()
    width = bf.speculative.FixedWidth(6)
    found = greedy(model, tokenizer, draft, draft_width=width, draft_stats=stats)
    assert found == greedy(model, tokenizer) and stats.rounds > 1


def test_a_smaller_deco_drafts(converted):
    model, tokenizer = bf.load(str(converted("deco_simple")))
    width, stats = bf.speculative.FixedWidth(4), bf.speculative.SpeculationStats()
    draft = bf.speculative.make_drafter(str(converted("deco_simple")), model, tokenizer)
    found = greedy(model, tokenizer, draft, draft_width=width, draft_stats=stats)
    assert found == greedy(model, tokenizer)
    assert stats.tokens_per_round > 3  # its own twin is always right


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_it_is_fine_tuned(converted, data, monkeypatch, capsys, kind):
    folder = converted("deco_simple")
    flags = ["--model", folder, "--data", data / "data", "--iters", 2, "--batch-size", 1]
    flags += ["--max-seq-length", 64, "--fine-tune-type", kind, "--output", data / "run"]
    flags += ["--set", "optimizer.dtype=float32"]
    assert run(monkeypatch, train, *flags) == 0
    assert "TLS: " in capsys.readouterr().out
    model, tokenizer = bf.load(str(data / "run" / "model"))
    before, _ = bf.load(str(folder))
    ids = mx.array([[5, 6, 7, 8]])
    assert isinstance(model, deco.Model) and not mx.array_equal(model(ids), before(ids))
    stock, _ = load_mlx_lm(str(data / "run" / "model"), trust_remote_code=True)
    assert mx.allclose(stock(ids), model(ids), atol=1e-5)
    assert tokenizer.eos_token_ids == {2, 376}
    if kind == "lora":
        adapted, _ = bf.load(str(folder), adapter_path=str(data / "run" / "adapters"))
        assert mx.allclose(adapted(ids), model(ids), atol=1e-4)
        updated = {
            name.split(".")[3] for name in mx.load(f"{data}/run/adapters/adapters.safetensors")
        }
        assert updated == {"self_attn", "mlp"}


def test_commands_complete_and_inspect(converted, monkeypatch, capsys):
    folder = converted("deco_simple")
    assert run(monkeypatch, generate, "--model", folder, "--prompt", "The mouse", "-m", 4) == 0
    assert "looks like a base model" in capsys.readouterr().err
    flags = ["--model", folder, "--prompt", "The mouse saw the old mill.", "--json"]
    assert run(monkeypatch, inspect_command, *flags) == 0
    report = json.loads(capsys.readouterr().out)
    routed = sum(json.loads((folder / "config.json").read_text())["moe_layer_freq"])
    assert len(report["layers"]) == routed and 0 < report["tls"] < 1
    assert report["layers_without_router"] == [0]
    assert run(monkeypatch, inspect_command, *flags[:-1]) == 0
    assert "Layer 0 has no router; it is not counted." in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", open("/dev/null"))
    assert run(monkeypatch, chat, "--model", folder) == 0


@pytest.mark.parametrize("bits", [None, 4])
def test_its_passes_are_predicted_from_a_config(bits):
    """A converted folder's config, and the Hub's; kernels in each routed layer of a short pass."""
    hub = json.loads((GOLDEN / "deco_simple" / "config.json").read_text())
    ours = vars(tiny(hidden_size=64, head_dim=16, expert_size=32, shared_expert_size=32).args)
    for config, routed in ((hub, sum(hub["moe_layer_freq"])), (ours, sum(TINY["moe_layer_freq"]))):
        model = model_from_config(config, bits, 32)
        passes = trace_passes(model, 8, 20)
        for graph in (passes.decode, passes.chunk):
            names = [launch.name for launch in graph.launches]
            assert sum("norm_up" in name for name in names) == routed, names
            assert 0 < graph.bytes(0.2) < graph.bytes(1.0)
        names = [launch.name for launch in trace_passes(model, 8, 100).prefill.launches]
        assert (
            sum("grouped_norm_up" in name for name in names) == routed - 1
        )  # the last is asked for nothing


@pytest.mark.parametrize("bits, tokens, launches", [(None, 1, 10), (4, 1, 10), (8, 8, 11)])
def test_a_layer_launches_as_little_as_it_can(bits, tokens, launches):
    """As BlockFFN's, with two more for the shared expert; for a chunk a copy."""
    sizes = dict(hidden_size=64, head_dim=16, expert_size=32, shared_expert_size=32)
    model = tiny(**sizes, num_hidden_layers=5, moe_layer_freq=[0, 1, 1, 1, 1])
    passes = trace_passes(model_from_config(vars(model.args), bits, 32), tokens, 20)
    assert passes.chunk.launches_per_layer(5) == launches


SHARD_PROGRAM = """
import mlx.core as mx
from helpers.deco_models import tiny
model = tiny()
ids = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
expected = model(ids)
group = mx.distributed.init(strict=True)
model.shard(group)
errors = []
for backend in ("ops", "dense", "grouped"):
    for layer in model.layers[1:]:
        layer.mlp.backend = backend
    cache = model.make_cache()
    found = mx.concatenate([model(ids[:, :5], cache), model(ids[:, 5:], cache)], axis=1)
    errors.append(mx.abs(found - expected).max().item())
held = model.layers[1].mlp.expert_up_proj.weight.shape[0]
print(f"rank {group.rank()} of {group.size()} {held} experts: {max(errors) < 1e-4}")
"""


def test_two_processes_give_one_process_logits(tmp_path):
    """Nine experts, of which one process holds four and the other five."""
    lines, errors = run_in_two_processes(SHARD_PROGRAM, tmp_path)
    expected = ["rank 0 of 2 4 experts: True", "rank 1 of 2 5 experts: True"]
    assert lines == expected, errors


def test_shard_refuses_what_does_not_divide():
    class Three:
        def size(self):
            return 3

    with pytest.raises(ValueError, match="cannot split 4 attention heads over 3"):
        tiny().shard(Three())
