"""Texts as a model reads them, a stretch at a time, so that a long one need not fit in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..models.activation import record_router_scores
from ..prompt import check_ids

# Tokens per pass of a text that is one context.
PASS_LENGTH = 512


@dataclass(frozen=True)
class Document:
    """A text to look at.

    Attributes:
        name: What reports call it.
        ids: Token ids.
        window: Tokens of context at most, see `read`; None for all before.
        stride: Tokens that a window adds; None for as many as it has.
    """

    name: str
    ids: Sequence[int]
    window: int | None = None
    stride: int | None = None


class Stretch(NamedTuple):
    """Tokens `start` to `end` of a text, as the model saw them.

    Attributes:
        start, end: Of the tokens.
        scores: [L, T, E], finished router scores, evaluated.
        logits: [T, V], what follows each token; computed only where somebody asks.
    """

    start: int
    end: int
    scores: mx.array
    logits: mx.array


class Tokens(NamedTuple):
    """What a model did with some tokens of a text, on the host.

    Attributes:
        document: Index of the text.
        name: Its name.
        start: Position of the first token; 0 begins another text.
        ids: Token ids [T].
        texts: What each token says.
        nats: float32 [T], -log p of each token given those before it; NaN where there are none.
        scores: float32 [L, T, E], finished router scores; an expert is active where not 0.
    """

    document: int
    name: str
    start: int
    ids: Sequence[int]
    texts: list[str]
    nats: np.ndarray
    scores: np.ndarray


def read(
    model: Any, ids: Sequence[int], window: int | None = None, stride: int | None = None
) -> Iterator[Stretch]:
    """Runs a model over a text; every token comes once.

    Args:
        model: A BlockFFN or DECO model.
        ids: Token ids.
        window: Tokens in a pass, which begins from nothing. None: one context for the whole text.
        stride: New tokens in a pass, the rest of the window being what goes before them: with a
            stride below the window, a token has at least `window - stride` tokens of context.

    Raises:
        ValueError: For ids outside the vocabulary, or a stride longer than the window.
    """
    check_ids(ids, model.args.vocab_size)
    if window is not None and not 1 <= (stride or window) <= window:
        raise ValueError(f"a stride of {stride} does not fit into windows of {window} tokens")
    kept = model.make_cache() if window is None and len(ids) > PASS_LENGTH else None
    step = PASS_LENGTH if window is None else stride or window
    for start in range(0, len(ids), step):
        end = min(start + step, len(ids))
        context = start if window is None else max(0, start + step - window)
        with record_router_scores(model) as recorded:
            hidden = model.hidden(mx.array([list(ids[context:end])]), kept)
        new = start - context
        scores = mx.stack([layer[0][0, new:] for layer in recorded])
        mx.eval(scores)
        if kept is not None:
            mx.eval([layer.state for layer in kept])
        yield Stretch(start, end, scores, model.logits(hidden[0, new:]))


def log_probabilities(logits: mx.array) -> mx.array:
    """[T, V] -> float32 [T, V]."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def next_nats(stretch: Stretch, ids: Sequence[int]) -> np.ndarray:
    """-log p of the token behind each of a stretch's: float32 [T], one less at a text's end."""
    following = ids[stretch.start + 1 : stretch.end + 1]
    if not len(following):
        return np.zeros(0, np.float32)
    targets = mx.array(list(following))
    logits = stretch.logits[: len(targets)].astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return np.array(mx.logsumexp(logits, axis=-1) - chosen)


def watch(model: Any, documents: Sequence[Document], tokenizer: Any) -> Iterator[Tokens]:
    """Runs a model over texts and gives what its routers and its head said of each token.

    Args:
        model: A BlockFFN or DECO model.
        documents: The texts, one after the other; one without tokens gives nothing.
        tokenizer: Says what a token stands for.

    Raises:
        ValueError: As `read`.
    """
    text_of = cache(partial(token_text, tokenizer))
    for index, document in enumerate(documents):
        before = np.array([np.nan], np.float32)  # of the first token nothing is foretold
        for stretch in read(model, document.ids, document.window, document.stride):
            ids = list(document.ids[stretch.start : stretch.end])
            nats = np.concatenate([before, next_nats(stretch, document.ids)])
            before = nats[len(ids) :]
            scores = np.array(stretch.scores.astype(mx.float32))
            texts = [text_of(token) for token in ids]
            start = stretch.start
            yield Tokens(index, document.name, start, ids, texts, nats[: len(ids)], scores)


def token_text(tokenizer: Any, token: int) -> str:
    """What a token says in the midst of a text, where some tokenizers keep a space that begins it.

    A piece of a character is a replacement character.
    """
    return tokenizer.decode([token, token])[len(tokenizer.decode([token])) :]
