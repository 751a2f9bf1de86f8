"""Readers and samplers of training text."""

import json

import numpy as np
import pytest

from blockffn_mlx.training.data import (
    Corpus,
    Markers,
    Source,
    assistant_turns,
    read_files,
    unigram_loss,
)
from blockffn_mlx.training.packed import read_packed
from blockffn_mlx.training.sampling import DocumentPacker, WindowSampler, validation_windows
from blockffn_mlx.training.text import read_documents
from blockffn_mlx.training.tokenizer import train_tokenizer
from helpers.packed_text import ASSISTANT, BOS, CHAT, CHAT_TURNS, END, EOS, PAD


def source(name: str, *documents: list[int]) -> Source:
    tokens = np.array([token for document in documents for token in document], np.uint16)
    starts = np.cumsum([0] + [len(document) for document in documents[:-1]])
    return Source(name, tokens, starts, markers=Markers(ASSISTANT, END, EOS))


def counting(name: str, first: int, lengths: list[int]) -> Source:
    """Documents of BOS and ever new tokens, so that a token names its place."""
    documents, at = [], first
    for length in lengths:
        documents.append([BOS, *range(at, at + length - 1)])
        at += length - 1
    return source(name, *documents)


def test_read_packed(packed):
    corpus = read_packed(packed)
    assert list(corpus.train) == ["a", "b"]
    assert list(corpus.validation) == ["a"]
    assert corpus.pad == PAD
    assert corpus.train["a"].starts.tolist() == [0, 14, 28]
    assert corpus.train["a"].assistant.tolist() == [bool(t) for t in CHAT_TURNS * 3]
    assert corpus.train["b"].starts.tolist() == [0, 3]
    assert corpus.validation["a"].tokens.tolist() == [BOS, 30, 31, 32]


def test_damaged_packed_data_is_refused(packed):
    (packed / "v.u16").write_bytes(b"\x00" * 8)
    with pytest.raises(ValueError, match="does not match its manifest"):
        read_packed(packed)


def test_a_turn_ends_with_its_document():
    tokens = np.array([BOS, ASSISTANT, 10, BOS, 11, ASSISTANT, 12])
    turns = assistant_turns(tokens, tokens == BOS, Markers(ASSISTANT, END, EOS))
    assert turns.tolist() == [False, False, True, False, False, False, True]


def test_windows_are_contiguous_and_follow_the_weights():
    corpus = Corpus(
        {"a": counting("a", 100, [50] * 10), "b": counting("b", 1000, [50] * 10)}, pad=PAD
    )
    batch = WindowSampler(corpus, {"a": 1, "b": 3}, context=8, seed=0).batch(2000)
    assert batch.inputs.shape == batch.targets.shape == (2000, 8)
    assert (batch.inputs[:, 1:] == batch.targets[:, :-1]).all()
    assert batch.real.all() and batch.scored.all() and batch.segments is None
    assert (batch.paired == (batch.inputs != BOS)).all()
    from_b = (np.maximum(batch.inputs, batch.targets).max(1) >= 1000).mean()
    assert from_b == pytest.approx(0.75, abs=0.04)


def test_a_short_source_is_padded():
    corpus = Corpus({"a": counting("a", 100, [5])}, pad=PAD)
    batch = WindowSampler(corpus, None, context=8, seed=0).batch(1)
    assert batch.inputs[0].tolist() == [BOS, 100, 101, 102, 103, PAD, PAD, PAD]
    assert batch.scored[0].tolist() == [True] * 4 + [False] * 4
    assert batch.real[0].tolist() == [True] * 5 + [False] * 3
    assert batch.paired[0].tolist() == [False] + [True] * 4 + [False] * 3


def test_a_sampler_resumes():
    corpus = Corpus({"a": counting("a", 100, [50] * 10)}, pad=PAD)
    for kind in (WindowSampler, DocumentPacker):
        sampler, other = (kind(corpus, None, context=64, seed=seed) for seed in (0, 1))
        sampler.batch(3)
        other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
        assert (sampler.batch(4).inputs == other.batch(4).inputs).all()


def test_documents_are_packed_whole():
    lengths = [5, 9, 12, 40]
    corpus = Corpus({"a": counting("a", 100, lengths)}, pad=PAD)
    batch = DocumentPacker(corpus, None, context=31, seed=0).batch(50)
    full = np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1)
    seen = set()
    for row in full:
        documents = np.split(row[row != PAD], np.flatnonzero(row == BOS)[1:])
        seen |= {len(document) for document in documents}
    # The one that is too long for a row is cut to it.
    assert seen == {5, 9, 12, 32}


def test_isolated_documents_are_padded_to_chunks():
    corpus = Corpus({"a": counting("a", 100, [5, 9])}, pad=PAD)
    packer = DocumentPacker(corpus, None, context=32, seed=0, isolate=True, multiple=8)
    batch = packer.batch(20)
    starts = batch.inputs == BOS
    assert not starts[:, np.arange(32) % 8 != 0].any()
    # No target begins another document, and padding has neither targets nor pairs.
    assert not (batch.scored & ((batch.targets == BOS) | (batch.targets == PAD))).any()
    assert not (batch.paired & ((batch.inputs == BOS) | (batch.inputs == PAD))).any()
    assert (batch.real == (batch.inputs != PAD)).all()
    assert (np.diff(batch.segments, axis=1) == starts[:, 1:]).all()


def test_only_assistants_are_scored():
    corpus = Corpus({"a": source("a", CHAT)}, pad=PAD)
    batch = DocumentPacker(corpus, None, context=13, seed=0, assistant_only=True).batch(1)
    assert batch.scored[0].tolist() == [bool(turn) for turn in CHAT_TURNS[1:]]


def test_plain_text_is_scored_whole_beside_assistants():
    corpus = Corpus({"a": counting("a", 100, [14])}, pad=PAD)
    batch = WindowSampler(corpus, None, context=13, seed=0, assistant_only=True).batch(1)
    assert batch.scored.all()


def test_sources_are_left_out_by_pattern(packed):
    corpus = read_packed(packed).without(["a*"])
    assert list(corpus.train) == ["b"] and not corpus.validation


def test_weights_must_name_sources():
    corpus = Corpus({"a": counting("a", 100, [50])}, pad=PAD)
    with pytest.raises(ValueError, match="No such training source: b"):
        WindowSampler(corpus, {"b": 1.0}, context=8, seed=0)
    with pytest.raises(ValueError, match="weight above 0"):
        WindowSampler(corpus, {"a": 0.0}, context=8, seed=0)


def test_validation_windows_score_every_token_once():
    text = counting("a", 100, [11, 9])
    batch, spoken = validation_windows(text, context=8, pad=PAD)
    assert batch.inputs.shape == (3, 8)
    assert batch.targets[batch.scored].tolist() == text.tokens[1:].tolist()
    assert not batch.paired[0, 0] and not batch.paired[1, 3] and batch.paired[1, 4]
    assert spoken.shape == (3, 8)
    short, _ = validation_windows(text, context=8, pad=PAD, limit=6)
    assert short.scored.sum() == 5


def test_unigram_loss_of_even_counts():
    corpus = Corpus({"a": source("a", [0, 1, 2, 3])}, {"a": source("a", [0, 1])})
    assert unigram_loss(corpus, 4) == pytest.approx(np.log(4))


def test_text_and_json_lines(tmp_path):
    (tmp_path / "book.txt").write_text("once upon a time " * 50)
    lines = [json.dumps({"text": "a short line"}), "", json.dumps({"text": "another"})] * 20
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    tokenizer = train_tokenizer(read_documents(tmp_path / "book.txt"), 300)
    corpus = read_files([tmp_path / "book.txt", tmp_path / "lines.jsonl"], tokenizer, held_out=0.25)
    book, lines = corpus.train["book"], corpus.train["lines"]
    assert tokenizer.decode(book.tokens[1:].tolist()).startswith("once upon a time")
    assert len(corpus.validation["book"].tokens) == pytest.approx(len(book.tokens) / 3, rel=0.1)
    assert set(lines.tokens[lines.starts]) == {tokenizer.bos_token_id}
    # A document is never cut in two by the held-out part.
    held_out = corpus.validation["lines"]
    assert held_out.tokens[0] == tokenizer.bos_token_id
    assert len(lines.starts) + len(held_out.starts) == 40
