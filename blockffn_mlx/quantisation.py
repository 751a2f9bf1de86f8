"""Expert weights, plain or packed, and what MLX's quantisation can be set to."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

# Of the affine mode, as mx.quantize takes them.
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


class Quantization(NamedTuple):
    """How a packed tensor was quantised, in the terms of mx.quantize."""

    group_size: int
    bits: int
    mode: str


MODE_DEFAULTS = {  # mlx-lm's; the modes other than affine have no choice
    "affine": Quantization(64, 4, "affine"),
    "mxfp4": Quantization(32, 4, "mxfp4"),
    "nvfp4": Quantization(16, 4, "nvfp4"),
    "mxfp8": Quantization(32, 8, "mxfp8"),
}


class Format(NamedTuple):
    """The form of a projection's weights: of the plain numbers or the scales, and the packing."""

    dtype: mx.Dtype
    packing: Quantization | None = None

    def weights(self, arrays: Sequence[mx.array]) -> "ExpertWeights":
        """Weights of this form from their arrays."""
        if self.packing is None:
            return Plain(arrays[0])
        biases = arrays[2] if len(arrays) > 2 else None
        return Packed(arrays[0], arrays[1], biases, *self.packing)


class Plain(NamedTuple):
    """One projection of all experts: `weight` [E, out, in]."""

    weight: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, out, in)."""
        return self.weight.shape

    @property
    def dtype(self) -> mx.Dtype:
        return self.weight.dtype

    @property
    def format(self) -> Format:
        return Format(self.dtype)

    @property
    def arrays(self) -> list[mx.array]:
        """What a kernel reads."""
        return [self.weight]

    def plain(self) -> mx.array:
        """[E, out, in], not packed."""
        return self.weight

    def flattened(self) -> "Plain":
        """All experts as one matrix [E * out, in]."""
        return Plain(_joined(self.weight))

    def multiply(self, x: mx.array) -> mx.array:
        """x [..., in] times the transpose of the weights, of each expert its own if x has them."""
        return x @ self.weight.swapaxes(-1, -2)

    def take(self, index: mx.array) -> "Plain":
        """The experts of `index`, in its order."""
        return Plain(self.weight[index])

    def astype(self, dtype: mx.Dtype) -> "Plain":
        return Plain(self.weight.astype(dtype))


class Packed(NamedTuple):
    """One projection of all experts as mx.quantize packs it.

    Attributes:
        weight: [E, out, in * bits / 32] uint32.
        scales: [E, out, in / group_size].
        biases: Like scales in the affine mode, else None.
        group_size, bits, mode: As mx.quantize takes them.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, out, in) of the numbers that are packed."""
        *shape, groups = self.scales.shape
        return *shape, groups * self.group_size

    @property
    def dtype(self) -> mx.Dtype:
        """Of the scales."""
        return self.scales.dtype

    @property
    def format(self) -> Format:
        return Format(self.dtype, Quantization(self.group_size, self.bits, self.mode))

    @property
    def arrays(self) -> list[mx.array]:
        """What a kernel reads: weight, scales, and biases if there are any."""
        return [self.weight, self.scales, *([] if self.biases is None else [self.biases])]

    def plain(self) -> mx.array:
        """[E, out, in], not packed."""
        return mx.dequantize(
            self.weight, self.scales, self.biases, self.group_size, self.bits, mode=self.mode
        )

    def flattened(self) -> "Packed":
        """All experts as one matrix [E * out, in]."""
        biases = None if self.biases is None else _joined(self.biases)
        return self._replace(
            weight=_joined(self.weight), scales=_joined(self.scales), biases=biases
        )

    def multiply(self, x: mx.array) -> mx.array:
        """x [..., in] times the transpose of the weights, which stay packed."""
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.biases,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def take(self, index: mx.array) -> "Packed":
        """The experts of `index`, in its order."""
        biases = None if self.biases is None else self.biases[index]
        return self._replace(weight=self.weight[index], scales=self.scales[index], biases=biases)

    def astype(self, dtype: mx.Dtype) -> "Packed":
        """The same packed numbers with scales and biases of another dtype."""
        biases = None if self.biases is None else self.biases.astype(dtype)
        return self._replace(scales=self.scales.astype(dtype), biases=biases)


ExpertWeights = Plain | Packed


def _joined(array: mx.array) -> mx.array:
    return array.reshape(-1, array.shape[-1])


def expert_weights(
    weights: mx.array | tuple[mx.array, ...],
    width: int,
    group_size: int | None = None,
    bits: int | None = None,
) -> ExpertWeights:
    """A projection as users hand it in: the door behind which weights are Plain or Packed.

    Args:
        weights: [E, out, in], or (weight, scales[, biases]) as mx.quantize makes them.
        width: The input width of the projection.
        group_size, bits: Settings of a packed one; the shapes tell, and what is given must agree.

    Raises:
        ValueError: If the shapes fit no quantisation of that width, or not the one given.
    """
    if isinstance(weights, Plain | Packed):
        return weights
    if isinstance(weights, mx.array):
        return Plain(weights)
    found = infer_quantization(weights, width)
    if (group_size or found.group_size, bits or found.bits) != found[:2]:
        raise ValueError(
            f"the weights are packed in {found.bits} bits and groups of {found.group_size}, not "
            f"{bits} and {group_size}"
        )
    weight, scales, *biases = weights
    return Packed(weight, scales, biases[0] if biases else None, *found)


def infer_quantization(weights: tuple[mx.array, ...], width: int) -> Quantization:
    """Reads the settings of packed arrays off their shapes.

    Raises:
        ValueError: If the shapes fit no quantisation of that width.
    """
    weight, scales = weights[:2]
    bits, rest = divmod(weight.shape[-1] * 32, width)
    group_size, group_rest = divmod(width, scales.shape[-1])
    if rest or group_rest:
        raise ValueError(
            f"packed weights {weight.shape} with scales {scales.shape} do not fit width {width}"
        )
    if len(weights) == 3:
        mode = "affine"
    else:
        mode = "nvfp4" if group_size == 16 else "mxfp4" if bits == 4 else "mxfp8"
    return Quantization(group_size, bits, mode)


def quantized(weight: mx.array, group_size: int, bits: int, mode: str = "affine") -> Packed:
    """Packs [E, out, in] along its last axis."""
    packed, scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
    return Packed(packed, scales, biases[0] if biases else None, group_size, bits, mode)


def largest_group_size(width: int, group_size: int) -> int | None:
    """The largest group size up to `group_size` that divides `width`; None if there is none."""
    if width % group_size == 0:
        return group_size
    smaller = (g for g in reversed(GROUP_SIZES) if g < group_size and width % g == 0)
    return next(smaller, None)


def resolve_quantization(bits: int | None, group_size: int | None, mode: str) -> Quantization:
    """Fills in a mode's defaults.

    Raises:
        ValueError: If MLX has no such quantisation.
    """
    if mode not in MODE_DEFAULTS:
        raise ValueError(f"q_mode {mode!r} is not one of {', '.join(MODE_DEFAULTS)}.")
    default = MODE_DEFAULTS[mode]
    chosen = Quantization(group_size or default.group_size, bits or default.bits, mode)
    if mode == "affine":
        if chosen.bits not in BITS:
            raise ValueError(f"q_bits {bits} is not one of {BITS}.")
        if chosen.group_size not in GROUP_SIZES:
            raise ValueError(f"q_group_size {group_size} is not one of {GROUP_SIZES}.")
    elif chosen != default:
        raise ValueError(
            f"q_mode {mode} is {default.bits} bits in groups of {default.group_size} only."
        )
    return chosen


def packed_settings(entry: Any) -> tuple[Quantization, dict[str, Any]]:
    """config.json's `quantization`, in mlx-lm's format, checked.

    Args:
        entry: The settings of all modules, and by a module's path those that differ: other
            settings, or False where it is not packed.

    Returns:
        The settings of all, and by path what `nn.quantize` takes of those that differ.

    Raises:
        ValueError: If the entry is no such object, or MLX has no such quantisation.
    """

    def checked(settings: dict[str, Any], where: str) -> Quantization:
        bits, group_size = settings.get("bits"), settings.get("group_size")
        mode = settings.get("mode", "affine")
        if (
            type(bits) is not int
            or type(group_size) is not int
            or type(mode) is not str
            or not bits
        ):
            raise ValueError(f"config.json: the quantization{where} lacks bits or group_size.")
        return resolve_quantization(bits, group_size or -1, mode)

    if not isinstance(entry, dict):
        raise ValueError(f"config.json: quantization {str(entry)[:40]!r} makes no sense.")
    own: dict[str, Any] = {}
    for path, settings in entry.items():
        if isinstance(settings, dict):
            own[path] = checked(settings, f" of {path[:80]}")._asdict()
        elif isinstance(settings, bool):
            own[path] = settings
    return checked(entry, ""), own
