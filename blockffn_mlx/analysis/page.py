"""One page of HTML that shows which experts texts use: self-contained, for any browser."""

import base64
import html
import json
import math
from collections import Counter
from importlib.resources import files
from typing import Any

import mlx.core as mx
import numpy as np

from .export import Shape
from .reading import Tokens
from .usage import ChunkUnion, Usage

SHOWN = 1000  # tokens that the maps show; all count in the statistics
UNION_LENGTHS = (1, 2, 4, 8, 16, 32, 64)
STRONGEST = 32  # tokens kept of each expert
CONTEXTS = 8  # of them with the text around
AROUND = 8  # tokens on either side
# What could end the script that holds the data, or a line of it.
ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


class Page:
    """Collects what the page shows, a stretch of tokens at a time.

    Args:
        title: The model's name.
        shape: Of what will come.
        chunk: Window of chunk-level sparsity.
    """

    def __init__(self, title: str, shape: Shape, chunk: int = 8):
        self.title, self.shape = title, shape
        self.usage = Usage(chunk)
        self.unions = [ChunkUnion(length) for length in UNION_LENGTHS]
        grid = (len(shape.layers), shape.experts)
        self.together = np.zeros((*grid, shape.experts), np.float32)
        self.strongest = np.zeros((*grid, STRONGEST), np.float32)
        self.where = np.zeros((*grid, STRONGEST), np.int64)
        self.texts: list[str] = []
        self.documents: list[int] = []
        self.names: dict[int, str] = {}
        self.nats: list[float] = []
        self.shown: list[np.ndarray] = []

    def add(self, tokens: Tokens):
        """The next tokens."""
        scores, begins = mx.array(tokens.scores), tokens.start == 0
        self.usage.add(scores, begins)
        for union in self.unions:
            union.add(scores, begins)
        active = (scores != 0).astype(mx.float32)
        self.together += np.array(active.swapaxes(1, 2) @ active)
        self._keep_strongest(np.abs(tokens.scores).swapaxes(1, 2))
        if len(self.texts) < SHOWN:
            self.shown.append(np.abs(tokens.scores)[:, : SHOWN - len(self.texts)])
            self.nats += tokens.nats.tolist()
        self.names[tokens.document] = tokens.name
        self.texts += tokens.texts
        self.documents += [tokens.document] * len(tokens.texts)

    def _keep_strongest(self, scores: np.ndarray):
        """Merges the scores [L, E, T] of new tokens into the strongest of each expert."""
        where = np.broadcast_to(np.arange(scores.shape[2]) + len(self.texts), scores.shape)
        scores = np.concatenate([self.strongest, scores], axis=2)
        where = np.concatenate([self.where, where], axis=2)
        order = np.argsort(-scores, axis=2, kind="stable")[..., :STRONGEST]
        self.strongest = np.take_along_axis(scores, order, axis=2)
        self.where = np.take_along_axis(where, order, axis=2)

    def render(self, facts: dict[str, str] | None = None) -> str:
        """The page.

        Args:
            facts: Further figures for its head, by name.

        Raises:
            ValueError: If there was no token.
        """
        text = json.dumps(self.data(facts or {}), ensure_ascii=False, separators=(",", ":"))
        parts = {
            "TITLE": html.escape(f"{self.title}: experts in use"),
            "STYLE": _resource("page.css"),
            "SCRIPT": _resource("page.js"),
            "DATA": text.translate(ESCAPES),
        }
        page = _resource("page.html")
        pieces = page.split("%%")  # text, name, text, name, ...
        return "".join(parts[p] if i % 2 else p for i, p in enumerate(pieces))

    def data(self, facts: dict[str, str]) -> dict[str, Any]:
        """What the page's script reads."""
        report = self.usage.report()
        shown = np.concatenate(self.shown, axis=1)
        scale = shown.max(axis=(1, 2), keepdims=True)
        counts = np.maximum(self.usage.counts, 1)[..., None]
        unions = [u for u in self.unions if u.union is not None]
        return {
            "title": self.title,
            "facts": facts,
            "chunk": report.chunk,
            "tokens": self.usage.tokens,
            "layers": self.shape.layers,
            "experts": self.shape.experts,
            "names": [self.names[i] for i in sorted(self.names)],
            "texts": self.texts[: shown.shape[1]],
            "documents": self.documents[: shown.shape[1]],
            "nats": _numbers(self.nats[: shown.shape[1]]),
            # A byte a score, rounded up, so that an active expert is never 0.
            "scores": _bytes(np.ceil(shown / np.maximum(scale, 1e-30) * 255)),
            "scale": _numbers(scale[:, 0, 0]),
            "share": [_numbers(row) for row in self.usage.share],
            "together": _bytes(np.round(self.together / counts * 255)),
            "lengths": [u.length for u in unions],
            "unions": [_numbers(u.union) for u in unions],
            "tls": _numbers(report.tls_per_layer),
            "cls": _numbers(report.cls_per_layer),
            "reuse": _numbers(report.reuse_per_layer),
            "strongest": [
                [self._contexts(*pair) for pair in zip(scores, where, strict=True)]
                for scores, where in zip(self.strongest, self.where, strict=True)
            ],
        }

    def _contexts(self, scores: np.ndarray, where: np.ndarray) -> dict[str, Any]:
        """An expert's strongest tokens, counted, and the first of them in their texts."""
        places = [int(at) for at, score in zip(where, scores, strict=True) if score > 0]
        tokens = Counter(self.texts[at] for at in places).most_common(10)
        contexts = []
        for at, score in zip(places[:CONTEXTS], scores.tolist(), strict=False):
            own = [i for i in range(max(0, at - AROUND), at + AROUND + 1) if i < len(self.texts)]
            own = [i for i in own if self.documents[i] == self.documents[at]]
            before = "".join(self.texts[i] for i in own if i < at)
            after = "".join(self.texts[i] for i in own if i > at)
            contexts.append([round(score, 4), before, self.texts[at], after])
        return {"tokens": tokens, "contexts": contexts}


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _bytes(array: np.ndarray) -> str:
    return base64.b64encode(array.astype(np.uint8).tobytes()).decode()


def _numbers(values: Any) -> list[float | None]:
    """Numbers as JSON knows them: NaN is null."""
    return [None if math.isnan(v) else round(float(v), 5) for v in values]
