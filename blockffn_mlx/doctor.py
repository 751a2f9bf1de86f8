"""Is this machine's answer right? Versions, backends, and the kernels against plain operations."""

import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from statistics import median

import mlx.core as mx

from .experts import ExpertWeights
from .ffn import chunk_union_ffn
from .kernels import available_backend
from .speculative.cost import device_name
from .version import __version__

# Relative error (norm) against a result in float32 or better: a few roundings of the dtype, and
# float32 sums in any order.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}

# Chunk lengths for each way that a kernel may cut its work, and those whose times are taken.
TOKENS = (1, 2, 3, 8, 13, 32, 64)
TIMED = (1, 8, 32)
PACKINGS = {"plain": (0, 0), "4-bit": (4, 64), "8-bit": (8, 32)}

# Small, and no multiple of a tile: experts, expert size, hidden size, active experts.
SIZES = (37, 96, 320, 11)


@dataclass
class Verdict:
    """One kernel and kind of weights on one backend, over several chunk lengths.

    Attributes:
        weights: "plain", "4-bit" or "8-bit".
        dtype: Name of the activations' dtype.
        backend: "metal", "cuda" or "ops".
        errors: Relative error against the reference in float32, by number of tokens.
        microseconds: Median time of a call, by number of tokens.
        reference: What it is held against: "ops", or "dense" where ops is what is examined.
        reference_microseconds: The reference's time, in the same dtype.
        tolerance: The largest error that counts as right.
        failure: What went wrong when the kernel was built or run, or None.
    """

    weights: str
    dtype: str
    backend: str
    reference: str
    tolerance: float
    errors: dict[int, float] = field(default_factory=dict)
    microseconds: dict[int, float] = field(default_factory=dict)
    reference_microseconds: dict[int, float] = field(default_factory=dict)
    failure: str | None = None

    @property
    def right(self) -> bool:
        """Whether every error is within the tolerance (a NaN is not)."""
        return self.failure is None and all(e < self.tolerance for e in self.errors.values())


def gpu_backend() -> str | None:
    """The backend that this machine's GPU speaks, whether or not its kernels are in use."""
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else None


def memory_bytes() -> int:
    """Of the GPU; of the machine where MLX has no GPU."""
    found = mx.device_info().get("memory_size") or mx.device_info().get("total_memory")
    return int(found or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def environment() -> dict[str, str | int | bool | None]:
    """Versions, the machine, and which backend the layer uses."""
    return {
        "blockffn_mlx": __version__,
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": device_name(),
        "memory_bytes": memory_bytes(),
        "metal": mx.metal.is_available(),
        "cuda": mx.cuda.is_available(),
        "BLOCKFFN_KERNELS": os.environ.get("BLOCKFFN_KERNELS"),
        "backend_in_use": available_backend() or "ops",
    }


def random_layer(
    tokens: int,
    experts: int,
    expert_size: int,
    hidden_size: int,
    active: int,
    dtype: mx.Dtype,
    packing: tuple[int, int] = (0, 0),
) -> tuple[mx.array, mx.array, ExpertWeights, ExpertWeights]:
    """x, scores, up and down of a layer of which a chunk uses `active` experts.

    Args:
        packing: Bits (0: plain) and group size of the weights.
    """
    key = mx.random.split(mx.random.key(experts * tokens), 5)
    x = mx.random.normal((tokens, hidden_size), key=key[0]).astype(dtype)
    used = mx.argsort(mx.random.uniform(shape=(experts,), key=key[1])) < active
    scores = mx.where(used, mx.random.normal((tokens, experts), key=key[2]), 0).astype(dtype)
    shapes = ((experts, expert_size, hidden_size), (experts, hidden_size, expert_size))
    weights = []
    for shape, k in zip(shapes, key[3:], strict=True):
        weight = (mx.random.normal(shape, key=k) / shape[-1] ** 0.5).astype(dtype)
        bits, group_size = packing
        # a width that the group does not divide takes 32, as the converter would
        group_size = group_size if bits and shape[-1] % group_size == 0 else 32
        weights.append(tuple(mx.quantize(weight, group_size, bits)) if bits else weight)
    mx.eval(x, scores, weights)
    return x, scores, *weights


def seconds_per_call(function: Callable[[mx.array], mx.array], x: mx.array) -> float:
    """Median over chains of dependent calls, after a warm-up; the result feeds the next call."""
    calls, chains = 8, 3
    times = []
    for _ in range(chains + 1):
        y = x
        start = time.perf_counter()
        for _ in range(calls):
            y = function(y)
        mx.eval(y)
        times.append((time.perf_counter() - start) / calls)
    return median(times[1:])


def relative_error(out: mx.array, expected: mx.array) -> float:
    """Norm of the difference over the norm of `expected`, in float32."""
    difference = out.astype(mx.float32) - expected
    return (mx.linalg.norm(difference) / mx.linalg.norm(expected)).item()


def examine(backend: str | None = None) -> Iterator[Verdict]:
    """Runs the layer on a backend against plain operations in float32, a verdict at a time.

    Args:
        backend: "metal" or "cuda", "ops", or None for what this machine's GPU speaks. Without a
            GPU, plain operations are held against the dense product.
    """
    backend = backend or gpu_backend() or "ops"
    # MLX is slow on a CPU in half precision, and has one and the same code for all dtypes there
    dtypes = [mx.float32] if backend == "ops" else TOLERANCE
    for weights, packing in PACKINGS.items():
        for dtype in dtypes:
            tolerance = TOLERANCE[dtype]
            name = str(dtype).removeprefix("mlx.core.")
            reference = "dense" if backend == "ops" else "ops"
            verdict = Verdict(weights, name, backend, reference, tolerance)
            try:
                fill(verdict, dtype, packing)
            except (RuntimeError, ValueError) as error:  # MLX compiles a kernel when it first runs
                verdict.failure = " ".join(str(error).split())[:300]
            yield verdict


def fill(verdict: Verdict, dtype: mx.Dtype, packing: tuple[int, int]):
    """Adds errors and times for each number of tokens."""
    *sizes, active = SIZES
    for tokens in TOKENS:
        x, scores, up, down = random_layer(tokens, *sizes, active, dtype, packing)

        def layer(x, backend, scores=scores, up=up, down=down):
            return chunk_union_ffn(x, scores, up, down, backend=backend)

        wide = [in_float32(a) for a in (x, scores, up, down)]
        exact = chunk_union_ffn(*wide, backend=verdict.reference)
        verdict.errors[tokens] = relative_error(layer(x, verdict.backend), exact)
        if tokens not in TIMED:
            continue
        for backend, times in (
            (verdict.backend, verdict.microseconds),
            (verdict.reference, verdict.reference_microseconds),
        ):
            times[tokens] = 1e6 * seconds_per_call(lambda x, b=backend: layer(x, b), x)


def in_float32(weights: ExpertWeights) -> ExpertWeights:
    """An array widened; of packed weights the scales and biases."""
    if isinstance(weights, mx.array):
        return weights.astype(mx.float32)
    return weights[0], *(a.astype(mx.float32) for a in weights[1:])
