"""Tokenizer files: built from the source's own, checked against sentencepiece itself."""

import itertools
import json
import shutil
import struct
import time
from pathlib import Path

import pytest
import sentencepiece
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer
from mlx_lm.utils import load_tokenizer
from sentencepiece import sentencepiece_model_pb2
from transformers import PreTrainedConfig

from blockffn_mlx.checkpoints import tokenizer as tokenizer_module
from blockffn_mlx.checkpoints.tokenizer import read_tokenizer
from blockffn_mlx.checkpoints.tokenizer_checks import check_ids, check_tokenizer_folder
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


def piece_of_a_megabyte(proto):
    proto.pieces[300].piece = "ab" * 500_000


def pieces_of_each_other(proto):
    words = (
        "".join(bits) for size in range(3, 10) for bits in itertools.product("ab", repeat=size)
    )
    for word in words:
        proto.pieces.add(piece=word, score=-1.0)


def damaged_charsmap(proto):
    proto.normalizer_spec.precompiled_charsmap = b"xyz"


def charsmap_out_of_bounds(proto):
    table = struct.pack("<I", 4) + b"\xff\xff\xff\xff" + b"abc\0"
    proto.normalizer_spec.precompiled_charsmap = table


def charsmap_cut_off(proto):
    proto.normalizer_spec.precompiled_charsmap = proto.normalizer_spec.precompiled_charsmap[
        :150_000
    ]


def charsmap_value_behind_the_texts(proto):
    table = proto.normalizer_spec.precompiled_charsmap
    size = int.from_bytes(table[:4], "little")
    proto.normalizer_spec.precompiled_charsmap = table[: 4 + size] + b"ab\0"


def charsmap_value_inside_a_character(proto):
    table = proto.normalizer_spec.precompiled_charsmap
    size = int.from_bytes(table[:4], "little")
    texts = "é".encode() * (len(table[4 + size :]) // 2)
    proto.normalizer_spec.precompiled_charsmap = table[: 4 + size] + texts


def charsmap_with_texts_that_are_none(proto):
    proto.normalizer_spec.precompiled_charsmap += b"\xff\0"


def unknown_score(proto):
    proto.pieces[300].score = float("nan")


def piece_twice(proto):
    proto.pieces[300].piece = proto.pieces[301].piece


def unknown_id_outside(proto):
    proto.trainer_spec.unk_id = 100_000


def no_pieces(proto):
    del proto.pieces[:]


@pytest.mark.parametrize("model_type", [1, 2])
@pytest.mark.parametrize(
    "change",
    [
        piece_of_a_megabyte,
        pieces_of_each_other,
        damaged_charsmap,
        charsmap_out_of_bounds,
        charsmap_cut_off,
        charsmap_value_behind_the_texts,
        charsmap_value_inside_a_character,
        charsmap_with_texts_that_are_none,
        unknown_score,
        piece_twice,
        unknown_id_outside,
        no_pieces,
    ],
)
def test_hostile_sentencepiece_models(tmp_path, monkeypatch, change, model_type):
    monkeypatch.setattr(tokenizer_module, "MAX_MERGES", 1000)
    path = copied(tmp_path) / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    proto.trainer_spec.model_type = model_type
    change(proto)
    path.write_bytes(proto.SerializeToString())
    start = time.perf_counter()
    try:
        found = read_tokenizer(tmp_path, 1 << 20)
    except ValueError as error:
        assert "tokenizer.model" in str(error) and "\n" not in str(error)
    else:
        harmless = (pieces_of_each_other, unknown_id_outside)
        assert change in harmless and found.tokenizer.encode("hello é ﬁ").ids
    assert time.perf_counter() - start < 20


def with_fast_file(tmp_path, change) -> Path:
    read_tokenizer(SOURCE, VOCAB_SIZE).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return tmp_path


def template_of(token_id, kind="TemplateProcessing"):
    if kind != "TemplateProcessing":
        return {"type": kind, "sep": ["</s>", token_id], "cls": ["<s>", token_id]} | (
            {"trim_offsets": True, "add_prefix_space": True} if kind.startswith("Rob") else {}
        )
    token = {"id": "<s>", "ids": [token_id], "tokens": ["<s>"]}
    single = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    return {"type": kind, "single": single, "pair": single, "special_tokens": {"<s>": token}}


def high_ids_of_words(content):
    vocab = content["model"]["vocab"]
    for text in [text for text in vocab if len(text) == 1][:9]:
        vocab[text] += 400_000


def highest_id(content):
    content["model"]["vocab"]["hello"] = (1 << 32) - 1


def added_token(content):
    added = content["added_tokens"][0]
    content["added_tokens"] += [{**added, "id": 384 + i, "content": f"<{i}>"} for i in range(3)]


@pytest.mark.parametrize(
    "change",
    [
        high_ids_of_words,
        highest_id,
        added_token,
        lambda c: c.update(post_processor=template_of(400_000)),
        lambda c: c.update(post_processor=template_of(400_000, "BertProcessing")),
        lambda c: c.update(post_processor=template_of(400_000, "RobertaProcessing")),
        lambda c: c.update(
            post_processor={"type": "Sequence", "processors": [template_of(400_000)]}
        ),
    ],
    ids=["words", "highest", "added", "template", "bert", "roberta", "sequence"],
)
def test_ids_outside_the_embedding_are_refused(tmp_path, change):
    folder = with_fast_file(tmp_path, change)
    with pytest.raises(ValueError, match="only 384 embedding rows"):
        read_tokenizer(folder, VOCAB_SIZE)
    with pytest.raises(ValueError, match="only 384 embedding rows"):
        check_tokenizer_folder(folder, VOCAB_SIZE)


def test_ids_of_tokens_that_only_the_settings_add(tmp_path):
    read_tokenizer(SOURCE, VOCAB_SIZE).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["eos_token"] = "<of no vocabulary>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path, {"config": PreTrainedConfig()})
    with pytest.raises(ValueError, match="385 tokens but only 384"):
        check_ids(loaded, VOCAB_SIZE, tmp_path)


@pytest.mark.parametrize(
    "step, value",
    [
        ("normalizer", {"type": "Prepend", "prepend": "x" * 1_000_000}),
        ("normalizer", {"type": "Replace", "pattern": {"String": "e"}, "content": "x" * 50_000}),
        ("decoder", {"type": "Strip", "content": " ", "start": 1 << 40, "stop": 0}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "//8="}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": 5}),
        ("model", {"type": "Unigram", "unk_id": 0, "vocab": [["a" * 1_000_000, 0.0]]}),
        ("model", {"type": "Unknown"}),
        ("model", 5),
        ("added_tokens", {}),
        ("decoder", {"type": "Fuse", "x": [[]] * 3}),
    ],
)
def test_hostile_fast_tokenizers(tmp_path, step, value):
    folder = with_fast_file(tmp_path, lambda content: content.update({step: value}))
    try:
        read_tokenizer(folder, VOCAB_SIZE)
    except ValueError as error:
        assert "tokenizer.json" in str(error) and "\n" not in str(error)
    else:
        assert value == {"type": "Fuse", "x": [[]] * 3}


def test_no_tokenizer_files(tmp_path):
    assert read_tokenizer(tmp_path, VOCAB_SIZE) is None


def test_nothing_of_the_source_is_trusted(tmp_path):
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", None]}
    found = read_tokenizer(copied(tmp_path, auto_map=auto_map, tokenizer_class="Evil"), VOCAB_SIZE)
    assert "auto_map" not in found.config
    assert found.config["tokenizer_class"] == "PreTrainedTokenizerFast"
