"""What holds for every text that a cache has and every new one: what of it can be reused."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from blockffn_mlx.chat.history import decode_tokens, reuse
from blockffn_mlx.checkpoints.tokenizer import read_tokenizer
from blockffn_mlx.prompt import TokenText
from helpers.models import GOLDEN

few = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def token_texts(draw, text: str) -> TokenText:
    """The text cut into tokens at any places, some of which end inside a character."""
    ends, at = [], 0
    while at < len(text):
        at += draw(st.integers(1, 3))
        at = min(at, len(text))
        ends += [None] * draw(st.sampled_from([0, 0, 0, 1, 2])) + [at]
    return TokenText(list(range(len(ends))), ends, text)


@few
@given(st.text("ab<>é", max_size=12), st.text("ab<>é", max_size=8), st.data())
def test_reuse_keeps_the_longest_part_that_both_have_whole(shared, rest, data):
    other = data.draw(st.text("ab<>é", max_size=8))
    cached = data.draw(token_texts(shared + rest))
    wanted = data.draw(token_texts(shared + other))
    kept, stand_for = reuse(cached, wanted)
    pairs = [
        (i, j)
        for i, j in itertools.product(range(1, len(cached.ends) + 1), range(1, len(wanted.ends)))
        if cached.ends[i - 1] is not None
        and cached.ends[i - 1] == wanted.ends[j - 1]
        and cached.text[: cached.ends[i - 1]] == wanted.text[: wanted.ends[j - 1]]
    ]
    assert (kept, stand_for) == max(pairs, default=(0, 0))


class _Fast:
    """As much of a loaded tokenizer as decoding asks for."""

    backend_tokenizer = read_tokenizer(GOLDEN / "gqa_block", 384).tokenizer


@few
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_the_ends_of_decoded_tokens_add_up_to_their_text(text):
    ids = _Fast.backend_tokenizer.encode(text, add_special_tokens=False).ids
    found = decode_tokens(_Fast, ids)
    ends = [end for end in found.ends if end is not None]
    assert found.ids == ids and len(found.ends) == len(ids)
    assert ends == sorted(ends) and (ends[-1:] or [0]) == [len(found.text)]
    cut = found.cut(len(ids) // 2).joined(decode_tokens(_Fast, ids[len(ids) // 2 :]))
    if not ids or found.ends[len(ids) // 2 - 1] is not None:
        assert cut.text == found.text
