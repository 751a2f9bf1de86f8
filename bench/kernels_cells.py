"""What the kernel benchmark measures: shapes, chunk lengths, unions, and the tiles that compete."""

from collections.abc import Iterable
from typing import NamedTuple


class Group(NamedTuple):
    """Cells of one weight shape and format.

    Attributes:
        hidden_size, expert_size, experts: The layer.
        layers: Different layers that one replay goes through.
        bits: Of the quantised weights, or None.
        tokens: Chunk lengths.
        unions: Active experts.
    """

    hidden_size: int
    expert_size: int
    experts: int
    layers: int
    bits: int | None
    tokens: tuple[int, ...]
    unions: tuple[int, ...]


GROUPS = {
    "2048x128x128": Group(2048, 128, 128, 36, None, (1, 2, 4, 8, 16, 32, 64), (16, 40, 128)),
    "4096x128x512": Group(4096, 512, 128, 12, None, (1, 8, 32), (16,)),
    "4096x128x512 4-bit": Group(4096, 512, 128, 24, 4, (1, 8, 32), (16,)),
    "4096x128x512 8-bit": Group(4096, 512, 128, 12, 8, (1, 8, 32), (16,)),
    "8192x64x1024": Group(8192, 1024, 64, 10, None, (1, 8, 32), (8,)),
}

# Competing tiles by the columns they hold: (octets, simdgroups, depth, ahead).
TILES = {
    8: [
        (2, 8, 4, True),
        (2, 8, 2, True),
        (2, 16, 2, True),
        (2, 16, 4, True),
        (2, 4, 4, True),
        (2, 4, 8, True),
        (4, 8, 2, True),
        (4, 16, 1, True),
        (2, 16, 2, False),
    ],
    16: [(2, 8, 2, True), (2, 8, 4, True), (2, 16, 2, True), (4, 8, 2, True), (4, 8, 2, False)],
    32: [
        (2, 8, 2, False),
        (2, 8, 4, False),
        (2, 8, 2, True),
        (2, 16, 2, False),
        (2, 16, 1, True),
        (4, 8, 2, False),
        (4, 8, 1, True),
        (4, 8, 2, True),
        (4, 4, 4, False),
    ],
    64: [(2, 8, 2, False), (2, 8, 4, False), (2, 8, 1, True), (4, 4, 2, False), (4, 4, 4, False)],
}

# More of them for packed weights, of which a window is fewer bytes.
PACKED_TILES = {
    8: [
        (4, 8, 4, False),
        (4, 8, 2, False),
        (4, 16, 2, False),
        (2, 16, 4, False),
        (8, 8, 1, False),
        (8, 8, 2, False),
        (8, 16, 1, False),
        (8, 4, 4, False),
    ],
    32: [(4, 8, 4, False), (2, 16, 4, False), (8, 4, 1, False)],
}

# Competing numbers of threadgroups that go round the tiles of the up projection.
MAX_GROUPS = (264, 396, 528)


def bucket(tokens: int) -> int:
    """Columns of the tile that takes a chunk."""
    return next(columns for columns in TILES if columns >= tokens)


def variants(groups: Iterable[str]) -> list[dict]:
    """Every kernel to compile."""
    found = []
    for key in groups:
        group = GROUPS[key]
        for columns in sorted({bucket(tokens) for tokens in group.tokens}):
            packed = PACKED_TILES.get(columns, []) if group.bits else []
            for octets, *rest in TILES[columns] + packed:
                tile = (columns, True, octets, *rest)
                shape = {
                    "group": key,
                    "hidden_size": group.hidden_size,
                    "expert_size": group.expert_size,
                    "experts": group.experts,
                    "bits": group.bits,
                    "tile": tile,
                }
                found += [{"name": name, **shape} for name in ("up", "down")]
    return found
