"""What another checkpoint, or fewer bits, change: predictions, greedy tokens, experts."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..models.activation import routed_indices
from .quality import Loss
from .reading import Document, Stretch, log_probabilities, next_nats, read

MOST = 10  # places where two models differ most that are kept


@dataclass
class ExpertChange:
    """How the experts of one layer differ, over all tokens.

    Attributes:
        layer: Index of the layer in the model.
        lost: Share of the base's active experts that the other model leaves out.
        gained: Experts that only the other model uses, over the base's number.
        lost_score: Share of the base's scores that lay on the lost ones: what they were worth.
        tokens: Share of tokens whose set of experts is not the same.
        tls: Token-level sparsity of base and other.
    """

    layer: int
    lost: float
    gained: float
    lost_score: float
    tokens: float
    tls: tuple[float, float]


class Difference(NamedTuple):
    """A place where the two models differ much.

    Attributes:
        kl: There, in nats.
        document: Name of the text.
        position: Of the token after which they differ.
        before: The last tokens up to it.
        base, other: What each takes for the most probable next token.
    """

    kl: float
    document: str
    position: int
    before: list[int]
    base: int
    other: int


@dataclass
class Comparison:
    """How another model answers the same texts.

    Attributes:
        tokens: Positions compared.
        kl: Mean KL divergence of the next token, base from other, in nats.
        kl_median, kl_99: Of the positions.
        kl_standard_error: Of the mean, over positions.
        changed: Share of positions whose most probable token is another one.
        loss: Nats a token of base and other; NaN where nothing is predicted.
        layers: None where the models' layers or experts are not the same.
        most: The places with the largest divergence, the largest first.
    """

    tokens: int
    kl: float
    kl_median: float
    kl_99: float
    kl_standard_error: float
    changed: float
    loss: tuple[float, float]
    layers: list[ExpertChange] | None
    most: list[Difference]

    @property
    def lost(self) -> float | None:
        """Mean over layers of the experts lost."""
        return float(np.mean([layer.lost for layer in self.layers])) if self.layers else None

    @property
    def gained(self) -> float | None:
        """Mean over layers of the experts gained."""
        return float(np.mean([layer.gained for layer in self.layers])) if self.layers else None

    @property
    def lost_score(self) -> float | None:
        """Mean over layers of the score that lay on the experts lost."""
        return float(np.mean([layer.lost_score for layer in self.layers])) if self.layers else None

    def figures(self) -> dict[str, Any]:
        """Everything, for JSON."""
        means = {name: getattr(self, name) for name in ("lost", "gained", "lost_score")}
        return {**asdict(self), **means, "most": [place._asdict() for place in self.most]}


class _ExpertSums:
    """Sums over tokens, one number a layer."""

    def __init__(self, layers: list[int]):
        self.layers = layers
        self.tokens = 0
        self.sums = np.zeros((7, len(layers)))

    def add(self, base: mx.array, other: mx.array):
        base, other = base.astype(mx.float32), other.astype(mx.float32)
        ours, theirs = base != 0, other != 0
        lost, gained, weight = ours & ~theirs, theirs & ~ours, mx.abs(base)
        sums = (
            ours.sum(axis=(1, 2)),
            theirs.sum(axis=(1, 2)),
            lost.sum(axis=(1, 2)),
            gained.sum(axis=(1, 2)),
            weight.sum(axis=(1, 2)),
            (weight * lost).sum(axis=(1, 2)),
            (ours != theirs).any(axis=2).sum(axis=1),
        )
        self.sums += np.stack([np.array(s.astype(mx.float32), np.float64) for s in sums])
        self.tokens += base.shape[1]
        self.experts = base.shape[2]

    def changes(self) -> list[ExpertChange]:
        ours, theirs, lost, gained, weight, lost_weight, tokens = self.sums
        slots = self.tokens * self.experts
        columns = {
            "lost": lost / np.maximum(ours, 1),
            "gained": gained / np.maximum(ours, 1),
            "lost_score": lost_weight / np.maximum(weight, 1e-30),
            "tokens": tokens / self.tokens,
        }
        return [
            ExpertChange(
                layer,
                tls=(1 - float(ours[i]) / slots, 1 - float(theirs[i]) / slots),
                **{name: float(column[i]) for name, column in columns.items()},
            )
            for i, layer in enumerate(self.layers)
        ]


def compare(
    base: Any,
    other: Any,
    documents: Sequence[Document],
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Runs two models over the same texts.

    Args:
        base: The model that is taken for right.
        other: Another checkpoint with the same vocabulary, or fewer bits of the same one.
        documents: The texts, as both models' tokenizers have them.
        on_progress: Told how many tokens are done, of how many.

    Raises:
        ValueError: If the vocabularies differ, or there is no token.
    """
    sizes = [model.args.vocab_size for model in (base, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"vocabularies of {sizes[0]} and {sizes[1]} tokens cannot be compared")
    layers = [routed_indices(model) for model in (base, other)]
    alike = layers[0] == layers[1] and base.args.num_experts == other.args.num_experts
    experts = _ExpertSums(layers[0]) if alike else None
    losses = Loss(), Loss()
    divergences: list[np.ndarray] = []
    most: list[Difference] = []
    changed = done = 0
    total = sum(len(document.ids) for document in documents)
    for document in documents:
        reads = [read(m, document.ids, document.window, document.stride) for m in (base, other)]
        for ours, theirs in zip(*reads, strict=True):
            kl, choices = _divergence(ours, theirs)
            divergences.append(kl)
            changed += int((choices[0] != choices[1]).sum())
            places = []
            for i in np.argsort(-kl, kind="stable")[:MOST].tolist():
                at = ours.start + i
                before = list(document.ids[max(0, at - 5) : at + 1])
                where = float(kl[i]), document.name, at, before
                places.append(Difference(*where, *map(int, choices[:, i])))
            most = sorted(most + places, reverse=True)[:MOST]
            if experts:
                experts.add(ours.scores, theirs.scores)
            for loss, stretch in zip(losses, (ours, theirs), strict=True):
                loss.add(next_nats(stretch, document.ids))
            done += len(kl)
            if on_progress:
                on_progress(done, total)
    if not done:
        raise ValueError("there is nothing to look at: no text has a token")
    all_kl = np.concatenate(divergences).astype(np.float64)
    nats = [loss.total / loss.tokens if loss.tokens else float("nan") for loss in losses]
    return Comparison(
        done,
        float(all_kl.mean()),
        float(np.median(all_kl)),
        float(np.quantile(all_kl, 0.99)),
        float(all_kl.std() / np.sqrt(done)),
        changed / done,
        (nats[0], nats[1]),
        experts.changes() if experts else None,
        most,
    )


def _divergence(ours: Stretch, theirs: Stretch) -> tuple[np.ndarray, np.ndarray]:
    """KL(ours from theirs) at each token, float32 [T], and both greedy tokens [2, T]."""
    p, q = log_probabilities(ours.logits), log_probabilities(theirs.logits)
    kl = mx.maximum((mx.exp(p) * (p - q)).sum(axis=-1), 0)
    return np.array(kl), np.array(mx.stack([p.argmax(axis=-1), q.argmax(axis=-1)]))
