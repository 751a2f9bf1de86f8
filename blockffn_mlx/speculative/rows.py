"""Which rows of the caches count, while rows of rejected nodes still lie among them."""

from mlx_lm.models.cache import KVCache

from .. import device
from .tree import MAX_NODES
from .verify import keep_path

# Rows that may lie about on a GPU: moving an accepted path takes four launches a layer, 9 ms of a
# round of 23 on an H200 (bench/spec_h200.json), and every pass reads past them instead.
MOST_LOOSE = 2 * MAX_NODES


class CacheRows:
    """The rows of a sequence in its caches: those in order, and a window of loose ones behind.

    Args:
        cache: One a layer, alike.
        most: Rows of the window before they are moved together; 0 to move them at once, None for
            what suits this machine: a CPU launches nothing, and so has nothing to save.

    Attributes:
        in_order: Rows from the start, each the next token's.
        loose: Places behind them of the tokens that follow, in order.
        width: Rows behind those in order, counted or not.
    """

    def __init__(self, cache: list[KVCache], most: int | None = None):
        self.cache, self.in_order = cache, cache[0].offset
        if most is None:
            most = 0 if device.compute_backend() == "cpu" else MOST_LOOSE
        self.most, self.width = most, 0
        self.loose: list[int] = []

    def __len__(self) -> int:
        """Tokens of the sequence."""
        return self.in_order + len(self.loose)

    def extend(self, count: int) -> None:
        """Passes in order added rows; only where none is loose."""
        assert not self.loose, "rows in order cannot stand behind loose ones"
        self.in_order += count

    def keep(self, num_nodes: int, path: list[int]) -> None:
        """A pass over a tree added `num_nodes` rows, of which those of `path` count from now on."""
        self.loose += [self.width + node for node in path]
        # Those at the front of the window are in order.
        count = next((i for i, row in enumerate(self.loose) if row != i), len(self.loose))
        self.in_order += count
        self.loose = [row - count for row in self.loose[count:]]
        self.width = self.loose[-1] + 1 if self.loose else 0
        self.drop_others()
        if self.width > self.most:
            self.compact()

    def drop_others(self) -> None:
        """Drops whatever lies behind the window, as a pass that was broken off leaves it."""
        for layer_cache in self.cache:
            layer_cache.trim(layer_cache.offset - self.in_order - self.width)

    def compact(self) -> None:
        """Moves the rows that count together."""
        if self.loose:
            keep_path(self.cache, self.width, self.loose)
            self.in_order += len(self.loose)
            self.loose, self.width = [], 0
