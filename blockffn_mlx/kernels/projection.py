"""What the up and the down kernel have in common: tiles, and constants for weights."""

from typing import Any

from .kernel import Call, Kernel, prepare
from .tiles import Sizes, Tile, choose_tiles, max_threads


def arguments(
    kernel: Kernel,
    sizes: Sizes,
    *,
    backend: str,
    rows: int,
    outputs: list[Any],
    tile: Tile | None = None,
    most_threads: bool = False,
    **constants: int | bool,
) -> Call:
    """A launch of a projection.

    Args:
        kernel: One with a projection's weights.
        sizes: The layer and the chunk.
        backend: "metal" or "cuda".
        rows: Rows of the product, over all experts that may be active.
        outputs: Shapes and dtypes.
        tile: How it is cut; None for the table's choice.
        most_threads: Whether no more threadgroups start than fill the machine.
        constants: What else the kernel is compiled for.
    """
    assert kernel.projection, f"{kernel.name} multiplies by no weights"
    packing = getattr(sizes, kernel.projection).packing
    if tile is None:
        tiles = choose_tiles(sizes.num_tokens, backend, sizes.dtype, packing)
        tile = getattr(tiles, kernel.projection)
    if tile.staged and not kernel.can_stage:
        tile = tile._replace(staged=False, ahead=True)
    groups = rows // (8 * tile.octets)
    if most_threads:
        groups = min(groups, max_threads(backend) // (32 * tile.simdgroups))
    settings = {} if packing is None else {"BITS": packing.bits, "GROUP_SIZE": packing.group_size}
    return prepare(
        kernel,
        backend=backend,
        dtype=sizes.dtype,
        groups=groups,
        simdgroups=tile.simdgroups,
        constants={
            "EXPERTS": sizes.num_experts,
            "HIDDEN": sizes.hidden_size,
            "EXPERT_SIZE": sizes.expert_size,
            **constants,
            **settings,
            **{field.upper(): value for field, value in tile._asdict().items()},
        },
        outputs=outputs,
        packed=packing is not None,
        memory=tile.memory(packing),
    )
