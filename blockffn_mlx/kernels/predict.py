"""What work should cost on a chip: bytes over bandwidth, arithmetic, launches, and the host.

A prediction, and no measurement. The constants are other people's measurements on these chips where
there are any, and their neighbours' where there are none; docs/predictions.md names them and shows
how far predictions were off wherever a measurement could be compared.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from .graph import Graph, Launch

# Share of the nominal arithmetic that well-written kernels reach.
ARITHMETIC_REACH = 0.75

# Issue slots for each weight and row of MLX's product of packed weights with few rows; fits its
# times at 2 to 8 rows on an M5 Max. From so many rows on MLX takes matrix units.
PACKED_SLOTS = 2.4
PACKED_MATRIX_ROWS = 12
# Issue slots to bring a stored weight into a register, in this package's kernels.
UNPACK_SLOTS = {4: 2.1, 8: 2.1}

# Share of what large products reach that the grouped ones do, on an H200.
GROUPED_REACH = 0.25

COMMAND_BUFFER = 20e-6  # seconds between two command buffers on Metal


@dataclass(frozen=True)
class Chip:
    """A chip's constants.

    Attributes:
        published: Memory bandwidth as the maker gives it, GB/s; 0 where it plays no part.
        bandwidth: What streaming kernels reach, GB/s.
        teraflops: Nominal float32 arithmetic of its shader cores.
        launch: Microseconds that a launch adds on the GPU in a chain of dependent ones.
        measured: Whether the bandwidth was measured on this very chip.
        packed_bandwidth: Likewise, of MLX's products with packed weights, where it is known to be
            less.
        matrix_teraflops: What large matrix products reach; ARITHMETIC_REACH of teraflops if None.
        limits: Launches, and Mi elements, after which MLX commits a command buffer; None on CUDA.
        build: Microseconds of Python for each node of the graph.
        encode: Microseconds of the host for each launch.
        encode_product: The same for plain products with one row, and with more.
        encode_custom: The same for this package's kernels.
    """

    published: float
    bandwidth: float
    teraflops: float
    launch: float = 4.0
    measured: bool = False
    packed_bandwidth: float | None = None
    matrix_teraflops: float | None = None
    limits: tuple[int, int] | None = (40, 40)
    build: float = 1.0
    encode: float = 0.61
    encode_product: tuple[float, float] = (0.61, 0.61)
    encode_custom: float = 0.61


def _large(
    published: float, bandwidth: float, teraflops: float, launch: float = 4.0, **settings: Any
) -> Chip:
    return Chip(published, bandwidth, teraflops, launch, limits=(50, 50), **settings)


CHIPS = {
    "M1": Chip(68, 60, 2.6, 5.2, measured=True),
    "M1 Pro": Chip(200, 170, 5.2, 5.2),
    "M1 Max": _large(400, 318, 10.4, 5.2, measured=True),
    "M1 Ultra": _large(800, 470, 20.8, 10.0),
    "M2": Chip(100, 88, 3.6),
    "M2 Pro": Chip(200, 170, 6.8),
    "M2 Max": _large(400, 340, 13.6),
    "M2 Ultra": _large(800, 470, 27.2),
    "M3": Chip(102, 90, 3.5, 2.75),
    "M3 Pro": Chip(150, 135, 6.4, 2.75),
    "M3 Max 30-core": _large(300, 280, 10.6, 2.75),
    "M3 Max": _large(400, 374, 14.2, 2.75, measured=True),
    "M3 Ultra": _large(819, 484, 28.4, 2.75, measured=True),
    "M4": Chip(120, 101, 4.0, 2.75, measured=True),
    "M4 Pro": Chip(273, 244, 8.1, 2.75, measured=True),
    "M4 Max 32-core": _large(410, 360, 13.0, 2.75),
    "M4 Max": _large(546, 480, 16.2, 2.75),
    "M5": Chip(153, 129, 4.0, 4.5, packed_bandwidth=80),
    "M5 Pro": Chip(307, 265, 8.0, 4.5),
    "M5 Max 32-core": _large(460, 397, 12.4, 4.5),
    "M5 Max": _large(614, 530, 15.5, 4.5, measured=True),
    "H100": Chip(
        3350,
        3000,
        190,
        2.5,
        measured=True,
        matrix_teraflops=480,
        limits=None,
        build=1.5,
        encode=5.0,
        encode_product=(7.0, 26.0),
        encode_custom=10.0,
    ),  # fmt: skip
}


def find_chip(name: str) -> str:
    """The table's name for a chip as people and MLX write it ("Apple M4 Max", "m4-max").

    Raises:
        ValueError: For a chip that the table does not hold.
    """
    plain = re.sub(r"apple|nvidia|[^a-z0-9]", "", name.lower())
    for chip in CHIPS:
        if re.sub(r"[^a-z0-9]", "", chip.lower()) == plain:
            return chip
    raise ValueError(f"no chip {name!r} in the table: use one of {', '.join(CHIPS)}")


def launch_seconds(chip: Chip, launch: Launch, active: float = 1.0) -> float:
    """Seconds of one launch on the GPU.

    Args:
        chip: Where.
        launch: What.
        active: Share of the experts that this package's kernels read; in a chunk of more than 64
            tokens, of the pairs of token and expert.
    """
    moved, bandwidth = launch.bytes + active * launch.expert_bytes, chip.bandwidth
    shader = chip.teraflops * ARITHMETIC_REACH * 1e12
    matrix = shader if chip.matrix_teraflops is None else chip.matrix_teraflops * 1e12
    computed = launch.flops / shader
    if launch.kind == "experts":
        slots = launch.rows + UNPACK_SLOTS.get(launch.bits, 0)
        computed = 2 * slots * active * launch.expert_weights / shader
    elif launch.kind == "grouped":
        work = 2 * launch.rows * active * launch.expert_weights
        computed = work / (GROUPED_REACH * matrix)
    elif launch.kind == "linear":
        computed = 2 * (launch.rows + UNPACK_SLOTS.get(launch.bits, 0)) * launch.weights / shader
    elif launch.kind == "packed":
        bandwidth = chip.packed_bandwidth or bandwidth
        computed = 2 * PACKED_SLOTS * launch.rows * launch.weights / shader
        if launch.rows >= PACKED_MATRIX_ROWS:
            computed = launch.flops / matrix
    elif launch.kind in ("matmul", "attention"):
        computed = launch.flops / matrix
    return max(moved / (bandwidth * 1e9), computed) + chip.launch * 1e-6


@dataclass(frozen=True)
class Prediction:
    """Of one pass; times in seconds.

    Attributes:
        gpu: Of all launches and command buffers.
        build: Of the Python that makes the graph.
        encode: Of the host that hands the graph to the GPU.
        overlapped: Whether the host prepares this pass while the GPU computes the last one, as in
            plain decoding; otherwise the GPU waits for the graph.
        launches, command_buffers, bytes, flops: Of the whole pass.
    """

    gpu: float
    build: float
    encode: float
    overlapped: bool
    launches: int
    command_buffers: int
    bytes: int
    flops: int

    @property
    def seconds(self) -> float:
        """Of the whole pass."""
        if self.overlapped:
            return max(self.gpu, self.build + self.encode)
        return self.build + max(self.gpu, self.encode)


def predict_pass(
    chip: Chip,
    graph: Graph,
    active: float = 1.0,
    overlapped: bool = False,
    limits: tuple[int, int] | None = None,
) -> Prediction:
    """Predicts one pass.

    Args:
        chip: Where.
        graph: The pass, from `trace`.
        active: Share of the experts that its tokens use between them; beyond 64 tokens, the share
            that a token uses.
        overlapped: See `Prediction`.
        limits: See `Chip`, if not the chip's own.
    """
    limits = limits or chip.limits
    launches = graph.launches
    buffers = graph.command_buffers(*limits) if chip.limits and limits else 0
    gpu = sum(launch_seconds(chip, launch, active) for launch in launches)
    encode = sum(_encode(chip, launch) for launch in launches)
    flops = sum(
        launch.flops + 2 * active * launch.expert_weights * launch.rows for launch in launches
    )
    return Prediction(
        gpu + buffers * COMMAND_BUFFER, graph.num_primitives * chip.build * 1e-6, encode * 1e-6,
        overlapped, len(launches), buffers, round(graph.bytes(active)), round(flops),
    )  # fmt: skip


def _encode(chip: Chip, launch: Launch) -> float:
    if launch.kind == "matmul":
        return chip.encode_product[launch.rows > 1]
    if launch.kind in ("experts", "grouped", "linear"):
        return chip.encode_custom
    return chip.encode


def union_share(tokens: int, tls: float, cls: float) -> float:
    """Share of the experts that a chunk uses, between one token's share and the chunk of 8's.

    Inactive shares are taken to fall like tls ** (tokens ** k), with k from the two that are known.

    Args:
        tokens: In the chunk.
        tls: Share of experts that a token leaves inactive.
        cls: Share that 8 consecutive tokens leave inactive between them.
    """
    if not 0 < cls <= tls < 1:
        return 1.0 - (tls if tokens == 1 else cls)
    growth = math.log(math.log(cls) / math.log(tls), 8)
    return 1 - tls ** (tokens**growth)
