"""Which experts an answer read, as recorded."""

import mlx.core as mx
import numpy as np
import pytest

from blockffn_mlx.analysis.sparsity import router_scores
from blockffn_mlx.chat.conversation import Conversation
from blockffn_mlx.chat.recording import Recording, recording, rows_of_answer
from helpers.toy_chat import toy_model, toy_tokenizer


@pytest.mark.parametrize("folded", [False, True])
def test_union_counts_each_pass_once_and_leaves_the_prompt_out(folded):
    scores = np.random.default_rng(0).normal(size=(2, 9, 6)) > 0.6  # [layers, tokens, experts]
    recorded = [[], []]
    meter = Recording(recorded)
    passes = ((0, 4), (4, 5), (5, 8), (8, 9))
    ratios = []
    assert meter.share is None
    for index, (start, end) in enumerate(passes):
        for layer, rows in zip(recorded, scores, strict=True):
            layer.append(mx.array(rows[None, start:end].astype(np.float32)))
        if index == 0:
            if folded:  # as a long prompt is while it is read
                meter.fold()
            meter.restart()
            assert meter.share is None
        else:
            ratios.append(scores[:, start:end].any(axis=1).mean())
        if index == 2:
            assert meter.share == pytest.approx(np.mean(ratios))
    assert meter.share == pytest.approx(np.mean(ratios)) and len(meter.widths) == 3


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_what_was_recorded_is_what_reading_the_answer_again_gives(max_tokens, monkeypatch):
    monkeypatch.setattr("blockffn_mlx.chat.recording.FOLD_INTERVAL", 4)
    chat = Conversation(toy_model(), toy_tokenizer())
    chat.ask("Hello there", max_tokens)
    with recording(chat.model) as record:
        for response in chat.answer(max_tokens):
            if response.generation_tokens == 1:
                record.restart(keep=1)
            record.count()
    first, end = chat.answer_span
    read = router_scores(chat.model, mx.array([chat.held.ids[:end]]))
    again = np.array(mx.stack([layer[0, first:] for layer in read]) != 0)
    rows = rows_of_answer(record, response.generation_tokens)
    np.testing.assert_array_equal(rows[:, : end - first], again)
    assert rows_of_answer(record, response.generation_tokens + 1) is None


def test_passes_with_a_draft_are_no_rows_and_nobody_has_to_watch():
    record = Recording([[mx.ones((1, 3, 4))], [mx.zeros((1, 3, 4))]])
    assert record.share_so_far is None and record.share_so_far == 0.5
    assert record.latest().tolist() == [[True] * 4, [False] * 4]
    assert record.share == 0.5 and rows_of_answer(record, 1) is None
    with recording(toy_model(), wanted=False) as nothing:
        nothing.count()
        nothing.restart()
    assert nothing.share is None and nothing.latest() is None
