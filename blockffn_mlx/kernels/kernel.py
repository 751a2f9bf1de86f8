"""What a kernel is to this package, and the object of MLX's that runs it."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from .text import filed, kernel_text

Outputs = mx.array | tuple[mx.array, ...]


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel of metal/, with all that tests, probe and doctor need to examine it.

    Attributes:
        name: Of its file in metal/.
        inputs: Names of what it reads, weights aside.
        outputs: Names of what it writes.
        body: The call into its file. WEIGHTS stands for a projection's weights, TOKEN_SOURCE for
            where the tokens of a tile are multiplied from. Threadgroup memory is declared here
            because Metal wants it in the kernel itself.
        launch: Runs it: (*operands, backend=..., **settings) -> outputs.
        twin: The same in plain operations: (*operands, **settings) -> outputs.
        sample: Operands and settings from a random layer.
        projection: "up" or "down" if it takes that projection's weights, plain or packed, and is
            cut in its tiles; None for others.
        written: (sample, *outputs) -> outputs with what the kernel leaves unwritten set to 0, so
            that they can be compared.
        long: Whether it is for chunks of more than MAX_TOKENS, in tiles of `grouped_tiles.py`.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    launch: Callable[..., Outputs]
    twin: Callable[..., Outputs]
    sample: Callable[[Any], "Sample"]
    projection: str | None = None
    written: Callable[..., tuple[mx.array, ...]] = lambda sample, *outputs: outputs
    long: bool = False

    @property
    def can_stage(self) -> bool:
        """Whether the tokens of its tile may come by way of threadgroup memory."""
        return "TOKEN_SOURCE" in self.body

    def run(self, sample: "Sample", backend: str | None = None) -> tuple[mx.array, ...]:
        """The outputs for a sample, of the kernel or (without a backend) of its twin."""
        function, extra = (self.launch, {"backend": backend}) if backend else (self.twin, {})
        outputs = function(*sample.operands, **sample.settings, **extra)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return self.written(sample, *outputs)

    def exact(self, sample: "Sample") -> tuple[mx.array, ...]:
        """The twin's outputs in float32: on a CPU where the GPU multiplies float32 as TF32."""
        with mx.stream(mx.cpu) if mx.cuda.is_available() else nullcontext():
            outputs = self.run(sample.widened())
            mx.eval(outputs)
        return outputs


class Sample(NamedTuple):
    """What a kernel or its twin is called with.

    Attributes:
        operands: Arrays, and weights as Plain or Packed.
        settings: Keyword-only scalars.
    """

    operands: tuple[Any, ...]
    settings: dict[str, Any] = {}

    def widened(self) -> "Sample":
        """The same with every floating-point operand in float32."""
        whole = (mx.int32, mx.uint32, mx.bool_)
        wide = [o if o.dtype in whole else o.astype(mx.float32) for o in self.operands]
        return Sample(tuple(wide), self.settings)


class Call(NamedTuple):
    """A launch with its arguments made: called with the inputs, it returns the outputs."""

    kernel: Kernel
    backend: str
    packed: bool
    template: list[tuple[str, Any]]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: list[tuple[int, ...]]
    output_dtypes: list[mx.Dtype]
    memory: int = 0

    def __call__(self, *inputs: mx.array) -> Sequence[mx.array]:
        return build_kernel(self.kernel, self.backend, self.packed, self.memory)(
            inputs=list(inputs),
            template=self.template,
            grid=self.grid,
            threadgroup=self.threadgroup,
            output_shapes=self.output_shapes,
            output_dtypes=self.output_dtypes,
        )


def prepare(
    kernel: Kernel,
    *,
    backend: str,
    dtype: mx.Dtype,
    groups: int,
    simdgroups: int,
    constants: dict[str, int | bool],
    outputs: list[tuple[tuple[int, ...], mx.Dtype]],
    packed: bool = False,
    memory: int = 0,
) -> Call:
    """Makes a launch's arguments.

    Args:
        kernel: One of KERNELS.
        backend: "metal" or "cuda".
        dtype: The type T of the kernel.
        groups: Threadgroups.
        simdgroups: Of a threadgroup.
        constants: What the kernel is compiled for.
        outputs: Shapes and dtypes.
        packed: Whether a projection's weights are quantised.
        memory: Of the array `memory` of the body, if it has one, in pieces of 16 bytes.
    """
    if memory:
        constants = {**constants, "MEMORY": memory}
    shapes, dtypes = zip(*outputs, strict=True)
    threads = 32 * simdgroups
    return Call(
        kernel,
        backend,
        packed,
        [("T", dtype), *constants.items()],
        (groups * threads, 1, 1),
        (threads, 1, 1),
        list(shapes),
        list(dtypes),
        16 * memory,
    )


@cache
def build_kernel(kernel: Kernel, backend: str, packed: bool = False, memory: int = 0) -> Any:
    """The object of MLX's for a kernel, made once; CUDA wants to know the bytes of `memory`."""
    text = kernel_text(kernel, backend, packed, staged=kernel.can_stage and memory > 0)
    name = f"blockffn_{kernel.name}{'_affine' if packed else ''}"
    if backend == "metal":
        return mx.fast.metal_kernel(name=name, **text._asdict())
    return mx.fast.cuda_kernel(name=name, **filed(text)._asdict(), shared_memory=memory)


def on_device(value: float) -> mx.array:
    """A constant of a kernel, [4], all the same.

    MLX's CUDA build keeps arrays of up to 8 bytes in memory of the host: a kernel whose every
    thread reads a factor from there takes 15 us longer.
    """
    constant = mx.full((4,), value, mx.float32)
    mx.eval(constant)
    return constant
