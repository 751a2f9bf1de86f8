"""What the feed-forward layer should cost on an Apple chip: bytes over bandwidth, plus launches.

A prediction, and no measurement: nothing here has run on the chips it names. The byte counts are
those of the kernels themselves (the tests compare them with counted loads and stores); bandwidths
and the cost of a launch are other people's figures. Arithmetic is taken to be free, which small
chips will not keep up with at 32 tokens or more.
"""

import re
from dataclasses import dataclass

# Memory bandwidth in GB/s as Apple publishes it; where a chip comes with two GPUs, both.
CHIPS = {
    "M1": 68,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M2 Ultra": 800,
    "M3": 102,
    "M3 Pro": 150,
    "M3 Max 30-core": 300,
    "M3 Max": 400,
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max 32-core": 410,
    "M4 Max": 546,
    "M5": 153,
    "M5 Pro": 307,
    "M5 Max 32-core": 460,
    "M5 Max": 614,
}

# Share of the published bandwidth that streaming kernels are reported to reach.
STREAMING = (0.70, 0.85)

# Seconds for one of a chain of small dependent kernels in MLX: 8.8 ms for 3,200 of them on an
# M3 Ultra (ml-explore/mlx issue 4521). Taken for every chip.
LAUNCH = 2.75e-6

UNION_LAUNCHES = 2  # up, down
DENSE_LAUNCHES = 4  # up, activation, score, down


@dataclass(frozen=True)
class Layer:
    """Sizes of one feed-forward layer.

    Attributes:
        hidden_size: H.
        expert_size: d.
        num_experts: E.
        itemsize: Bytes of an activation, a score, a plain weight, a scale.
        bits: Of a quantised weight; None for plain ones.
        group_size: Weights that share a scale and a bias, if quantised.
    """

    hidden_size: int
    expert_size: int
    num_experts: int
    itemsize: int = 2
    bits: int | None = None
    group_size: int = 64

    def projection_bytes(self) -> int:
        """Bytes of one projection of one expert, scales and biases included."""
        weights = self.hidden_size * self.expert_size
        if self.bits is None:
            return weights * self.itemsize
        return weights * self.bits // 8 + 2 * weights // self.group_size * self.itemsize

    def union_bytes(self, tokens: int, active: int) -> dict[str, int]:
        """Bytes that each kernel moves from and to memory once.

        Args:
            tokens: T, in the chunk.
            active: Experts in the union.

        Returns:
            {"up": ..., "down": ...}: weights of the union, inputs, and what is written.
        """
        weights = active * self.projection_bytes()
        scores = tokens * self.num_experts
        hidden = active * tokens * self.expert_size
        stream = tokens * self.hidden_size
        moved = weights + (scores + hidden + stream) * self.itemsize
        return {"up": moved, "down": moved}  # x comes in and h goes out, then the reverse

    def dense_bytes(self, tokens: int) -> int:
        """Bytes that all experts for all tokens move."""
        return sum(self.union_bytes(tokens, self.num_experts).values())


@dataclass(frozen=True)
class Prediction:
    """Seconds for one layer, as (fastest, slowest); divide by nothing, multiply by layers."""

    union: tuple[float, float]
    dense: tuple[float, float]
    union_bytes: int
    dense_bytes: int

    @property
    def ratio(self) -> tuple[float, float]:
        """Time of the union over dense, at the same share of the bandwidth."""
        first, second = (u / d for u, d in zip(self.union, self.dense, strict=True))
        return min(first, second), max(first, second)


def find_chip(name: str) -> str:
    """The table's name for a chip as people and MLX write it ("Apple M4 Max", "m4-max").

    Raises:
        ValueError: For a chip that the table does not hold.
    """
    plain = re.sub(r"apple|[^a-z0-9]", "", name.lower())
    for chip in CHIPS:
        if re.sub(r"[^a-z0-9]", "", chip.lower()) == plain:
            return chip
    raise ValueError(f"no chip {name!r} in the table: use one of {', '.join(CHIPS)}")


def predict(chip: str, layer: Layer, tokens: int, active: int) -> Prediction:
    """Predicts one layer's time on a chip.

    Args:
        chip: A name of CHIPS.
        layer: The layer's sizes.
        tokens: T, in the chunk.
        active: Experts in the union.

    Raises:
        ValueError: If more experts are active than there are.
    """
    if not 0 <= active <= layer.num_experts:
        raise ValueError(f"{active} of {layer.num_experts} experts cannot be active")
    moved = sum(layer.union_bytes(tokens, active).values())
    dense = layer.dense_bytes(tokens)
    return Prediction(
        seconds(chip, moved, UNION_LAUNCHES), seconds(chip, dense, DENSE_LAUNCHES), moved, dense
    )


def seconds(chip: str, moved: int, launches: int) -> tuple[float, float]:
    """(fastest, slowest) for so many bytes and launches on a chip."""
    slow, fast = (moved / (share * CHIPS[chip] * 1e9) + launches * LAUNCH for share in STREAMING)
    return fast, slow
