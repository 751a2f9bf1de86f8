"""Is this machine's answer right? Versions, backends, and the kernels against plain operations."""

import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from itertools import product
from statistics import median

import mlx.core as mx

from . import kernels
from .experts import ExpertWeights
from .ffn import chunk_union_ffn
from .speculative.cost import device_name
from .version import __version__

# Relative error (norm) against a result in float32 or better: a few roundings of the dtype, and
# float32 sums in any order.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}

# Chunk lengths for each way that a kernel may cut its work, and those whose times are taken.
TOKENS = (1, 2, 3, 8, 13, 32, 64)
TIMED = (1, 32)
PACKINGS = {"plain": (0, 0), "4-bit": (4, 64), "8-bit": (8, 32)}

# Small, and no multiple of a tile: experts, expert size, hidden size, active experts.
SIZES = (37, 96, 320, 11)


@dataclass
class Verdict:
    """One kernel and kind of weights on one backend, over several chunk lengths.

    Attributes:
        kernel: "up" or "down"; "layer" where there are no kernels to examine.
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

    kernel: str
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
        "backend_in_use": kernels.available_backend() or "ops",
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


def relative_error(found: list[mx.array], exact: list[mx.array]) -> float:
    """Largest norm of a difference over the norm of what is exact; integers have to be equal."""
    errors = []
    for a, b in zip(found, exact, strict=True):
        if not mx.issubdtype(b.dtype, mx.floating):
            errors.append(0.0 if mx.array_equal(a, b) else float("inf"))
        else:
            difference = a.astype(mx.float32) - b
            errors.append((mx.linalg.norm(difference) / mx.linalg.norm(b)).item())
    return max(errors, key=lambda error: (error != error, error))  # a NaN is the largest


def in_float32(operand: ExpertWeights) -> ExpertWeights:
    """An array widened; of packed weights the scales and biases. Integers stay."""
    if not isinstance(operand, mx.array):
        return tuple(in_float32(part) for part in operand)
    return operand.astype(mx.float32) if mx.issubdtype(operand.dtype, mx.floating) else operand


@dataclass
class Subject:
    """Something to examine, with its operands."""

    x: mx.array
    scores: mx.array
    up: ExpertWeights
    down: ExpertWeights

    def widened(self) -> "Subject":
        """The same with its operands in float32."""
        return type(self)(*(in_float32(getattr(self, f.name)) for f in fields(self)))


class LayerSubject(Subject):
    """The layer as a whole."""

    name = "layer"

    def results(self, backend: str) -> list[mx.array]:
        """What has to be right."""
        return [chunk_union_ffn(self.x, self.scores, self.up, self.down, backend=backend)]

    def seconds(self, backend: str) -> float:
        """Time of one call."""
        weights = (self.scores, self.up, self.down)
        return seconds_per_call(lambda x: chunk_union_ffn(x, *weights, backend=backend), self.x)


class UpSubject(Subject):
    """The up kernel: the union, and the experts' weighted activations."""

    name = "up"

    def call(self, scores: mx.array, backend: str) -> tuple[mx.array, mx.array]:
        """h and the list of active experts, from the kernel or its twin."""
        if backend == "ops":
            return kernels.up_ops(self.x, scores, self.up, act="silu")
        return kernels.up(self.x, scores, self.up, act="silu", backend=backend)

    def results(self, backend: str) -> list[mx.array]:
        """What has to be right; behind the last active expert anything may lie."""
        h, active = self.call(self.scores, backend)
        count = int(active[0].item())
        return [h[:count], active[: 1 + count]]

    def seconds(self, backend: str) -> float:
        """Time of one call."""
        # 0 times a result makes the next call wait for this one
        return seconds_per_call(lambda s: s + self.call(s, backend)[0][0, 0, 0] * 0, self.scores)


@dataclass
class DownSubject(Subject):
    """The down kernel: the sum over the union's experts."""

    name = "down"

    def __post_init__(self):
        self.h, self.active = kernels.up_ops(self.x, self.scores, self.up, act="silu")

    def widened(self) -> "DownSubject":
        """The same with its operands in float32, h as it was rounded."""
        wide = super().widened()
        wide.h = in_float32(self.h)
        return wide

    def call(self, active: mx.array, backend: str) -> mx.array:
        """The layer's output, from the kernel or its twin."""
        if backend == "ops":
            return kernels.down_ops(self.h, active, self.down)
        return kernels.down(self.h, active, self.down, backend=backend)

    def results(self, backend: str) -> list[mx.array]:
        """What has to be right."""
        return [self.call(self.active, backend)]

    def seconds(self, backend: str) -> float:
        """Time of one call."""
        return seconds_per_call(
            lambda a: a + (self.call(a, backend)[0, 0] * 0).astype(a.dtype), self.active
        )


def examine(backend: str | None = None) -> Iterator[Verdict]:
    """Holds each kernel of a backend against its twin in float32, a verdict at a time.

    Args:
        backend: "metal" or "cuda", "ops", or None for what this machine's GPU speaks. Without a
            GPU the layer in plain operations is held against the dense product.
    """
    backend = backend or gpu_backend() or "ops"
    if backend == "ops":
        # MLX is slow on a CPU in half precision, and runs the same code for all dtypes there
        subjects, dtypes, reference = [LayerSubject], [mx.float32], "dense"
    else:
        subjects, dtypes, reference = [UpSubject, DownSubject], list(TOLERANCE), "ops"
    for subject, weights, dtype in product(subjects, PACKINGS, dtypes):
        name = str(dtype).removeprefix("mlx.core.")
        verdict = Verdict(subject.name, weights, name, backend, reference, TOLERANCE[dtype])
        try:
            fill(verdict, subject, dtype)
        except (RuntimeError, ValueError) as error:  # MLX compiles a kernel when it first runs
            verdict.failure = " ".join(str(error).split())[:300]
        yield verdict


def fill(verdict: Verdict, kind: type[Subject], dtype: mx.Dtype):
    """Adds errors and times for each number of tokens."""
    *sizes, active = SIZES
    for tokens in TOKENS:
        operands = random_layer(tokens, *sizes, active, dtype, PACKINGS[verdict.weights])
        subject = kind(*operands)
        exact = subject.widened().results(verdict.reference)
        verdict.errors[tokens] = relative_error(subject.results(verdict.backend), exact)
        if tokens in TIMED:
            verdict.microseconds[tokens] = 1e6 * subject.seconds(verdict.backend)
            verdict.reference_microseconds[tokens] = 1e6 * subject.seconds(verdict.reference)
