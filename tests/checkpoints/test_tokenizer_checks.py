"""Hostile tokenizer files: refused before compiled code hangs, stops or leaves the embedding."""

import itertools
import json
import struct
import time
from pathlib import Path

import pytest
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
    table = proto.normalizer_spec.precompiled_charsmap
    proto.normalizer_spec.precompiled_charsmap = table[:150_000]


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
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((SOURCE / "tokenizer.model").read_bytes())
    proto.trainer_spec.model_type = model_type
    change(proto)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
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


def test_an_unknown_token_that_is_unknown_itself(tmp_path):
    read_tokenizer(SOURCE, VOCAB_SIZE).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"unk_token": "<of no vocabulary>", "eos_token": "<nor this>"}
    config["added_tokens_decoder"] = {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="embedding rows|vocabulary lacks"):
        open_tokenizer(tmp_path, vocab_size=VOCAB_SIZE)
