"""Generation: tokens, stop texts, limits, caches, and the command around it."""

import json
import os

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.tuner.utils import linear_to_lora_layers

import blockffn_mlx as bf
from blockffn_mlx.generate import respond
from blockffn_mlx.prompt import StopTexts, as_prompt
from blockffn_mlx.speculative import SpeculationStats
from helpers.commands import run
from helpers.models import tiny_model
from helpers.toy_chat import toy_folder, toy_model, toy_tokenizer

PROMPT = [3, 1, 4, 1, 5]


class Letters:
    """A tokenizer whose token i is the i-th piece; id 0 ends the text."""

    eos_token_ids = {0}
    bos_token = None

    def __init__(self, pieces: list[str]):
        self.pieces = pieces

    @property
    def detokenizer(self):
        return LettersDetokenizer(self.pieces)


class LettersDetokenizer:
    def __init__(self, pieces):
        self.pieces, self.last_segment = pieces, ""

    def add_token(self, token):
        self.last_segment = self.pieces[token]

    def finalize(self):
        self.last_segment = ""


def answer(pieces: list[str], tokens: list[int], max_tokens: int = 99, stop=()):
    stream = ((token, None, False) for token in tokens)
    responses = list(respond(stream, Letters(pieces), 1, max_tokens, stop))
    return "".join(r.text for r in responses), responses


@pytest.mark.parametrize(
    "pieces, text",
    [
        (["", "ab", "<us", "er>", "cd"], "ab"),  # split over tokens
        (["", "ab", "<us", "ing", "cd"], "ab<usingcd"),  # only looked like it
        (["", "ab<user>x", "y", "z", ""], "ab"),  # inside one token
        (["", "ab", "cd", "<us", "e"], "abcd<use"),  # begun, never finished
        (["", "<<us", "er", ">", "x"], "<"),  # overlapping beginning
    ],
)
def test_stop_text(pieces, text):
    got, responses = answer(pieces, [1, 2, 3, 4, 0], stop=["<user>", "never"])
    assert got == text
    assert responses[-1].finish_reason == "stop"


def test_no_part_of_a_stop_text_is_shown_early():
    answer = StopTexts(["<AI>", ""])
    assert [answer.feed(c) for c in "a<AI"] == ["a", "", "", ""]
    assert answer.rest() == "<AI" and not answer.found
    assert answer.feed("b<AI>c") == "b" and answer.found and answer.feed("d") == answer.rest() == ""


def test_end_reasons():
    text, responses = answer(["", "a", "b"], [1, 2, 0, 1])
    assert (text, [r.finish_reason for r in responses]) == ("ab", [None, None, "stop"])
    text, responses = answer(["", "a", "b"], [1, 2, 1, 1], max_tokens=2)
    assert (text, [r.finish_reason for r in responses]) == ("ab", [None, "length"])
    assert [r.generation_tokens for r in responses] == [1, 2]


def tokens_of(model, prompt, count, **options) -> list[int]:
    return [r.token for r in bf.stream_generate(model, None, prompt, max_tokens=count, **options)]


@pytest.mark.parametrize("attention_type", ["vanilla", "mla"])
def test_greedy_tokens_are_the_argmax_of_full_passes(attention_type):
    model = tiny_model(attention_type=attention_type)
    ids = list(PROMPT)
    for _ in range(12):
        ids.append(model(mx.array([ids]))[0, -1].argmax().item())
    assert tokens_of(model, PROMPT, 12) == ids[len(PROMPT) :]
    assert tokens_of(model, PROMPT, 12, prefill_step_size=2) == ids[len(PROMPT) :]


def test_prompt_cache_continues():
    model = tiny_model()
    whole = tokens_of(model, PROMPT, 10)
    cache = model.make_cache()
    first = tokens_of(model, PROMPT, 4, prompt_cache=cache)
    kept = cache[0].offset - len(PROMPT)
    for layer_cache in cache:
        layer_cache.trim(kept)
    rest = tokens_of(model, first, 6, prompt_cache=cache)
    assert first + rest == whole


def test_sampling_follows_the_seed_and_the_sampler():
    model = tiny_model()
    draws = []
    for seed in (1, 1, 2):
        mx.random.seed(seed)
        draws.append(tokens_of(model, PROMPT, 20, sampler=mx.random.categorical))
    assert draws[0] == draws[1] != draws[2]
    ban = tokens_of(model, PROMPT, 1)[0]

    def processor(_, logits):
        return mx.where(mx.arange(logits.shape[-1]) == ban, -mx.inf, logits)

    assert ban not in tokens_of(model, PROMPT, 8, logits_processors=[processor])


def test_max_kv_size_bounds_the_cache(monkeypatch):
    made = []
    original = RotatingKVCache.__init__

    def spy(self, *args, **kwargs):
        made.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(RotatingKVCache, "__init__", spy)
    tokens_of(tiny_model(), PROMPT, 40, max_kv_size=16)
    assert len(made) == 2 and made[0].keys.shape[2] <= 16


def test_quantised_cache_for_gqa_only():
    model = tiny_model(hidden_size=256, num_attention_heads=4)
    plain = tokens_of(model, PROMPT, 4)
    assert len(tokens_of(model, PROMPT, 4, kv_bits=8, quantized_kv_start=0)) == len(plain)
    with pytest.raises(ValueError, match="latent cache"):
        tokens_of(tiny_model(attention_type="mla"), PROMPT, 4, kv_bits=8)


@pytest.mark.parametrize(
    "prompt, message", [([], "empty"), ([[1], [2]], "batch"), ("text", "no tokenizer")]
)
def test_bad_prompts(prompt, message):
    with pytest.raises(ValueError, match=message):
        as_prompt(None, prompt)


@pytest.mark.parametrize("ids", [[1, 61], [-1], [2**40], [0, 10**30]])
def test_tokens_without_an_embedding_are_refused(ids):
    """MLX would read beyond the embedding: a segmentation fault, or somebody else's memory."""
    model = tiny_model()
    with pytest.raises(ValueError, match="outside the model's vocabulary of 61"):
        tokens_of(model, ids, 1)
    if ids[-1] < 2**31:
        with pytest.raises(ValueError, match="outside the model's vocabulary"):
            bf.router_scores(model, ids)


@pytest.mark.parametrize("prompt", [[1.5], ["a", "b"], [None], np.array([1.0])])
def test_prompts_that_are_no_ids(prompt):
    with pytest.raises(ValueError, match="whole numbers|batch"):
        as_prompt(None, prompt)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kv_bits": 8, "max_kv_size": 16}, "leave out one of the two"),
        ({"kv_bits": 8, "kv_group_size": 0}, "group sizes that fit"),
        ({"kv_bits": 7}, "bits are one of"),
        ({"kv_bits": 8, "kv_group_size": 128}, "group sizes that fit"),
        ({"max_kv_size": 4}, "more than 4 positions"),
        ({"kv_bits": 8, "prompt_cache": [RotatingKVCache(16)] * 2}, "leave out one of the two"),
    ],
)
def test_caches_that_cannot_be_are_refused_at_the_start(options, message):
    model = tiny_model(hidden_size=256, num_attention_heads=4)  # heads of 64
    with pytest.raises(ValueError, match=message):
        tokens_of(model, PROMPT, 1, **options)


def test_mlx_lm_names_for_a_draft_model():
    model, draft, stats = tiny_model(), tiny_model(), SpeculationStats()
    plain = tokens_of(model, PROMPT, 12)
    options = {"draft_model": draft, "num_draft_tokens": 3, "draft_stats": stats}
    assert tokens_of(model, PROMPT, 12, **options) == plain
    assert stats.drafted == 3 * stats.rounds > 0
    with pytest.raises(ValueError, match="of the same family"):
        tokens_of(model, PROMPT, 2, draft_model=tiny_model(vocab_size=60))


def test_verbose_prints_what_mlx_lm_prints(capsys):
    tokenizer = toy_tokenizer()
    options = {"max_tokens": 4, "sampler": lambda logprobs: mx.array([1605])}
    assert bf.generate(toy_model(), tokenizer, "hi", **options) == "okokokok"
    assert capsys.readouterr().out == ""
    bf.generate(toy_model(), tokenizer, "hi", verbose=True, **options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["=" * 10, "okokokok", "=" * 10]
    assert [line.split(":")[0] for line in lines[3:]] == ["Prompt", "Generation", "Peak memory"]


def test_limit_of_zero_is_refused():
    with pytest.raises(ValueError, match="max_tokens"):
        tokens_of(tiny_model(), PROMPT, 0)


def test_command_prints_like_mlx_lm(converted):
    result = run("generate", "--model", converted("gqa_block"), "-p", "abc", "-m", 6)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("=" * 10) == 2
    assert "Prompt: " in result.stdout and "Generation: 6 tokens" in result.stdout
    assert "base model" in result.stderr and "--raw" in result.stderr


def test_command_json_and_stdin(converted, golden):
    folder = converted("mla_linear")
    result = run("generate", "--model", folder, "-p", "-", "-m", 5, "--raw", "--json", input="ab c")
    document = json.loads(result.stdout)
    model, tokenizer, _ = golden("mla_linear")
    assert document["tokens"] == tokens_of(model, tokenizer.encode("ab c"), 5)
    assert document["finish_reason"] == "length" and document["generation_tokens"] == 5
    assert result.stderr == ""


def test_command_sampling_flags_reach_the_sampler(converted):
    flags = ["--model", converted("gqa_block"), "-p", "abc", "--raw", "--json", "-m", 12]
    greedy = json.loads(run("generate", *flags).stdout)["tokens"]
    hot = ["--temp", 5, "--seed", 3]
    draws = [json.loads(run("generate", *flags, *hot).stdout)["tokens"] for _ in range(2)]
    assert draws[0] == draws[1] != greedy
    top_1 = json.loads(run("generate", *flags, *hot, "--top-k", 1).stdout)["tokens"]
    assert top_1 == greedy


@pytest.mark.parametrize("model", ["no/such/folder", "/"])
def test_command_missing_model_is_one_line(model):
    result = run("generate", "--model", model)
    assert result.returncode == 1 and not result.stdout
    assert len(result.stderr.strip().splitlines()) == 1


def test_inspect_command(converted, tmp_path):
    folder, text, svg = converted("gqa_block"), tmp_path / "text.txt", tmp_path / "map.svg"
    text.write_text("some text to measure " * 5)
    flags = ["-p", "hello there", "--text", text, "--svg", svg]
    drawn = run("inspect", folder, *flags, "--tokens")
    assert "·" in drawn.stdout and "\x1b" not in drawn.stdout  # a pipe has no colours to tell by
    assert drawn.returncode == 0, drawn.stderr
    assert "CLS_8" in drawn.stdout and "nats" in drawn.stdout and svg.read_text()[:4] == "<svg"
    assert json.loads(run("inspect", folder, *flags, "--json").stdout)["loss"]["tokens"] > 20
    document = json.loads(run("inspect", folder, *flags[:2], "--json").stdout)
    tokens, layers = len(document["tokens"]), document["experts"]
    assert len(layers) == 2 and all(len(layer) == tokens for layer in layers)
    used = np.mean([len(token) / 12 for layer in layers for token in layer])
    assert document["tls"] == pytest.approx(1 - used)


def refused(result) -> str:
    """The one line on stderr of a command that was refused."""
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not result.stdout
    return result.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--temp", "nan"],
        ["--temp", "-1"],
        ["--temp", "inf"],
        ["--top-p", "2"],
        ["--min-p", "-0.1"],
        ["--seed", "-1"],
        ["--seed", "9" * 20],
        ["-m", "0"],
        ["-m", "-2"],
        ["--max-kv-size", "0"],
        ["--prefill-step-size", "0"],
        ["--kv-bits", "8", "--kv-group-size", "0"],
        ["--kv-bits", "4", "--max-kv-size", "64", "--kv-group-size", "32", "--raw"],
        ["--extra-eos-token", "nosuchtoken"],
        ["--extra-eos-token", "99999999"],
        ["--chat-template-config", "[" * 100_000],
        ["--raw", "--system-prompt", "x"],
        ["--draft", "lookup", "--num-draft-tokens", "64"],
        ["--q-bits", "4"],
    ],
    ids=lambda flags: " ".join(flags)[:40],
)
def test_flags_without_a_meaning_are_one_line(converted, flags):
    refused(run("generate", "--model", converted("gqa_block"), "-p", "a", *flags))


@pytest.mark.parametrize(
    "flag", ["-p", "--raw -p", "--prefill-response", "--system-prompt", "--stop"]
)
def test_bytes_that_are_no_text_are_taken(converted, flag):
    flags = [*flag.split(), os.fsdecode(b"\xff"), "-m", 2, "--use-default-chat-template"]
    result = run("generate", "--model", converted("gqa_block"), *flags)
    assert result.returncode == 0, result.stderr


def test_text_flags_share_one_rule_for_escapes(monkeypatch):
    from blockffn_mlx.cli import chat, generate, inspect

    typed, meant = r"a\n\tb", "a\n\tb"
    for command in (generate, chat):
        flags = ["-p", typed, "--stop", typed, "--system-prompt", typed, "--model", "m"]
        args = command.parser().parse_args(flags)
        assert (args.prompt, args.stop, args.system_prompt) == (meant, [meant], meant)
    assert (
        generate.parser().parse_args(["--model", "m", "--prefill-response", typed]).prefill_response
        == meant
    )
    assert inspect.parser().parse_args(["m", "-p", typed]).prompt == [meant]


def test_an_empty_stop_text_is_nothing(converted):
    flags = ["--model", converted("gqa_block"), "-p", "abc", "--raw", "--json", "-m", 6]
    texts = [
        json.loads(run("generate", *flags, *more).stdout)["text"] for more in ([], ["--stop", ""])
    ]
    assert texts[0] == texts[1] != ""


def test_quantisation_flags_are_not_ignored_in_silence(converted, tmp_path):
    flags = ["-p", "hi", "-m", 2, "--raw", "--verbose", "F"]
    told = run("generate", "--model", converted("gqa_block"), *flags, "-q", "--q-bits", 8)
    assert told.returncode == 1 and "converted already" in told.stderr


def test_nothing_of_a_file_steers_the_terminal(tmp_path):
    """A token with an escape sequence in a tokenizer, tensor names and paths with one in errors."""
    folder = toy_folder(tmp_path / "toy")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    for word in ("ok", "e"):
        vocab[f"\x1b]0;{word}\x07\x9b2J"] = vocab.pop(word)
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    flags = ["--model", folder, "-p", "hi", "-m", 9, "--temp", 5, "--stop", "\x1b[31m"]
    for more in ([], ["--json"], ["--verbose", "F"]):
        result = run("generate", *flags, *more)
        assert result.returncode == 0 and not set(result.stdout) & set("\x1b\x07\x9b"), (
            result.stderr
        )
    assert "\x1b" not in refused(run("generate", "--model", tmp_path / "\x1b[2Jno"))
    assert "\x1b" not in run("inspect", folder, "-p", "ok\x1b[2J [/b] [bold]", "--tokens").stdout


def test_inspect_says_what_it_leaves_out(converted, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text to measure " * 300)
    refusal = refused(run("inspect", converted("gqa_block"), "--text", text, "--tokens"))
    assert "--prompt" in refusal
    result = run("inspect", converted("gqa_block"), "--text", text)  # longer than the context
    assert result.returncode == 0 and result.stderr == ""
    result = run("inspect", "demo", "-p", "hi")  # a single token
    assert result.returncode == 0 and result.stderr == ""
    assert "64 MB" in refused(run("inspect", converted("gqa_block"), "--text", "/dev/zero"))
    assert "too short" in refused(run("inspect", converted("gqa_block"), "--text", "/dev/null"))
    text.write_bytes(b"\xff\xfe")
    assert "UTF-8" in refused(run("inspect", converted("gqa_block"), "--text", text))


def test_closed_standard_input_is_named(converted):
    result = run("generate", "--model", converted("gqa_block"), "-p", "-", input=None)
    assert "standard input" in refused(result)


def test_mlx_lm_flags_for_adapters_and_trust(converted, tmp_path):
    flags = ["--model", converted("gqa_block"), "-p", "ab", "--raw", "--json", "-m", 6]
    plain = run("generate", *flags, "--trust-remote-code")
    assert "adapter" in refused(run("generate", *flags, "--adapter-path", tmp_path / "none"))
    model, _ = bf.load(str(converted("gqa_block")))
    lora = {"rank": 2, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.o_proj"]}
    linear_to_lora_layers(model, 2, lora)
    weights = {n: mx.ones(w.shape) for n, w in tree_flatten(model.parameters()) if "lora" in n}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": lora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapted = run("generate", *flags, "--adapter-path", tmp_path)
    tokens = [json.loads(result.stdout)["tokens"] for result in (plain, adapted)]
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize("words, told", [(3, 0), (1300, 1)])
def test_a_prompt_beyond_the_models_positions_is_told(words, told):
    result = run("generate", "--model", "demo", "-p", "word " * words, "-m", "1", "--raw")
    assert result.returncode == 0
    assert result.stderr.count("positions up to 1,024 only") == told
