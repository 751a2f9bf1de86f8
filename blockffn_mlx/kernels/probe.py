"""Does a kernel work here? Each tile class is run against its twin at its first use on a machine.

A class that is wrong, raises or stalls is turned off alone. What was found is kept on disk
(`verdicts.py`), and so is a note of what is being tried: a start that hangs or crashes in a kernel
leaves the note behind, and the next one does without that class.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from threading import Timer
from time import monotonic
from typing import NamedTuple

import mlx.core as mx

from .. import device
from ..quantisation import Quantization
from . import verdicts
from .grouped_tiles import GroupedTile, grouped_tiles
from .kernel import Kernel
from .registry import KERNELS
from .samples import random_layer
from .tiles import MAX_TOKENS, Tile, tile_table

# A kernel may differ this much from its twin, relative to the largest value: a few roundings.
TOLERANCE = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 3e-2}

# Experts, expert size, hidden size and active experts of the layer that a probe runs. Eight experts
# and more, since fewer put the list of them into another address space; widths that every group
# size divides and that take a simdgroup more than one round.
SIZES = (12, 128, 1152, 7)

# A grouped tile is tried on a chunk longer by this than the shortest that takes it: no multiple of
# its tokens, and not all of them in one tile.
ODD_TOKENS = 85

# A class that takes longer than this stalls; compiling it takes one or two seconds.
STALL_SECONDS = 30.0
PATIENCE = 10.0  # seconds after which a user is told what takes so long


class KernelWarning(UserWarning):
    """A kernel stays off, or takes long at its first use."""


class TileClass(NamedTuple):
    """What is compiled alike, sizes of the layer aside.

    Attributes:
        kernel: Its name.
        backend: "metal" or "cuda".
        dtype: Of the activations.
        packing: Of the weights; None for plain ones, or for a kernel that takes none.
        tile: How a projection is cut; None for other kernels.
        shortest: The shortest chunk that takes the tile.
        longest: The longest one; None if there is none.
    """

    kernel: str
    backend: str
    dtype: mx.Dtype
    packing: Quantization | None = None
    tile: Tile | GroupedTile | None = None
    shortest: int = 1
    longest: int | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Chunk lengths to run: the longest and the shortest that take the tile."""
        if self.tile is None:
            return (13,)
        if isinstance(self.tile, GroupedTile):
            return (self.shortest + ODD_TOKENS,)
        return tuple(sorted({self.shortest, self.tile.tokens}, reverse=True))

    def takes(self, num_tokens: int) -> bool:
        """Whether a chunk of that length belongs to it."""
        return self.shortest <= num_tokens and (self.longest is None or num_tokens <= self.longest)

    @property
    def key(self) -> str:
        """Names it for what is kept on disk."""
        settings = [*(self.packing or ()), *(self.tile or ())]
        return " ".join([str(self), *map(str, settings)])

    def __str__(self) -> str:
        parts = [f"the {self.backend} kernel {self.kernel}"]
        if self.tile:
            first, last = self.shortest, self.longest
            if last is None:
                parts.append(f"for {first} tokens and more")
            else:
                parts.append(f"for {first} to {last} tokens" if last > first else "for 1 token")
        parts.append(f"in {str(self.dtype).removeprefix('mlx.core.')}")
        if self.packing:
            parts.append(f"with {self.packing.bits}-bit weights")
        return " ".join(parts)


def tile_classes(
    kernel: Kernel, backend: str, dtype: mx.Dtype, packing: Quantization | None
) -> list[TileClass]:
    """Every class of a kernel, by chunk length."""
    if not kernel.projection:
        return [TileClass(kernel.name, backend, dtype)]
    if kernel.long:
        classes, longest = [], None
        for pair in grouped_tiles(backend, dtype, packing):
            least, tile = max(pair.least, MAX_TOKENS + 1), getattr(pair, kernel.projection)
            classes.append(TileClass(kernel.name, backend, dtype, packing, tile, least, longest))
            longest = least - 1
        return classes
    tiles = [getattr(t, kernel.projection) for t in tile_table(backend, dtype, packing)]
    shortest = [1, *(tile.tokens + 1 for tile in tiles)]
    return [
        TileClass(kernel.name, backend, dtype, packing, tile, first, tile.tokens)
        for tile, first in zip(tiles, shortest, strict=False)
    ]


def works(
    kernel: Kernel,
    num_tokens: int,
    dtype: mx.Dtype,
    packing: Quantization | None = None,
    *,
    backend: str,
) -> bool:
    """Whether a kernel may be used on a chunk here; says once, in one line, if not.

    Where this machine has no such GPU nothing can be run and nothing is asked: a graph is being
    made for another machine.
    """
    if device.gpu_backend() != backend:
        return True
    classes = tile_classes(kernel, backend, dtype, packing)
    return verdict(next(c for c in classes if c.takes(num_tokens)))


@cache
def verdict(tile_class: TileClass) -> bool:
    """What is known about a class, or found by running it: at its first use on this machine."""
    kept = found = verdicts.kept(tile_class.key)
    if found is None:
        with verdicts.trying(tile_class.key):
            found = find_fault(tile_class) or verdicts.RIGHT
    # another time there may be enough memory, or another thread
    lasts = not any(word in found for word in ("memory", "Stream"))
    if lasts and kept in (None, verdicts.CRASHED):
        verdicts.keep(tile_class.key, found)
    if found != verdicts.RIGHT:
        warnings.warn(f"{tile_class} {found}; it stays off (blockffn-doctor)", KernelWarning, 2)
    return found == verdicts.RIGHT


def find_fault(tile_class: TileClass) -> str | None:
    """What is wrong with a class, or None."""
    kernel = KERNELS[tile_class.kernel]
    notice = Timer(PATIENCE, _say_that_it_takes_long, [tile_class])
    notice.daemon = True
    notice.start()
    begin = monotonic()
    try:
        for length in tile_class.lengths:
            if error := largest_error(kernel, tile_class, length):
                return error
            if (seconds := monotonic() - begin) > STALL_SECONDS:
                return f"stalls ({seconds:.0f} s for a tiny layer)"
    except Exception as error:  # whatever MLX raises when it builds or runs a kernel
        return f"does not run here ({' '.join(str(error).split())[:200]})"
    finally:
        notice.cancel()
    return None


def _say_that_it_takes_long(tile_class: TileClass):
    warnings.warn(
        f"{tile_class} is tried for the first time and takes long; should it never end, the next "
        "start does without it",
        KernelWarning,
        2,
    )


def largest_error(kernel: Kernel, tile_class: TileClass, length: int) -> str | None:
    """Runs a kernel and its twin on a chunk of that length."""
    packing = tile_class.packing
    bits = (packing.bits, packing.group_size) if packing else (0, 0)
    num_experts, expert_size, hidden_size, active = SIZES
    layer = random_layer(
        length, num_experts, expert_size, hidden_size, active, tile_class.dtype, bits
    )
    sample = kernel.sample(layer)
    found = kernel.run(sample, tile_class.backend)
    mx.eval(found)
    right = agree(found, kernel.exact(sample), tile_class.dtype)
    return None if right else "gives wrong results here"


def agree(found: Sequence[mx.array], exact: Sequence[mx.array], dtype: mx.Dtype) -> bool:
    """Whether a kernel's outputs are those of its twin, but for roundings of the dtype."""
    for mine, theirs in zip(found, exact, strict=True):
        difference = mx.abs(mine.astype(mx.float32) - theirs.astype(mx.float32)).max()
        if not (difference <= TOLERANCE[dtype] * mx.abs(theirs).max()).item():  # a NaN is not
            return False
    return True
