"""The union of the experts that a chunk of tokens uses, counted on the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..sparsity import record_router_scores


@dataclass
class Union:
    """What the passes inside a `watch_union` block used."""

    recorded: list[list[mx.array]]

    def ratio(self) -> mx.array:
        """Fraction of experts that some token of the last pass used, over all layers: 1 - CLS.

        A scalar that nothing has computed yet, so that it comes with the round's one sync.
        """
        scores = mx.concatenate([passes[-1] for passes in self.recorded])  # [layers, n, E]
        return mx.mean(mx.any(scores != 0, axis=1).astype(mx.float32))


@contextmanager
def watch_union(model: Any) -> Iterator[Union]:
    """Watches which experts the model uses inside the block."""
    with record_router_scores(model) as recorded:
        yield Union(recorded)
