"""mlx_lm.cache_prompt's files, gone on with by the commands and in a conversation."""

import json
import sys
from importlib import import_module

import mlx.core as mx
import pytest
from mlx_lm import cache_prompt
from mlx_lm.models.cache import save_prompt_cache

import blockffn_mlx as bf
from blockffn_mlx.chat.conversation import Conversation
from blockffn_mlx.checkpoints.prompt_cache import read_prompt_cache
from helpers.commands import run
from helpers.toy_chat import toy_folder

TEXT = "Once upon a time a brave mouse lived in a red house. Now:"
QUESTION = "who was it?"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, and what mlx_lm.cache_prompt wrote: plain, and packed in 8 bits."""
    place = tmp_path_factory.mktemp("cached")
    toy_folder(place / "model", hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    weights = mx.load(str(place / "model" / "model.safetensors"))
    for name in weights:
        if "o_proj" in name:
            weights[name] *= 20  # so that what came before counts
    mx.save_safetensors(str(place / "model" / "model.safetensors"), weights)
    flags = ["--model", str(place / "model"), "--trust-remote-code", "--prompt", TEXT]
    packing = ["--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0"]
    with pytest.MonkeyPatch.context() as patch:
        for name, more in (("plain", []), ("packed", packing)):
            file = ["--prompt-cache-file", str(place / f"{name}.safetensors")]
            patch.setattr(sys, "argv", ["cache_prompt", *flags, *file, *more])
            cache_prompt.main()
    return place


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_generate_goes_on_as_mlx_lm_does(place, kind, monkeypatch, capsys):
    flags = ["--model", str(place / "model"), "--prompt-cache-file", f"{place}/{kind}.safetensors"]
    flags += ["--prompt", QUESTION, "-m", "12"]
    flags += ["--kv-group-size", "32"] if kind == "packed" else []
    ours = run("generate", *flags, "--verbose", "False")
    assert ours.returncode == 0, ours.stderr
    monkeypatch.setattr(sys, "argv", ["generate", *flags, "--trust-remote-code", "--verbose", "F"])
    import_module("mlx_lm.generate").main()
    assert ours.stdout == capsys.readouterr().out
    assert ours.stdout != run("generate", *flags[:2], *flags[4:], "--verbose", "F").stdout


def test_a_conversation_goes_on_over_turns(place):
    model, tokenizer = bf.load(place / "model")
    cache = read_prompt_cache(place / "plain.safetensors", model)
    turn = [{"role": "user", "content": TEXT}]
    begun = tokenizer.apply_chat_template(
        turn, add_generation_prompt=False, continue_final_message=True
    )
    assert cache[0].offset == len(begun)
    chat = Conversation(model, tokenizer, opening=cache)
    for question in (QUESTION, "and then?", "really?"):
        chat.ask(question, 8)
        tokens = [response.token for response in chat.answer(8)]
        asked = begun + chat.held.ids[: chat.answer_span[0]]
        assert chat.cache[0].offset == len(begun) + len(chat.held.ids)
        alone = bf.stream_generate(model, None, asked, max_tokens=len(tokens))
        assert tokens == [response.token for response in alone]
    assert cache[0].offset == len(begun)  # it stays as it was
    chat.undo()
    chat.clear()
    chat.ask(QUESTION, 8)
    assert [r.token for r in chat.answer(8)][:3] == first_tokens(model, begun, chat)


def first_tokens(model, begun: list[int], chat: Conversation) -> list[int]:
    asked = begun + chat.held.ids[: chat.answer_span[0]]
    return [response.token for response in bf.stream_generate(model, None, asked, max_tokens=3)]


def test_the_chat_command_takes_the_file(place):
    flags = ["--model", place / "model", "-m", 6, "--prompt", QUESTION]
    with_file = run("chat", *flags, "--prompt-cache-file", place / "plain.safetensors")
    assert with_file.returncode == 0, with_file.stderr
    assert with_file.stdout != run("chat", *flags).stdout


@pytest.mark.parametrize("kind", ["none", "text", "arrays", "other model"])
def test_other_files_are_one_line(place, tmp_path, kind):
    file = tmp_path / "cache.safetensors"
    if kind == "text":
        file.write_text(json.dumps({"a": 1}))
    elif kind == "arrays":
        mx.save_safetensors(str(file), {"a": mx.zeros(3)})
    elif kind == "other model":
        other, _ = bf.load(toy_folder(tmp_path / "other"))
        cache = other.make_cache()
        other(mx.array([[1, 2]]), cache)
        save_prompt_cache(str(file), cache)
    told = run("generate", "--model", place / "model", "--prompt-cache-file", file)
    assert told.returncode == 1 and told.stderr.count("\n") == 1 and str(file) in told.stderr
