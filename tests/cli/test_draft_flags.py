"""From the flags to the engine: every one arrives, and what cannot work is refused."""

import contextlib
import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

import blockffn_mlx as bf
from blockffn_mlx.checkpoints.convert_head import convert_head
from blockffn_mlx.checkpoints.folder import Origin
from blockffn_mlx.cli import draft as draft_flags
from blockffn_mlx.cli import generate as command
from blockffn_mlx.speculative import (
    AdaptiveWidth,
    FixedWidth,
    LookupDrafter,
    ModelDrafter,
    SpeculationStats,
    cost,
    make_drafter,
    make_policy,
)
from blockffn_mlx.speculative.eagle_drafter import EagleDrafter
from helpers import commands
from helpers.models import GOLDEN, tiny_model

HEAD = str(GOLDEN / "gqa_block_eagle")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def one_price(monkeypatch):
    """A cost table without measuring."""
    table = cost.PassCost([1, 8], [1.0, 1.1], [1.0, 1.1], [0.1, 0.1], [0.1, 0.1])
    monkeypatch.setattr("blockffn_mlx.speculative.drafters.pass_cost", lambda *a, **k: table)
    return table


def run(*flags):
    return commands.run("generate", *flags)


def test_every_flag_reaches_the_engine(converted, monkeypatch, one_price, capsys):
    """Runs the command's own code with the engine replaced by a recorder."""
    calls = []

    def record(prompt, model, drafter, **options):
        calls.append((drafter, options))
        options["stats"].rounds = 5
        yield 7, mx.zeros(1), True

    monkeypatch.setattr("blockffn_mlx.speculative.stream", record)
    base = ["--model", str(converted("gqa_block")), "--raw", "--prompt", "a b", "--json"]
    rest = ["--max-tokens", "1", "--prefill-step-size", "3"]
    for flags in (
        ["--draft", "lookup", "--draft-width", "5"],
        ["--draft", HEAD, "--draft-width", "7"],
        ["--draft", str(converted("gqa_block")), "--draft-width", "auto"],
        ["--draft", "auto"],
    ):
        command.run(command.parser().parse_args(base + rest + flags))
        assert json.loads(capsys.readouterr().out)["draft"]["rounds"] == 5
    kinds = [type(drafter) for drafter, _ in calls]
    assert kinds == [LookupDrafter, EagleDrafter, ModelDrafter, LookupDrafter]
    policies = [options["policy"] for _, options in calls]
    assert [type(p) for p in policies] == [FixedWidth, FixedWidth, AdaptiveWidth, AdaptiveWidth]
    assert [p.width(0) for p in policies[:2]] == [5, 7]
    assert policies[2].cost is one_price
    for _, options in calls:
        assert options["max_tokens"] == 1 and options["prefill_step_size"].most == 3
        assert callable(options["sampler"])


def test_no_draft_leaves_the_engine_alone(converted, monkeypatch, capsys):
    monkeypatch.setattr("blockffn_mlx.speculative.stream", lambda *a, **k: pytest.fail("called"))
    flags = ["--model", str(converted("gqa_block")), "--raw", "--prompt", "a", "-m", "1", "--json"]
    for more in ([], ["--draft", "none"]):
        command.run(command.parser().parse_args(flags + more))
        assert "draft" not in json.loads(capsys.readouterr().out)


def test_the_commands_answer_is_the_same_with_a_draft(converted):
    flags = ["--model", converted("gqa_block"), "--raw", "-p", "one two one two", "-m", "24"]
    plain = json.loads(run(*flags, "--json").stdout)
    for draft in ("lookup", HEAD):
        drafting = [*flags, "--draft", draft, "--draft-width", "6"]
        found = json.loads(run(*drafting, "--json").stdout)
        assert found["tokens"] == plain["tokens"] and found["text"] == plain["text"]
        names = {"rounds", "drafted", "accepted", "tokens_per_round", "union_ratio"}
        assert names <= set(found["draft"])
    shown = run(*drafting).stdout
    assert "\nDraft: " in shown and "tokens a round" in shown


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--draft", "nowhere"], "no draft at nowhere"),
        (
            ["--draft", "lookup", "--draft-width", "65"],
            "--draft-width: 65 is outside its range: from 1 to 64",
        ),
        (
            ["--draft", "lookup", "--draft-width", "0"],
            "--draft-width: 0 is outside its range: from 1 to 64",
        ),
        (
            ["--draft", "lookup", "--draft-width", "wide"],
            "--draft-width: 'wide' is neither auto nor a number",
        ),
        (["--draft", "lookup", "--draft-width", "4", "--max-kv-size", "16"], "--max-kv-size"),
        (
            ["--draft", "lookup", "--draft-width", "4", "--kv-bits", "4", "--kv-group-size", "32"],
            "--kv-bits exclude each other",
        ),
    ],
)
def test_refusals_are_one_line(converted, flags, message):
    done = run("--model", converted("gqa_block"), "--raw", "-p", "a", *flags)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_stream_generate_yields_responses_with_from_draft():
    model, stats = tiny_model(), SpeculationStats()
    options = dict(max_tokens=20, draft=LookupDrafter(min_ngram=1), draft_width=6)
    found = list(bf.stream_generate(model, None, PROMPT * 3, draft_stats=stats, **options))
    plain = list(bf.stream_generate(model, None, PROMPT * 3, max_tokens=20))
    assert [r.token for r in found] == [r.token for r in plain]
    assert sum(r.from_draft for r in found) == stats.accepted
    assert found[-1].finish_reason == "length" and found[-1].generation_tokens == 20
    assert stats.round_tokens + stats.plain_tokens == 20


def test_a_stop_text_inside_an_accepted_path_ends_there(golden):
    """The oracle of a draft is the model itself: whole paths are accepted."""
    model, tokenizer, _ = golden("gqa_block")
    ids, cache = tokenizer.encode("once upon a time"), model.make_cache()
    options = dict(max_tokens=30, draft=ModelDrafter(model, 384), draft_width=8)
    plain = list(bf.stream_generate(model, tokenizer, ids, max_tokens=30))
    text = "".join(r.text for r in plain)
    for place in range(4, len(text) - 2, max(len(text) // 5, 1)):
        stop = text[place : place + 2]
        cache = model.make_cache()
        expected = list(bf.stream_generate(model, tokenizer, ids, max_tokens=30, stop=[stop]))
        stream = bf.stream_generate(
            model, tokenizer, ids, stop=[stop], prompt_cache=cache, **options
        )
        found = list(stream)
        assert [r.token for r in found] == [r.token for r in expected]
        assert "".join(r.text for r in found) == "".join(r.text for r in expected)
        assert found[-1].finish_reason == "stop"
        assert cache[0].offset == len(ids) + len(found)


def test_an_eos_inside_an_accepted_path_ends_there(golden):
    model, tokenizer, _ = golden("gqa_block")
    ids = tokenizer.encode("once upon a time")
    plain = [r.token for r in bf.stream_generate(model, tokenizer, ids, max_tokens=16)]
    for place in (1, 2, 5, 8):
        end = plain.index(plain[place])
        tokenizer._eos_token_ids, kept = {plain[place]}, tokenizer._eos_token_ids
        cache = model.make_cache()
        options = dict(max_tokens=16, draft=ModelDrafter(model, 384), draft_width=8)
        found = list(bf.stream_generate(model, tokenizer, ids, prompt_cache=cache, **options))
        tokenizer._eos_token_ids = kept
        assert [r.token for r in found] == plain[: end + 1]
        assert found[-1].finish_reason == "stop" and cache[0].offset == len(ids) + end + 1


def test_auto_takes_the_head_in_the_models_folder(tmp_path, monkeypatch, golden):
    model, _, _ = golden("gqa_block")
    assert isinstance(make_drafter("auto", tiny_model()), LookupDrafter)
    assert isinstance(make_drafter("auto", model), LookupDrafter)
    for place in ("folder", "checkpoint"):
        folders = dict.fromkeys(("folder", "checkpoint"), tmp_path / "none")
        (tmp_path / place).mkdir()
        shutil.copytree(HEAD, tmp_path / place / "draft")
        monkeypatch.setattr(model, "origin", Origin(**{**folders, place: tmp_path / place}))
        assert isinstance(make_drafter("auto", model), EagleDrafter)


def test_a_draft_model_with_another_tokenizer_is_refused(golden, converted):
    model, tokenizer, _ = golden("gqa_block")
    assert make_drafter(str(converted("mla_linear")), model, tokenizer).vocab_size == 384

    class Other:
        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(ValueError, match="another tokenizer than the model"):
        make_drafter(str(converted("mla_linear")), model, Other())


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json", "model_file"])
def test_a_draft_models_folder_runs_no_code_and_asks_nothing(
    tmp_path, monkeypatch, golden, converted, where
):
    model, tokenizer, _ = golden("gqa_block")
    folder, mark = tmp_path / "draft", tmp_path / "this ran"
    folder.mkdir()
    sizes = dict(hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2)
    config = {**sizes, "model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 384}
    weights = dict(tree_flatten(llama.Model(llama.ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    for file in converted("gqa_block").glob("tokenizer*"):
        shutil.copy(file, folder)
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Evil\n"
    (folder / "evil.py").write_text(code)
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if where == "model_file":
        config["model_file"] = "evil.py"
    else:
        settings |= {"auto_map": auto_map, "tokenizer_class": "Evil"}
        config |= {"auto_map": auto_map} if where == "config.json" else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it asked"))
    with contextlib.suppress(ValueError):
        make_drafter(str(folder), model, tokenizer)
    assert not mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1e400},
        {"num_hidden_layers": "many"},
        {"num_attention_heads": 0},
        {"model_type": []},
        {"model_type": "../llama"},
        {"vocab_size": None},
        {"text_config": {"num_experts": 10**9}},
        {"rope_scaling": 5},
        {"quantization": {"bits": 4}},
        {"quantization_config": {"quant_method": "gptq"}},
        {"tie_word_embeddings": {}},
    ],
    ids=str,
)
def test_odd_configs_of_draft_models_are_named(tmp_path, golden, converted, change):
    model, tokenizer, _ = golden("gqa_block")
    sizes = dict(hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2)
    config = {**sizes, "model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 384}
    weights = dict(tree_flatten(llama.Model(llama.ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    for file in converted("gqa_block").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    try:
        make_drafter(str(tmp_path), model, tokenizer)
    except ValueError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)
    else:
        assert "text_config" not in change and "num_hidden_layers" not in change


def test_draft_folders_do_not_lead_elsewhere(tmp_path, golden, converted):
    model, tokenizer, _ = golden("gqa_block")
    for source in (Path(HEAD), converted("mla_linear")):
        folder = tmp_path / source.name
        shutil.copytree(source, folder)
        shutil.copy(folder / "config.json", tmp_path / "secret.json")
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to("../secret.json")
        with pytest.raises(ValueError, match="is a link to a file outside its folder"):
            make_drafter(str(folder), model, tokenizer)
    with pytest.raises(ValueError, match="is a link to a file outside its folder"):
        convert_head(tmp_path / Path(HEAD).name, tmp_path / "out", model)


def test_unknown_drafts_are_refused(tmp_path):
    model = tiny_model()
    (tmp_path / "config.json").write_text("{}")
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"x": mx.zeros(1)})
    with pytest.raises(ValueError, match="not a draft of a known kind"):
        make_drafter(str(tmp_path), model)
    assert make_drafter("none", model) is None and make_drafter(None, model) is None
    drafter = LookupDrafter()
    assert make_drafter(drafter, model) is drafter
    policy = FixedWidth(3)
    assert make_policy(policy, model) is policy


def test_measuring_shows_progress(monkeypatch, one_price):
    shown = []

    def measure(width, model, report, drafter):
        shown.append(report(1, 4))
        return FixedWidth(2)

    monkeypatch.setattr(draft_flags, "make_policy", measure)
    args = command.parser().parse_args(["--model", "m", "--draft", "lookup"])
    options = draft_flags.draft_options(args, tiny_model(), None)
    assert len(shown) == 1 and options["draft_width"].width(0) == 2
