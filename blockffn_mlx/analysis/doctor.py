"""Is this machine's answer right? Versions, backends, and the kernels against plain operations."""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from statistics import median

import mlx.core as mx

from .. import device
from ..ffn import chunk_union_ffn
from ..kernels import KERNELS, Kernel, RandomLayer, Sample, random_layer, verdicts
from ..kernels.probe import TileClass, tile_classes
from ..quantisation import Quantization
from ..version import __version__

# Relative error (norm) against a result in float32 or better: a few roundings of the dtype, and
# float32 sums in any order.
TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 5e-3}

# Chunk lengths of the layer in plain operations, and of kernels that know no tiles.
TOKENS = (1, 2, 3, 8, 13, 32, 64)
# Bits (0: plain) and group size of the weights.
PACKINGS = {"plain": (0, 0), "4-bit": (4, 64), "8-bit": (8, 32)}

# Small, and no multiple of a tile: experts, expert size, hidden size, active experts.
SIZES = (37, 96, 320, 11)


@dataclass
class Verdict:
    """One tile class of a kernel on one backend, over the chunk lengths at its ends.

    Attributes:
        kernel: Its name; "layer" where there are no kernels to examine.
        weights: "plain", "4-bit" or "8-bit"; "" for a kernel that takes none.
        dtype: Name of the activations' dtype.
        backend: "metal", "cuda" or "ops".
        tokens: Chunk lengths of the class, as "9 to 16".
        errors: Relative error against the reference in float32, by number of tokens.
        microseconds: Median time of a call at the longest chunk; None if it was not taken.
        reference: What it is held against: "ops", or "dense" where ops is what is examined.
        reference_microseconds: The reference's time, in the same dtype.
        tolerance: The largest error that counts as right.
        failure: What went wrong when the kernel was built or run, or None.
    """

    kernel: str
    weights: str
    dtype: str
    backend: str
    tokens: str
    reference: str
    tolerance: float
    errors: dict[int, float] = field(default_factory=dict)
    microseconds: float | None = None
    reference_microseconds: float | None = None
    failure: str | None = None

    @property
    def right(self) -> bool:
        """Whether every error is within the tolerance (a NaN is not)."""
        return self.failure is None and all(e < self.tolerance for e in self.errors.values())


def environment() -> dict[str, str | int | bool | None]:
    """Versions, the machine, and which backend the layer uses."""
    return {
        "blockffn_mlx": __version__,
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": device.name(),
        "memory_bytes": device.memory_bytes(),
        "metal": mx.metal.is_available(),
        "cuda": mx.cuda.is_available(),
        "BLOCKFFN_KERNELS": "ops" if device.kernels_turned_off() else None,
        "backend_in_use": device.kernel_backend() or "ops",
    }


def seconds_per_call(function: Callable[[mx.array], mx.array], x: mx.array) -> float:
    """Median over chains of dependent calls, after a warm-up; the result feeds the next call.

    Three chains of up to 8 calls; slow calls, as on a CPU, get shorter ones.
    """

    def chain(calls: int) -> float:
        y, start = x, time.perf_counter()
        for _ in range(calls):
            y = function(y)
        mx.eval(y)
        return (time.perf_counter() - start) / calls

    chain(1)
    calls = max(1, min(8, int(0.02 / chain(1))))
    return median(chain(calls) for _ in range(3))


def relative_error(found: Sequence[mx.array], exact: Sequence[mx.array]) -> float:
    """Largest norm of a difference over the norm of what is exact; integers have to be equal."""
    errors = []
    for a, b in zip(found, exact, strict=True):
        if not mx.issubdtype(b.dtype, mx.floating):
            errors.append(0.0 if mx.array_equal(a, b) else float("inf"))
        else:
            difference = a.astype(mx.float32) - b
            errors.append(float(mx.linalg.norm(difference) / mx.linalg.norm(b)))
    return max(errors, key=lambda error: (error != error, error))  # a NaN is the largest


def layer_launch(x: mx.array, scores: mx.array, up, down, *, backend: str) -> mx.array:
    """The whole layer in plain operations, where there is no kernel to examine."""
    return chunk_union_ffn(x, scores, up, down, backend=backend)


def layer_twin(x: mx.array, scores: mx.array, up, down) -> mx.array:
    """The dense layer."""
    return chunk_union_ffn(x, scores, up, down, backend="dense")


def layer_sample(layer: RandomLayer) -> Sample:
    return Sample((layer.x, layer.scores, layer.up, layer.down))


LAYER = Kernel("layer", (), (), "", layer_launch, layer_twin, layer_sample)


def examine(backend: str | None = None) -> Iterator[Verdict]:
    """Holds every tile class of every kernel against its twin in float32, a verdict at a time.

    Args:
        backend: "metal" or "cuda", "ops", or None for what this machine's GPU speaks. Without a
            GPU the layer in plain operations is held against the dense product.
    """
    verdicts.forget()  # whatever was turned off is tried again when it is next used
    for examination in examinations(backend or device.gpu_backend() or "ops"):
        yield examine_class(*examination)


def examinations(backend: str) -> Iterator[tuple[TileClass, str]]:
    """What there is to examine: classes, and the kind of their weights."""
    if backend == "ops":
        # MLX is slow on a CPU in half precision, and runs the same code for all dtypes there
        for weights in PACKINGS:
            yield TileClass(LAYER.name, backend, mx.float32), weights
        return
    for kernel, (weights, (bits, group_size)), dtype in product(
        KERNELS.values(), PACKINGS.items(), TOLERANCE
    ):
        if bits and not kernel.projection:
            continue
        packing = Quantization(group_size, bits, "affine") if bits else None
        for tile_class in tile_classes(kernel, backend, dtype, packing):
            yield tile_class, weights if kernel.projection else ""


def examine_class(tile_class: TileClass, weights: str) -> Verdict:
    """A verdict, with errors for each length and times for the longest."""
    kernel = KERNELS.get(tile_class.kernel, LAYER)
    lengths = tile_class.lengths if tile_class.tile else TOKENS
    verdict = Verdict(
        kernel.name,
        weights,
        str(tile_class.dtype).removeprefix("mlx.core."),
        tile_class.backend,
        f"{min(lengths)} to {max(lengths)}" if len(set(lengths)) > 1 else str(lengths[0]),
        "dense" if kernel is LAYER else "ops",
        TOLERANCE[tile_class.dtype],
    )
    num_experts, expert_size, hidden_size, active = SIZES
    try:
        for tokens in sorted(lengths):
            packing = PACKINGS[weights or "plain"]
            layer = random_layer(
                tokens, num_experts, expert_size, hidden_size, active, tile_class.dtype, packing
            )
            sample = kernel.sample(layer)
            found, exact = kernel.run(sample, tile_class.backend), kernel.exact(sample)
            verdict.errors[tokens] = relative_error(found, exact)
        verdict.microseconds = 1e6 * sample_seconds(kernel, sample, tile_class.backend)
        verdict.reference_microseconds = 1e6 * sample_seconds(kernel, sample, None)
    except Exception as error:  # whatever MLX raises: it compiles a kernel when it first runs
        verdict.failure = " ".join(str(error).split())[:300]
    return verdict


def sample_seconds(kernel: Kernel, sample: Sample, backend: str | None) -> float:
    """Time of a call of the kernel or (without a backend) of its twin."""
    first, *rest = sample.operands

    def call(operand: mx.array) -> mx.array:
        outputs = kernel.run(Sample((operand, *rest), sample.settings), backend)
        # 0 times a result makes the next call wait for this one
        return operand + (outputs[0].flatten()[0] * 0).astype(operand.dtype)

    return seconds_per_call(call, first)
