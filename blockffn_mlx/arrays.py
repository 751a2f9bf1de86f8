"""What MLX's type stubs leave open, said once: integers on the host, the arrays of a module."""

from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten


def ints(array: mx.array) -> list[int]:
    """The integers of an array [N]; waits for the device."""
    return cast(list[int], array.tolist())


def one_row(array: mx.array, index: int) -> mx.array:
    """array[index], as a view: MLX's own indexing with an integer gathers, which is a launch."""
    return array[index : index + 1].squeeze(0)


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a tree such as `module.parameters()`, each with its dotted name."""
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))


def load_arrays(path: Any) -> dict[str, mx.array]:
    """The arrays of a .safetensors or .npz file by name."""
    return cast(dict[str, mx.array], mx.load(str(path)))
