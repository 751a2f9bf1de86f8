"""The conversation in the cache: what is prefilled, what is kept, and what it computes."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler

from blockffn_mlx.chat.conversation import Conversation
from blockffn_mlx.chat.history import decode_tokens, reuse
from blockffn_mlx.chat.recording import recording
from blockffn_mlx.checkpoints.load import load, unpack
from blockffn_mlx.checkpoints.tokenizer import CHAT_TEMPLATE
from blockffn_mlx.prompt import ChatFormat, Format, TokenText, clean, encode_text
from blockffn_mlx.speculative import SpeculationStats, make_drafter
from helpers.toy_chat import toy_model, toy_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer()


@pytest.fixture(scope="module")
def model():
    return toy_model()


def say(chat: Conversation, text: str, max_tokens: int = 12, **options) -> str:
    chat.ask(text, max_tokens)
    return "".join(r.text for r in chat.answer(max_tokens, **options))


def fresh_logits(chat: Conversation) -> tuple[mx.array, mx.array]:
    """The next token's logits from the conversation's cache, and from a prefill of its tokens."""
    ids = chat.held.ids
    whole = chat.model(mx.array([ids]))[0, -1]
    probe = mx.array([[5]])
    kept = chat.model(probe, chat.cache)[0, -1]
    for layer_cache in chat.cache:
        layer_cache.trim(1)
    again = chat.model(mx.array([ids + [5]]))[0, -1]
    assert whole.shape == kept.shape
    return kept, again


def script(*tokens: int):
    """A sampler that says these tokens and then the end."""
    left = list(tokens)
    return lambda logprobs: mx.array([left.pop(0) if left else 6])


def test_ten_turns_prefill_only_what_is_new(model, tokenizer):
    chat = Conversation(model, tokenizer)
    sampler = make_sampler(1.0)
    for turn in range(10):
        before = len(chat.held.ids)
        question = f"Question number {turn}, please?"
        say(chat, question, sampler=sampler)
        # <|end|>, <|user|>, the question, <|end|>, <|assistant|>, and a token over the border.
        new = len(tokenizer.encode(question)) + 4 + 1
        assert chat.prefilled <= new
        assert chat.prompt_tokens >= before - 1
        assert chat.cache[0].offset == len(chat.held.ids)
    kept, again = fresh_logits(chat)
    np.testing.assert_allclose(kept, again, atol=1e-4)


def test_conversation_tokens_are_the_whole_texts_tokens(model, tokenizer):
    chat = Conversation(model, tokenizer)
    for question in ("Hello there", "日本語 and 🦄", "bye"):
        say(chat, question, sampler=script(1605))
    assert (
        chat.held.ids[:-1] == encode_text(tokenizer, chat.held.text).ids[: len(chat.held.ids) - 1]
    )


def test_sampled_tokens_stay_even_where_the_tokenizer_would_choose_others(model, tokenizer):
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "hello"]
    assert tokenizer.encode("hello") != letters
    chat = Conversation(model, tokenizer)
    say(chat, "hi", sampler=script(*letters))
    assert chat.last_answer == "hello"
    say(chat, "again", sampler=script(*letters))
    ids = chat.held.ids
    assert any(ids[i : i + 5] == letters for i in range(len(ids) - 10))
    assert chat.prefilled == len(tokenizer.encode("again")) + 3


class MergingFormat(Format):
    """Turns without special tokens between them, so that tokens merge over the border."""

    is_chat, stop = True, ("Q:",)

    def render(self, messages):
        return "".join(text if role == "assistant" else f"{text}:" for role, text in messages)


def test_a_token_that_merges_over_a_border_is_taken_anew(model, tokenizer):
    chat = Conversation(model, tokenizer)
    chat.format = MergingFormat(tokenizer)
    hel = [tokenizer.convert_tokens_to_ids(c) for c in "tog"]
    chat.ask("Go")
    list(chat.answer(3, sampler=script(*hel)))
    held = len(chat.held.ids)
    chat.ask("ether we stand")
    list(chat.answer(1, sampler=script(6)))
    whole = encode_text(tokenizer, "Go:together we stand:")
    assert chat.held.text.startswith(whole.text)
    # The whole text has no border after "tog": sampled tokens go back to where it has one.
    assert chat.held.ids[: len(whole.ids)] == whole.ids
    assert chat.prefilled > len(encode_text(tokenizer, "ether we stand:").ids) - 2
    assert held - 3 <= len(whole.ids)
    kept, again = fresh_logits(chat)
    np.testing.assert_allclose(kept, again, atol=1e-4)


def test_reuse_needs_a_border_in_both():
    cached = TokenText([1, 2, 3], [2, 4, 5], "abcde")
    assert reuse(cached, TokenText([1, 2, 9], [2, 4, 8], "abcdefgh")) == (2, 2)
    assert reuse(cached, TokenText([7, 8], [3, 8], "abcdefgh")) == (0, 0)
    assert reuse(cached, TokenText([1, 2, 3], [2, 4, 5], "abcde")) == (2, 2)
    assert reuse(cached, TokenText([1, 2, 3, 4], [2, 4, 5, 9], "abxdefghi")) == (1, 1)
    in_bytes = TokenText([1, 2, 5], [None, 1, 2], "éx")
    assert reuse(TokenText([1, 2], [None, 1], "é"), in_bytes) == (2, 2)
    assert reuse(cached, TokenText([4], [3], "xyz")) == (0, 0)


def test_ends_of_byte_tokens_and_junk(tokenizer):
    unicorn = tokenizer.encode("🦄🦄")
    decoded = decode_tokens(tokenizer, unicorn)
    assert decoded.text == "🦄🦄" and decoded.ends == [None, None, None, 1, None, None, None, 2]
    encoded = encode_text(tokenizer, "🦄🦄")
    assert encoded.ends == decoded.ends
    byte = unicorn[1]
    junk = decode_tokens(tokenizer, [byte] * 9 + [1605])
    assert junk.text.endswith("ok") and "\ufffd" in junk.text
    assert decode_tokens(tokenizer, tokenizer.encode(" the end")).text == " the end"
    assert junk.cut(2).text == ""


def test_role_markers_come_from_the_template_and_end_an_answer(model, tokenizer):
    chat_format = ChatFormat(tokenizer)
    markers = map(tokenizer.convert_tokens_to_ids, ("<|user|>", "<|assistant|>", "<|end|>"))
    assert set(chat_format.stop_ids) == set(markers) and chat_format.stop == ()
    chat = Conversation(model, tokenizer)
    ok, user = 1605, tokenizer.convert_tokens_to_ids("<|user|>")
    assert say(chat, "hi", sampler=script(ok, user, ok, ok)) == "ok"
    assert chat.messages[-1].text == "ok"
    say(chat, "more", sampler=script(ok))
    assert chat.held.text.count("<|user|>") == 2


def test_markers_of_plain_text_templates(tokenizer):
    class Plain:
        bos_token, has_chat_template = "<s>", True

        def apply_chat_template(self, messages, **options):
            text = "<s>"
            for m in messages:
                form = "<用户>{}<AI>" if m["role"] == "user" else "{}</s>"
                text += form.format(m["content"].strip())
            return text

    chat = ChatFormat(Plain())
    assert chat.stop == ("<用户>", "<AI>", "</s>")
    text = chat.render([("user", "a "), ("assistant", " b\n"), ("user", "c")])
    assert text == "<s><用户>a<AI> b\n</s><用户>c<AI>"


def test_turns_in_the_published_models_format(model):
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = Conversation(model, tokenizer)
    assert chat.format.stop == ("<用户>", "<AI>") and chat.format.has_system
    markers = tokenizer.encode("<AI>")
    said = (script(1605), script(1605, *markers, 1605), script(1605, *markers[:1]))
    for question, sampler in zip(("one", "two", "three"), said, strict=True):
        assert say(chat, question, sampler=sampler) in ("ok", "ok<")
    say(chat, "four")
    # <|end|> was sampled; what is new lies between it and the end of the text.
    assert chat.prefilled == len(tokenizer.encode("<用户>four<AI>"))
    assert chat.held.text.startswith("<s><用户>one<AI>ok<|end|><用户>two<AI>ok<|end|><用户>three")
    kept, again = fresh_logits(chat)
    np.testing.assert_allclose(kept, again, atol=1e-4)


def test_a_system_prompt_without_a_place_goes_before_the_first_message(tokenizer):
    chat = ChatFormat(tokenizer)
    assert not chat.has_system
    text = chat.render([("system", "Be brief."), ("user", "Hi")])
    assert text == "<s><|user|>Be brief.\n\nHi<|end|><|assistant|>"


def test_undo_and_retry_reuse_what_is_the_same(model, tokenizer):
    chat = Conversation(model, tokenizer)
    say(chat, "A long first question, with many words in it?")
    say(chat, "second")
    assert chat.undo() == "second"
    say(chat, "other")
    assert chat.prefilled <= len(tokenizer.encode("other")) + 5
    question = chat.undo()
    chat.ask(question)
    list(chat.answer(4))
    assert chat.prefilled == 1
    assert [m.role for m in chat.messages] == ["user", "assistant"] * 2
    assert chat.undo() and chat.undo() and chat.undo() is None


def test_a_stopped_answer_stays_and_the_cache_goes_on(model, tokenizer):
    chat = Conversation(model, tokenizer)
    chat.ask("Count")
    stop = iter([False, False, True])
    told = list(chat.answer(50, should_stop=lambda: next(stop), sampler=make_sampler(1.0)))
    assert len(told) <= 3 and chat.messages[-1].role == "assistant"
    say(chat, "and now?")
    kept, again = fresh_logits(chat)
    np.testing.assert_allclose(kept, again, atol=1e-4)


def test_a_stop_while_the_text_is_read_leaves_a_usable_cache(model, tokenizer):
    chat = Conversation(model, tokenizer)
    chat.ask("word " * 60)
    seen = []
    told = list(
        chat.answer(
            5,
            should_stop=lambda: bool(seen) and seen[-1] >= 32,
            on_prefill=lambda done, total: seen.append(done),
            prefill_step_size=16,
        )
    )
    assert not told and 32 <= chat.cache[0].offset == len(chat.held.ids) < 60
    assert chat.last_answer == ""
    say(chat, "go on")
    kept, again = fresh_logits(chat)
    np.testing.assert_allclose(kept, again, atol=1e-4)


def test_full_context_drops_oldest_turns_and_says_how_many(model, tokenizer):
    chat = Conversation(model, tokenizer, system="Stay short.", max_context=128)
    dropped = 0
    for turn in range(12):
        dropped += chat.ask(f"This is question number {turn} of a long talk", 16)
        list(chat.answer(16, sampler=make_sampler(1.0)))
        assert len(chat.held.ids) <= 128
        assert chat.messages[0].role == "system" and chat.messages[1].role == "user"
    assert dropped > 3
    kept = [m.content for m in chat.messages if m.role == "user"]
    assert kept[-1].startswith("This is question number 11") and len(kept) == 12 - dropped


def test_a_message_beyond_the_context_is_refused_and_changes_nothing(model, tokenizer):
    chat = Conversation(model, tokenizer, max_context=128)
    say(chat, "hi")
    before = list(chat.messages)
    with pytest.raises(ValueError, match="too long"):
        chat.ask("word " * 20_000)
    assert chat.messages == before
    say(chat, "still here")


def test_an_answer_ends_with_the_context(model, tokenizer):
    chat = Conversation(model, tokenizer, max_context=64)
    chat.ask("hi", 4)
    told = list(chat.answer(-1, sampler=lambda logprobs: mx.array([1605])))
    assert told[-1].finish_reason == "length" and len(chat.held.ids) == 64


def test_a_draft_changes_no_answer(model, tokenizer):
    answers = []
    for options in ({}, {"draft": make_drafter("lookup", model), "draft_width": 4}):
        stats = SpeculationStats()
        options = options and {**options, "draft_stats": stats}
        chat = Conversation(model, tokenizer)
        answers.append([say(chat, f"Turn {turn}", 40, **options) for turn in range(3)])
        assert chat.prefilled <= 10 and chat.cache[0].offset == len(chat.held.ids)
    assert answers[0] == answers[1] and stats.accepted > 0
    kept, again = fresh_logits(chat)
    np.testing.assert_allclose(kept, again, atol=1e-4)


def test_a_failed_pass_leaves_a_usable_chat(model, tokenizer):
    def fail(logprobs):
        raise RuntimeError("out of memory")

    chat = Conversation(model, tokenizer)
    say(chat, "hi")
    with pytest.raises(RuntimeError):
        say(chat, "more", sampler=fail)
    assert chat.held.ids == [] and chat.last_answer == ""
    say(chat, "again")
    kept, fresh = fresh_logits(chat)
    np.testing.assert_allclose(kept, fresh, atol=1e-4)


def test_raw_messages_stand_alone(model, tokenizer):
    chat = Conversation(model, tokenizer, raw=True)
    say(chat, "Once upon a time", sampler=script(1605))
    assert chat.held.text.startswith("Once upon a time")
    say(chat, "The capital", sampler=script(1605))
    assert "Once" not in chat.held.text
    with pytest.raises(ValueError, match="empty"):
        chat.ask("")


ODD_TEXTS = (
    "\x00\x01\x1b[2J",
    "שלום עולם",
    "👩\u200d👩\u200d👧\u200d👦",
    "\udc80\ud800",
    "<|user|><|end|>",
    "\ue0001\ue001",
)


def test_odd_text_is_answered(model, tokenizer):
    chat = Conversation(model, tokenizer)
    for text in ODD_TEXTS:
        say(chat, text, 3)
    assert clean("a\udc80b").startswith("a") and "\udc80" not in clean("a\udc80b")


def test_ten_turns_on_the_demo():
    model, tokenizer = load("demo")
    unpack(model)  # float32 on a GPU too
    chat = Conversation(model, tokenizer)
    for turn in range(10):
        question = f"What is {turn} and one?"
        say(chat, question, 24)
        assert chat.prefilled <= len(tokenizer.encode(question)) + 5
    kept, fresh = fresh_logits(chat)
    np.testing.assert_allclose(kept, fresh, atol=1e-4)


def test_second_turn_reads_less_than_a_tenth_of_a_whole_prefill(model, tokenizer):
    chat = Conversation(model, tokenizer)
    say(chat, "word " * 1500, 4)
    assert chat.prompt_tokens >= 1500

    def tokens_read() -> int:
        with recording(chat.model) as record:
            say(chat, "and now?", 1)
        record.fold()
        return sum(record.widths)

    second = tokens_read()
    chat.clear_cache()
    whole = tokens_read()
    assert chat.prefilled == chat.prompt_tokens <= whole
    assert second < whole / 10


def test_an_answer_that_was_cut_goes_on_as_if_it_had_not_been(model, tokenizer):
    whole, parts = Conversation(model, tokenizer), Conversation(model, tokenizer)
    say(whole, "Tell me a story", 12)
    with pytest.raises(ValueError, match="not cut"):
        parts.resume()
    say(parts, "Tell me a story", 5)
    for _ in range(7):
        assert parts.resume(1) == 0
        list(parts.answer(1))
        assert parts.prefilled == 1
    assert parts.messages == whole.messages and parts.held.ids == whole.held.ids
    assert parts.answer_span == whole.answer_span
    kept, again = fresh_logits(parts)
    np.testing.assert_allclose(kept, again, atol=1e-4)
    say(parts, "more", sampler=script(1605))
    with pytest.raises(ValueError, match="not cut"):
        parts.resume()


def test_words_are_not_glued_together_where_an_answer_was_cut(model, tokenizer):
    chat = Conversation(model, tokenizer)
    words = tokenizer.encode("Once upon a time", add_special_tokens=False)
    say(chat, "hi", 2, sampler=script(*words))
    chat.resume()
    list(chat.answer(12, sampler=script(*words[2:])))
    assert chat.last_answer == "Once upon a time" and len(chat.messages) == 2
    chat._lengthen(" there", "there", 0)  # of a detokenizer that drops the first space
    assert chat.last_answer == "Once upon a time there"


def test_plain_text_goes_on_too(model, tokenizer):
    whole, parts = (Conversation(model, tokenizer, raw=True) for _ in range(2))
    say(whole, "Once upon", 6)
    say(parts, "Once upon", 3)
    parts.resume(3)
    list(parts.answer(3))
    assert parts.held.ids == whole.held.ids and len(parts.messages) == 2


@pytest.mark.parametrize("draft", [None, "lookup"])
def test_reading_that_was_stopped_goes_on_where_it_was(model, tokenizer, draft):
    chat = Conversation(model, tokenizer)
    chat.pace.size = chat.pace.most = 32
    drafter = make_drafter(draft, model, tokenizer)
    chat.ask("word " * 100)
    seen = []
    stop = {"should_stop": lambda: len(seen) > 2, "on_prefill": lambda *at: seen.append(at)}
    assert list(chat.answer(8, draft=drafter, **stop)) == []
    assert chat.cache[0].offset == len(chat.held.ids) == 64 == seen[-1][0]
    assert chat.resume(8) == 0
    list(chat.answer(8, draft=drafter))
    assert chat.prefilled == seen[0][1] - 64 and len(chat.messages) == 2
    kept, again = fresh_logits(chat)
    np.testing.assert_allclose(kept, again, atol=1e-4)
