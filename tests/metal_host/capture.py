"""What mx.fast.metal_kernel would launch, asked of the installed MLX, and a stand-in that runs it.

Inside mx.export_function a Metal kernel can be called without Metal, and the callback is handed the
source that MLX generated: the text under test is MLX's own, signature included.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from .build import CHECKED, MODES, build
from .run import Buffer, Counters, dispatch
from .source import MetalError, Parameter, translate

MLX_HEADERS = str(Path(mx.__file__).parent / "include")
PRELUDE = '#include "mlx/backend/metal/kernels/utils.h"\n'  # MLX puts it before every kernel
REAL_METAL_KERNEL = mx.fast.metal_kernel


@dataclass(frozen=True)
class Launch:
    """One kernel as MLX would launch it."""

    name: str
    source: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    shape_infos: tuple[tuple[bool, bool, bool], ...]  # an input's shape, strides, ndim are passed

    @property
    def instance(self) -> str:
        """Name with template arguments."""
        found = re.search(rf"decltype\(({re.escape(self.name)}<[^;]*>)\)", self.source)
        return found[1] if found else self.name

    def translate(self) -> tuple[list[Parameter], str]:
        return _translate(self.source, self.instance)


@cache
def _translate(source: str, instance: str) -> tuple[list[Parameter], str]:
    return translate(source, instance, roots=[MLX_HEADERS], prelude=PRELUDE)


def launches(function: Callable[..., object], *arrays: mx.array) -> list[Launch]:
    """The Metal kernels that function(*arrays) would launch, in order."""
    events: list[dict] = []
    mx.export_function(events.append, function, *arrays)
    kernels = [
        e["arguments"] for e in events if e["type"] == "primitive" and e["name"] == "CustomKernel"
    ]
    return [
        Launch(a[0], a[1], tuple(a[2:5]), tuple(a[5:8]), tuple(map(tuple, a[8]))) for a in kernels
    ]


@dataclass(frozen=True)
class Run:
    """One call of a kernel in the harness."""

    name: str
    launch: Launch
    counters: Counters


class MetalKernel:
    """Stands in for what mx.fast.metal_kernel returns; has its arguments.

    `mode` (of build.MODES) and `options` (of run.dispatch) hold for every kernel, unless a
    call says otherwise; `runs` receives a Run for every call while `harness` is active.
    """

    mode = "fast"
    options: dict[str, object] = {}
    runs: list[Run] | None = None
    # the latest outputs and which of their bytes were written: they may be the next one's inputs
    _written: deque[tuple[mx.array, np.ndarray]] = deque(maxlen=8)

    def __init__(
        self,
        name,
        input_names,
        output_names,
        source,
        header="",
        ensure_row_contiguous=True,
        atomic_outputs=False,
        compile_options=None,
    ):
        self.row_contiguous = ensure_row_contiguous
        self.name, self.input_names, self.output_names = name, input_names, output_names
        self.real = REAL_METAL_KERNEL(
            name=name,
            input_names=input_names,
            output_names=output_names,
            source=source,
            header=header,
            atomic_outputs=atomic_outputs,
        )
        self.stats: Counters | None = None  # of the last call

    def __call__(
        self,
        *,
        inputs,
        output_shapes,
        output_dtypes,
        grid,
        threadgroup,
        template=None,
        init_value=None,
        verbose=False,
        stream=None,
        mode=None,
        **options,
    ) -> list[mx.array]:
        if not self.row_contiguous:
            raise NotImplementedError("the harness hands over row-contiguous inputs only")
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        call = dict(
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            grid=grid,
            threadgroup=threadgroup,
            template=template,
        )
        (launch,) = launches(lambda *a: self.real(inputs=list(a), **call), *arrays)
        library = build(launch.translate()[1], mode or self.mode)

        buffers = []
        for name, array, infos in zip(self.input_names, arrays, launch.shape_infos, strict=True):
            written = next((w for a, w in self._written if a is array), None)
            buffers.append(Buffer(name, to_bytes(array), written=written))
            if array.ndim:
                buffers += shape_buffers(name, array, infos)
        checked = (mode or self.mode) in CHECKED
        outputs = []
        for name, shape, dtype in zip(self.output_names, output_shapes, output_dtypes, strict=True):
            data = to_bytes(mx.full(shape, 0 if init_value is None else init_value, dtype)).copy()
            written = np.zeros(data.size, np.uint8) if checked else None
            outputs.append(Buffer(name, data, True, init_value is not None, written))
        self.stats = dispatch(
            library,
            [*buffers, *outputs],
            launch.grid,
            launch.threadgroup,
            **{**self.options, **options},
        )
        if MetalKernel.runs is not None:
            MetalKernel.runs.append(Run(self.name, launch, self.stats))
        results = [
            from_bytes(o.data, shape, dtype)
            for o, shape, dtype in zip(outputs, output_shapes, output_dtypes, strict=True)
        ]
        if checked:
            self._written.extend((r, o.written) for r, o in zip(results, outputs, strict=True))
        return results


def shape_buffers(name: str, array: mx.array, infos: tuple[bool, bool, bool]) -> list[Buffer]:
    strides = np.cumprod([1, *array.shape[:0:-1]])[::-1]
    values = (
        ("_shape", np.array(array.shape, np.int32)),
        ("_strides", strides.astype(np.int64)),
        ("_ndim", np.array([array.ndim], np.int32)),
    )
    return [
        Buffer(name + suffix, np.ascontiguousarray(value).view(np.uint8))
        for passed, (suffix, value) in zip(infos, values, strict=True)
        if passed
    ]


def to_bytes(array: mx.array) -> np.ndarray:
    if array.size == 0:
        return np.zeros(0, np.uint8)
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8))


def from_bytes(data: np.ndarray, shape, dtype: mx.Dtype) -> mx.array:
    if data.size == 0:
        return mx.zeros(shape, dtype)
    return mx.array(data).view(dtype).reshape(shape)


@contextmanager
def harness(mode: str = "fast", **options) -> Iterator[list[Run]]:
    """Put MetalKernel in the place of mx.fast.metal_kernel; yields the runs, as they come.

    Kernel objects made before are not affected. mx.compile is off meanwhile: it cannot trace a
    stand-in.
    """
    if mode not in MODES:
        raise MetalError(f"no such mode: {mode}")
    before = mx.fast.metal_kernel, MetalKernel.mode, MetalKernel.options, MetalKernel.runs
    available = mx.metal.is_available
    runs: list[Run] = []
    mx.fast.metal_kernel, mx.metal.is_available = MetalKernel, lambda: True
    MetalKernel.mode, MetalKernel.options, MetalKernel.runs = mode, options, runs
    mx.disable_compile()
    try:
        yield runs
    finally:
        mx.enable_compile()
        mx.metal.is_available = available
        mx.fast.metal_kernel, MetalKernel.mode, MetalKernel.options, MetalKernel.runs = before
