"""What a function launches on a GPU, read off the graph that MLX exports: nothing is computed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from .tracing import STAND_IN, tracing

# Operations on shapes and strides; MLX launches nothing for them unless the data has to move.
VIEWS = {
    "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "NumberOfElements", "Reshape",
    "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
# MLX compiles its activations: what multiplies the result of one of these runs in the same launch.
ACTIVATION_CORES = {"Sigmoid", "Erf", "Tanh"}
PRODUCTS_OF_AN_ACTIVATION = 2  # x * sigmoid(x), and the gate's other half
SMALL_STAND_INS = ("rms_norm", "layer_norm", "rope", "dequantize", "contiguous", "compiled")


@dataclass(frozen=True)
class Launch:
    """One kernel on the GPU.

    Attributes:
        name: The primitive's, or the custom kernel's.
        kind: "matmul", "packed" (MLX's products with packed weights), "experts" (this package's
            kernels), "grouped" (those of long chunks, where a share of the experts is one of the
            pairs of token and expert), "linear" (a linear map through them), "attention" or
            "small".
        rows: Tokens that share the weights, for products.
        weights: Weights that a product multiplies with, expert weights aside.
        bits: Bits of a weight as it is stored.
        bytes: Read and written, expert weights aside.
        flops: Additions and multiplications, experts aside.
        expert_weights, expert_bytes: The same if every expert were active.
        arrays: Elements of the whole arrays that it reads, by name; MLX's rule for command buffers.
    """

    name: str
    kind: str
    bytes: int
    flops: int = 0
    rows: int = 1
    weights: int = 0
    bits: int = 16
    expert_weights: int = 0
    expert_bytes: int = 0
    arrays: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """One pass: its launches in the order in which MLX starts them, and all graph nodes."""

    launches: list[Launch]
    num_primitives: int

    def bytes(self, active: float = 1.0) -> float:
        """Bytes read and written if that share of the experts is used."""
        return sum(launch.bytes + active * launch.expert_bytes for launch in self.launches)

    def launches_per_layer(self, num_layers: int) -> float:
        """Launches from one attention to the next; the mean over layers if some have none."""
        at = [i for i, launch in enumerate(self.launches) if launch.kind == "attention"]
        gaps = sorted(b - a for a, b in zip(at, at[1:], strict=False))
        if gaps and len(at) >= num_layers - 1:  # a prompt's last attention may serve nothing
            return gaps[len(gaps) // 2]
        return len(self.launches) / num_layers

    def command_buffers(self, max_operations: int, max_elements: int) -> int:
        """Command buffers by MLX's rule (metal/device.cpp, needs_commit), the last one included.

        Args:
            max_operations: Launches after which MLX commits (MLX_MAX_OPS_PER_BUFFER).
            max_elements: Mi elements of distinct arrays, counted whole (MLX_MAX_MB_PER_BUFFER).
        """
        commits, operations = 0, 0
        seen: dict[str, int] = {}
        for launch in self.launches:
            operations += 1
            seen |= launch.arrays
            if operations > max_operations or sum(seen.values()) >> 20 > max_elements:
                commits, operations, seen = commits + 1, 0, {}
        return commits + (operations > 0)


def trace(function: Callable[..., Any], *arguments: mx.array) -> Graph:
    """The graph of `function(*arguments)` as a GPU would get it.

    Args:
        function: Takes arrays and returns arrays. Only the shapes of its arguments matter; lazy
            ones stay unevaluated.

    Raises:
        ValueError: If MLX cannot export an operation, or the function reads a value.
    """
    walk = _Walk()
    with tracing():
        mx.export_function(walk, function, *arguments)
    return Graph(list(walk.launches.values()), walk.num_primitives)


@dataclass(frozen=True)
class _Array:
    """An array of the graph: its layout, and the array whose memory it shows."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    base: str
    base_size: int

    @property
    def bytes(self) -> int:
        """Bytes that reading it once touches."""
        return self.itemsize * math.prod(
            n for n, s in zip(self.shape, self.strides, strict=True) if s or n == 0
        )

    @property
    def contiguous(self) -> bool:
        """Whether it lies in memory in the order of its rows."""
        dense = _row_strides(self.shape)
        return all(
            n == 1 or s == d for n, s, d in zip(self.shape, self.strides, dense, strict=True)
        )


class _Walk:
    """Receives the exported graph node by node and notes what each launches."""

    def __init__(self):
        self.arrays: dict[str, _Array] = {}
        self.launches: dict[str, Launch] = {}  # by the name of their first output
        self.activations: dict[str, tuple[str, int]] = {}  # array: its launch, products so far
        self.num_primitives = 0

    def __call__(self, event: dict[str, Any]):
        kind = event["type"]
        if kind == "inputs":
            for name, shape, dtype in event["inputs"]:
                self.fresh(name, shape, dtype)
        elif kind == "constants":
            for name, array in event["constants"]:
                self.fresh(name, array.shape, array.dtype)
        elif kind == "primitive":
            self.num_primitives += 1
            inputs = [self.arrays[name] for name, *_ in event["inputs"]]
            if event["name"] in VIEWS:
                self.view(event, inputs[0])
            else:
                self.launch(event, inputs)

    def fresh(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype):
        shape = tuple(shape)
        self.arrays[name] = _Array(shape, _row_strides(shape), dtype.size, name, math.prod(shape))

    def view(self, event: dict[str, Any], x: _Array):
        for name, shape, dtype in event["outputs"]:
            strides = _view_strides(event["name"], event["arguments"], x, tuple(shape))
            if strides is None:  # the order of the data changes: a copy
                self.fresh(name, shape, dtype)
                self.add(name, "Copy", "small", [x], [self.arrays[name]])
            else:
                self.arrays[name] = replace(x, shape=tuple(shape), strides=strides)

    def add(self, name: str, primitive: str, kind: str, inputs, outputs, **values):
        values.setdefault("bytes", sum(x.bytes for x in (*inputs, *outputs)))
        arrays = {x.base: x.base_size for x in inputs}
        self.launches[name] = Launch(primitive, kind, arrays=arrays, **values)

    def ordered(self, name: str, x: _Array, either: bool = False) -> _Array:
        """x in the order that a kernel wants, copied if it has another."""
        rows, columns = x.strides[-2:] if either and len(x.shape) > 1 else (0, 0)
        lines = [n == 1 or s == 1 for n, s in zip(x.shape[-2:], (rows, columns), strict=False)]
        if x.contiguous or (either and any(lines)):
            return x
        copy = replace(x, strides=_row_strides(x.shape), base=f"{name} copy of {x.base}")
        self.add(copy.base, "Copy", "small", [x], [copy])
        return copy

    def launch(self, event: dict[str, Any], inputs: list[_Array]):
        for name, shape, dtype in event["outputs"]:
            self.fresh(name, shape, dtype)
        primitive, first = event["name"], event["outputs"][0][0]
        outputs = [self.arrays[name] for name, *_ in event["outputs"]]
        if primitive == "CustomKernel":
            self.custom(first, event["arguments"][0], inputs, outputs)
        elif primitive in ("Matmul", "AddMM"):
            inputs = [*(self.ordered(first, x, either=True) for x in inputs[:2]), *inputs[2:]]
            weights = inputs[1].bytes // inputs[1].itemsize
            flops = 2 * math.prod(outputs[0].shape) * inputs[0].shape[-1]
            self.add(
                first, primitive, "matmul", inputs, outputs, flops=flops, weights=weights,
                rows=flops // max(1, 2 * weights), bits=8 * inputs[1].itemsize,
            )  # fmt: skip
        elif primitive == "QuantizedMatmul":
            bits = event["arguments"][1]
            rows = math.prod(inputs[0].shape[:-1])
            weights = math.prod(inputs[1].shape) * 32 // bits
            flops = 2 * math.prod(outputs[0].shape) * inputs[0].shape[-1]
            self.add(
                first, primitive, "packed", inputs, outputs, flops=flops, rows=rows,
                weights=weights, bits=bits,
            )  # fmt: skip
        elif primitive in ("GatherMM", "GatherQMM"):
            self.gathered(first, primitive, inputs, outputs)
        elif primitive in ("Gather", "GatherAxis"):
            self.add(first, primitive, "small", inputs, outputs, bytes=2 * outputs[0].bytes)
        elif primitive in ("SliceUpdate", "DynamicSliceUpdate"):  # in place where nobody looks on
            self.add(first, primitive, "small", inputs, outputs, bytes=2 * inputs[1].bytes)
        elif not self.joins_activation(event, inputs):
            self.add(first, primitive, "small", inputs, outputs, flops=math.prod(outputs[0].shape))
            if primitive in ACTIVATION_CORES:
                self.activations[first] = first, 0

    def joins_activation(self, event: dict[str, Any], inputs: list[_Array]) -> bool:
        """Adds a multiplication to the launch of the activation that it multiplies."""
        sources = [name for name, *_ in event["inputs"]]
        activated = next((name for name in sources if name in self.activations), None)
        if event["name"] != "Multiply" or activated is None:
            return False
        owner, products = self.activations[activated]
        if products == PRODUCTS_OF_AN_ACTIVATION:
            return False
        launch, (out, *_) = self.launches[owner], event["outputs"][0]
        others = [x for name, x in zip(sources, inputs, strict=True) if name != activated]
        new = [x for x in others if x.base not in launch.arrays]
        self.launches[owner] = replace(
            launch,
            name="Activation",
            bytes=launch.bytes + sum(x.bytes for x in new),
            arrays=launch.arrays | {x.base: x.base_size for x in new},
        )
        self.activations[out] = owner, products + 1
        return True

    def gathered(self, name: str, primitive: str, inputs: list[_Array], outputs: list[_Array]):
        """MLX's products with chosen matrices: read as often as chosen, at most all of them."""
        x, weights, *scales, _, chosen = inputs
        share = min(1.0, math.prod(chosen.shape) / weights.shape[0])
        matrices = sum(w.bytes for w in (weights, *scales))
        flops = 2 * math.prod(outputs[0].shape) * x.shape[-1]
        per_weight = weights.itemsize * 8
        if scales:
            per_weight = weights.shape[-1] * 32 // x.shape[-1]
        count = int(share * math.prod(weights.shape)) * weights.itemsize * 8 // per_weight
        self.add(
            name, primitive, "packed" if scales else "matmul", inputs, outputs,
            bytes=int(share * matrices) + x.bytes + outputs[0].bytes, flops=flops,
            rows=max(1, flops // max(1, 2 * count)), weights=count, bits=per_weight,
        )  # fmt: skip

    def custom(self, name: str, kernel: str, inputs: list[_Array], outputs: list[_Array]):
        kernel = kernel.removeprefix("custom_kernel_").split("__")[0]  # types and constants follow
        if kernel.startswith(STAND_IN):
            kernel = kernel.removeprefix(STAND_IN)
            if kernel.startswith("attention"):
                queries, keys = inputs[:2]
                flops = 4 * math.prod(queries.shape) * keys.shape[-2]
                causal = kernel.startswith("attention_causal") and queries.shape[-2] > 1
                if causal and queries.shape[-2] == keys.shape[-2]:
                    flops //= 2
                self.add(name, "Attention", "attention", inputs, outputs, flops=flops)
            else:
                short = next(known for known in SMALL_STAND_INS if kernel.startswith(known))
                self.add(name, short, "small", inputs, outputs)
            return
        with_norm = kernel.startswith("blockffn_normed")
        matrix = inputs[min(len(inputs) - 1, 3 if with_norm else 4 if "residual" in kernel else 2)]
        of_one = kernel.startswith("blockffn") and "down" in kernel and len(matrix.shape) == 2
        if with_norm or of_one:  # a linear map
            inputs[0] = self.ordered(name, inputs[0])
            tokens, outs = (outputs[1], inputs[1]) if with_norm else (outputs[0], matrix)
            rows = math.prod(tokens.shape) // outs.shape[0]  # a gated product is half as wide
            dims = math.prod(inputs[0].shape) // rows
            weights = dims * matrix.shape[0]
            self.add(
                name, kernel, "linear", inputs, outputs, rows=rows, weights=weights,
                flops=2 * rows * weights, bits=8 * matrix.itemsize * matrix.shape[-1] // dims,
            )  # fmt: skip
            return
        inputs = [self.ordered(name, x) for x in inputs]
        if kernel == "blockffn_attention":
            flops = 4 * math.prod(outputs[0].shape) * inputs[2].shape[2]
            self.add(name, kernel, "attention", inputs, outputs, flops=flops)
            return
        # of this package's arrays those with an axis of experts have three axes, and a product
        of_experts = [x for x in (*inputs, *outputs) if len(x.shape) == 3 and "blockffn" in kernel]
        if not of_experts or kernel.startswith("blockffn_rotate"):
            self.add(name, kernel, "small", inputs, outputs)
            return
        grouped = "grouped" in kernel  # reads every weight, and of h only what it needs
        is_up = len(outputs[0].shape) == 3
        h = outputs[0] if is_up else inputs[0]  # [E, T, d]
        num_experts, rows, expert_size = h.shape
        hidden_size = (inputs[0] if is_up else outputs[0]).shape[-1]
        matrix = next(x for x in inputs if len(x.shape) == 3 and x is not h)
        bits = 8 * matrix.itemsize * matrix.shape[-1] // (hidden_size if is_up else expert_size)
        shared = [h] if grouped else of_experts
        self.add(
            name, kernel, "grouped" if grouped else "experts", inputs, outputs, rows=rows,
            bytes=sum(x.bytes for x in (*inputs, *outputs) if x not in shared), bits=bits,
            expert_weights=num_experts * expert_size * hidden_size,
            expert_bytes=sum(x.bytes for x in shared),
        )  # fmt: skip


def _row_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _view_strides(
    name: str, arguments: list[Any], x: _Array, shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Strides of a view of x, or None if it has to be copied."""
    if name == "Transpose":
        return tuple(x.strides[axis] for axis in arguments[0])
    if name == "Slice":
        return tuple(s * step for s, step in zip(x.strides, arguments[2], strict=True))
    if name in ("Split", "Depends", "StopGradient"):
        return x.strides
    if name in ("Broadcast", "BroadcastAxes"):
        padding = len(shape) - len(x.shape)
        old = zip((1,) * padding + x.shape, (0,) * padding + x.strides, shape, strict=True)
        return tuple(stride if n == new else 0 for n, stride, new in old)
    if name == "NumberOfElements" or 0 in shape:
        return _row_strides(shape)
    return _reshaped(x, shape)


def _reshaped(x: _Array, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides of x in another shape without a copy, or None; x's own runs may be cut, not glued."""
    runs: list[list[int]] = []  # [length, stride of its last element], merged where they continue
    for n, stride in zip(x.shape, x.strides, strict=True):
        if n == 1:
            continue
        if runs and runs[-1][1] == n * stride:
            runs[-1] = [runs[-1][0] * n, stride]
        else:
            runs.append([n, stride])
    strides, run, inside = [0] * len(shape), len(runs) - 1, 1
    for axis in reversed(range(len(shape))):
        if shape[axis] == 1:
            continue
        length, stride = runs[run]
        if length % (inside * shape[axis]):
            return None
        strides[axis] = stride * inside
        inside *= shape[axis]
        if inside == length:
            run, inside = run - 1, 1
    return tuple(strides)
