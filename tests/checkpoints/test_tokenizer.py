"""Tokenizer files: built from the source's own, checked against sentencepiece itself."""

import json
import shutil

import pytest
import sentencepiece
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer
from mlx_lm.utils import load_tokenizer

from blockffn_mlx.checkpoints.tokenizer import read_tokenizer
from blockffn_mlx.checkpoints.tokenizer_files import open_tokenizer
from helpers.models import GOLDEN

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


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": TEMPLATE}]


@pytest.mark.parametrize(
    "inline, files, found",
    [
        (NAMED, {}, TEMPLATE),
        (NAMED[1:], {}, TEMPLATE),
        ({"default": TEMPLATE, "rag": "R"}, {}, TEMPLATE),
        (None, {"chat_template.json": json.dumps({"chat_template": TEMPLATE})}, TEMPLATE),
        (None, {"chat_template.json": json.dumps({"chat_template": NAMED})}, TEMPLATE),
        (None, {"chat_template.jinja": "\ufeff" + TEMPLATE}, TEMPLATE),
        ("other", {"chat_template.jinja": TEMPLATE}, TEMPLATE),
        ("other", {"chat_template.json": json.dumps({"chat_template": TEMPLATE})}, "other"),
    ],
)
def test_forms_of_a_chat_template(tmp_path, inline, files, found):
    copied(tmp_path, **({} if inline is None else {"chat_template": inline}))
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    tokenizer = read_tokenizer(tmp_path, VOCAB_SIZE)
    assert tokenizer.has_own_template and tokenizer.config["chat_template"] == found
    assert tokenizer.warnings == []


@pytest.mark.parametrize("inline", [NAMED[:1], 5, [5], [{"name": "default"}], {"default": {}}])
def test_odd_chat_templates_are_told(tmp_path, inline):
    tokenizer = read_tokenizer(copied(tmp_path, chat_template=inline), VOCAB_SIZE)
    assert "template" in tokenizer.warnings[0]
    assert isinstance(tokenizer.config["chat_template"], str)


def test_byte_order_marks(tmp_path):
    read_tokenizer(SOURCE, VOCAB_SIZE).save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert read_tokenizer(tmp_path, VOCAB_SIZE).tokenizer.encode("hello").ids[0] == 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_byte_order_marks_in_a_folder_that_is_loaded(tmp_path, name, encoding):
    read_tokenizer(SOURCE, VOCAB_SIZE).save(tmp_path)
    expected = open_tokenizer(tmp_path)
    path = tmp_path / name
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    found = open_tokenizer(tmp_path)
    assert found.encode("hello 中") == expected.encode("hello 中")
    assert found.chat_template == expected.chat_template


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize(
    "content, reason",
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "pointer of Git LFS"),
        ('{"a": ' * 5000 + "1" + "}" * 5000, "JSON|deep"),
        ("[]", "JSON object"),
    ],
    ids=["lfs", "deep", "list"],
)
def test_damaged_files_of_a_folder_that_is_loaded(tmp_path, name, content, reason):
    read_tokenizer(SOURCE, VOCAB_SIZE).save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*({reason})"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["lfs", "device"])
def test_tokenizer_files_that_are_none(tmp_path, name, kind):
    path = copied(tmp_path) / name
    path.unlink(missing_ok=True)
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(ValueError, match=f"{name} is (not a regular|only a pointer)"):
        read_tokenizer(tmp_path, VOCAB_SIZE)


def test_no_tokenizer_files(tmp_path):
    assert read_tokenizer(tmp_path, VOCAB_SIZE) is None


def test_nothing_of_the_source_is_trusted(tmp_path):
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", None]}
    found = read_tokenizer(copied(tmp_path, auto_map=auto_map, tokenizer_class="Evil"), VOCAB_SIZE)
    assert "auto_map" not in found.config
    assert found.config["tokenizer_class"] == "PreTrainedTokenizerFast"
