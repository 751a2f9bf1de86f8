"""Tokenizer files: built from the source's own, checked against sentencepiece itself."""

import json
import shutil

import pytest
import sentencepiece
from conftest import GOLDEN
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer
from mlx_lm.utils import load_tokenizer

from blockffn_mlx.tokenizer import read_tokenizer

SOURCE = GOLDEN / "gqa_block"
VOCAB_SIZE = 384
TEXTS = [
    "hello world",
    "  two  spaces  ",
    "Licensor shall mean\nthe copyright owner\t100%",
    "中文测试，你好 🎉",
    "<用户>hi<AI>",
    "ﬁ ① Ｗｉｄｅ",
    "",
]


def copied(tmp_path, **settings):
    """The golden tokenizer's files in a folder of their own, with other settings."""
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(SOURCE / name, tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return tmp_path


def written(tmp_path, **settings):
    """What mlx-lm loads of the tokenizer files that a conversion writes."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    read_tokenizer(copied(source, **settings), VOCAB_SIZE).save(target)
    (target / "config.json").write_text('{"model_type": "blockffn"}')
    return load_tokenizer(target, {"trust_remote_code": False}, eos_token_ids=2)


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_streams_and_decodes_as_sentencepiece(tmp_path, text):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(SOURCE / "tokenizer.model"))
    tokenizer = written(tmp_path)
    ids = tokenizer.encode(text)
    assert ids == [1, *reference.encode(text)]
    assert tokenizer.decode(ids[1:]) == reference.decode(ids[1:])
    stream = tokenizer.detokenizer
    assert isinstance(stream, SPMStreamingDetokenizer)
    for token in ids[1:]:
        stream.add_token(token)
        assert "�" not in stream.text
    stream.finalize()
    assert stream.text == reference.decode(ids[1:])


def test_bos_and_eos_settings(tmp_path):
    tokenizer = written(tmp_path, add_bos_token=False, add_eos_token=True)
    ids = tokenizer.encode("hello")
    assert ids[0] != 1 and ids[-1] == 2


def test_chat_template_is_the_reference_format_with_one_bos(tmp_path):
    tokenizer = written(tmp_path)
    messages = [
        {"role": "user", "content": " 你好 "},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "more"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s><用户>你好<AI>hi</s><用户>more<AI>"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert ids.count(1) == 1 and ids == tokenizer.encode(text, add_special_tokens=False)
    # The markers are plain text: the same ids as tokenising the whole conversation at once.
    assert ids == tokenizer.encode(text.removeprefix("<s>"))


def test_a_template_of_the_source_is_kept(tmp_path):
    assert not read_tokenizer(SOURCE, VOCAB_SIZE).has_own_template
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    inline = read_tokenizer(copied(tmp_path / "a", chat_template="{{ 1 }}"), VOCAB_SIZE)
    assert inline.has_own_template and inline.config["chat_template"] == "{{ 1 }}"
    (copied(tmp_path / "b") / "chat_template.jinja").write_text("{{ 2 }}")
    file = read_tokenizer(tmp_path / "b", VOCAB_SIZE)
    assert file.has_own_template and file.config["chat_template"] == "{{ 2 }}"


def test_fast_file_wins_over_a_wrong_sentencepiece_model(tmp_path):
    read_tokenizer(SOURCE, VOCAB_SIZE).save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"another model's")
    found = read_tokenizer(tmp_path, VOCAB_SIZE)
    assert found.tokenizer.encode("hello").ids == written_ids(found)
    assert found.tokenizer.encode("hello").ids[0] == 1


def written_ids(found):
    return read_tokenizer(SOURCE, VOCAB_SIZE).tokenizer.encode("hello").ids


def test_vocabulary_is_held_against_the_embedding():
    with pytest.raises(ValueError, match="384 tokens but only 383 embedding rows"):
        read_tokenizer(SOURCE, VOCAB_SIZE - 1)
    assert read_tokenizer(SOURCE, VOCAB_SIZE).warnings == []
    assert "may belong to another model" in read_tokenizer(SOURCE, 1000).warnings[0]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_damaged_files_are_named(tmp_path, name):
    (copied(tmp_path) / name).write_bytes(b"\xff damaged")
    with pytest.raises(ValueError, match=name):
        read_tokenizer(tmp_path, VOCAB_SIZE)


def test_no_tokenizer_files(tmp_path):
    assert read_tokenizer(tmp_path, VOCAB_SIZE) is None


def test_nothing_of_the_source_is_trusted(tmp_path):
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", None]}
    found = read_tokenizer(copied(tmp_path, auto_map=auto_map, tokenizer_class="Evil"), VOCAB_SIZE)
    assert "auto_map" not in found.config
    assert found.config["tokenizer_class"] == "PreTrainedTokenizerFast"
