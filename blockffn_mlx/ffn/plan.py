"""What a layer does for a chunk: the one place that decides, once per layer, length and dtype."""

from functools import cache
from typing import NamedTuple

import mlx.core as mx

from .. import device
from ..kernels import (
    MAX_EXPERTS,
    MAX_TOKENS,
    Call,
    Sizes,
    covers,
    down,
    grouped_down,
    grouped_norm_up,
    grouped_tiles,
    grouped_up,
    norm_up,
    normed,
    normed_gate,
    place,
    probe,
    residual_down,
    route,
    routed_up,
    up,
)
from ..kernels.registry import KERNELS
from ..kernels.tiles import tuned_tables
from ..quantisation import ExpertWeights
from .dense import dense_ffn, stored_is_faster
from .experts import ACTIVATIONS, Activation
from .grouped import grouped_ffn
from .union import union_ffn

# The longest chunk that counts as a decoding or verification step; longer ones are prefill.
MAX_CHUNK = MAX_TOKENS

# Prefill groups tokens by expert: in kernels, and on a CPU in plain operations from so many tokens
# on. docs/kernels-log.md has the measurements.
MIN_GROUPED_TOKENS = 128

# The names that a user may ask for: the strategy, and whose kernels (None: plain operations).
BACKENDS = {
    "metal": ("union", "metal"),
    "cuda": ("union", "cuda"),
    "ops": ("union", None),
    "grouped": ("grouped", None),
    "dense": ("dense", None),
}


# The kernels of a layer: separate ones, fused ones, DECO's, whose activation norms an expert, and
# those of a long chunk.
NORM_SILU = "norm_silu"
UNION_KERNELS = {
    "separate": ("route", "up", "down"),
    "fused": ("routed_up", "residual_down"),
    NORM_SILU: ("norm_up", "residual_down"),
}
GROUPED_KERNELS = ("route", "place", "grouped_up", "grouped_down")
GROUPED_NORM_KERNELS = ("place", "grouped_norm_up", "grouped_down")


class Plan(NamedTuple):
    """How a feed-forward layer is computed for a chunk, with the kernels' arguments made.

    Attributes:
        strategy: "dense": every expert for every token. "union": the experts that some token of
            the chunk uses. "grouped": each expert for its own tokens.
        backend: Whose kernels compute it, "metal" or "cuda"; None for plain operations.
        act: The experts' activation.
        route, up, down: Launches, where kernels compute the layer. `fused` ones have no route: `up`
            takes the router's logits, norm and eps in place of scores (what `norm_up.launch` says
            where the activation is NORM_SILU), and `down` takes the residual and its factor behind
            the list.
        fused: Whether they are.
        place: The launch that lists the tokens of each expert, where kernels go by them.
    """

    strategy: str
    backend: str | None
    act: str
    route: Call | None = None
    up: Call | None = None
    down: Call | None = None
    fused: bool = False
    place: Call | None = None

    def run(
        self,
        x: mx.array,
        scores: mx.array,
        up_weights: ExpertWeights,
        down_weights: ExpertWeights,
        activation: Activation | None = None,
        shift: mx.array | None = None,
        norm: tuple[mx.array, ...] = (),
    ) -> mx.array:
        """The layer after its router: [T, H], scores [T, E] -> [T, H].

        `activation` takes the place of one that has only a name, `shift` [T] is what it takes from
        a token's every hidden unit; neither reaches the kernels. Those know ACTIVATIONS, and
        NORM_SILU by its `norm`: what `grouped_norm_up` takes of means, weight and eps.
        """
        if self.place and self.up and self.down:
            counts, lists, blocks = self.place(scores)
            (h,) = self.up(x, scores, counts, lists, *norm, *up_weights.arrays)
            return self.down(h, lists, blocks, *down_weights.arrays)[0]
        if self.up and self.down:
            h, active = self.up(x, scores, *up_weights.arrays)
            return self.down(h, active, *down_weights.arrays)[0]
        operands = (x, scores, up_weights, down_weights)
        act = activation or self.act
        if self.strategy == "union":
            return union_ffn(*operands, act=act, shift=shift)
        if self.strategy == "grouped":
            return grouped_ffn(*operands, act=act, shift=shift)
        stored = stored_is_faster(len(x), x.dtype, device.compute_backend())
        return dense_ffn(*operands, act=act, shift=shift, as_stored=stored)


def make_plan(
    sizes: Sizes, act: str, backend: str = "auto", *, training: bool = False, fused: bool = False
) -> Plan:
    """The plan for a chunk; the same one for the same arguments.

    Args:
        sizes: The layer and the chunk.
        act: The experts' activation; for NORM_SILU there are fused kernels only.
        backend: "auto" or one of BACKENDS.
        training: Whether gradients may be asked for; every expert takes part in those.
        fused: Whether kernels are wanted that take the router's norm and the residual with them.

    Raises:
        ValueError: For an unknown backend, or kernels that do not take these sizes.
    """
    return _make_plan(
        sizes,
        act,
        backend,
        training,
        fused,
        device.kernel_backend(),
        device.compute_backend(),
    )


@cache
def _make_plan(
    sizes: Sizes,
    act: str,
    asked: str,
    training: bool,
    fused: bool,
    kernel_backend: str | None,
    compute_backend: str,
) -> Plan:
    if asked == "auto":
        taken = kernel_backend and has_kernels(act, fused) and covered(sizes, act, kernel_backend)
        able = kernel_backend if taken else None
        names = kernel_names(act, fused, sizes.num_tokens > MAX_CHUNK)
        strategy, backend = choose(sizes, training, names, able, compute_backend)
    elif asked in BACKENDS:
        strategy, backend = BACKENDS[asked]
    else:
        raise ValueError(f"unknown backend {asked!r}: use {', '.join(BACKENDS)} or auto")
    if backend and sizes.num_tokens > MAX_CHUNK:
        strategy = "grouped"
    if backend is None:
        return Plan(strategy, backend, act)
    if not has_kernels(act, fused):
        raise ValueError(f"there are no kernels for {act} in a layer of this kind")
    if not covered(sizes, act, backend):
        raise ValueError(
            f"the kernels take up to {MAX_EXPERTS} experts, sizes that are multiples of 32, and "
            "plain or affine 4-bit or 8-bit weights in the dtype of x (beyond "
            f"{MAX_TOKENS} tokens CUDA's take no float32)"
        )
    if strategy == "grouped":
        block = grouped_tiles.choose_tiles(
            sizes.num_tokens, backend, sizes.dtype, sizes.down.packing
        ).down.block
        normed, scored = act == NORM_SILU, (sizes.num_tokens, sizes.num_experts, sizes.dtype)
        return Plan(
            strategy,
            backend,
            act,
            None if normed else route.arguments(*scored, backend=backend),
            grouped_norm_up.arguments(sizes, backend=backend)
            if normed
            else grouped_up.arguments(sizes, act=act, backend=backend),
            grouped_down.arguments(sizes, backend=backend),
            place=place.arguments(*scored, block=block, backend=backend),
        )
    if fused:
        normed = act == NORM_SILU
        return Plan(
            strategy,
            backend,
            act,
            up=norm_up.arguments(sizes, backend=backend)
            if normed
            else routed_up.arguments(sizes, act=act, backend=backend),
            down=residual_down.arguments(sizes, backend=backend),
            fused=True,
        )
    return Plan(
        strategy,
        backend,
        act,
        route.arguments(sizes.num_tokens, sizes.num_experts, sizes.dtype, backend=backend),
        up.arguments(sizes, act=act, backend=backend),
        down.arguments(sizes, backend=backend),
    )


def choose(
    sizes: Sizes,
    training: bool,
    names: tuple[str, ...],
    kernel_backend: str | None,
    compute_backend: str,
) -> tuple[str, str | None]:
    """Strategy and backend where nobody asked for one."""
    if training:
        return "dense", None
    if sizes.num_tokens > MAX_CHUNK:
        if kernel_backend and kernels_work(sizes, kernel_backend, names):
            return "grouped", kernel_backend
        # In plain operations the loads are read on the host, once a layer.
        grouped = compute_backend == "cpu" and sizes.num_tokens >= MIN_GROUPED_TOKENS
        return ("grouped" if grouped else "dense"), None
    if kernel_backend and kernels_work(sizes, kernel_backend, names):
        return "union", kernel_backend
    # Reading the union on the host costs a GPU more, once a layer, than the experts that it saves.
    return ("union" if compute_backend == "cpu" else "dense"), None


def has_kernels(act: str, fused: bool) -> bool:
    """Whether there are kernels for an activation."""
    return act in ACTIVATIONS or fused and act == NORM_SILU


def covered(sizes: Sizes, act: str, backend: str) -> bool:
    """Whether the kernels take a layer and a chunk of these sizes."""
    if sizes.num_tokens <= MAX_CHUNK:
        return covers(sizes)
    return (grouped_norm_up if act == NORM_SILU else grouped_tiles).covers(sizes, backend)


def kernel_names(act: str, fused: bool, long: bool) -> tuple[str, ...]:
    """The kernels of a layer."""
    if long:
        return GROUPED_NORM_KERNELS if act == NORM_SILU else GROUPED_KERNELS
    return UNION_KERNELS[NORM_SILU if act == NORM_SILU else "fused" if fused else "separate"]


def kernels_work(sizes: Sizes, backend: str, names: tuple[str, ...]) -> bool:
    """Whether the kernels of a chunk give right results here."""
    packings = {"up": sizes.up.packing, "down": sizes.down.packing}
    asked = [(name, packings.get(KERNELS[name].projection or "")) for name in names]
    return all(
        probe.works(KERNELS[name], sizes.num_tokens, sizes.dtype, packing, backend=backend)
        for name, packing in asked
    )


def forget():
    """Drops every plan: for tests, and when tiles or verdicts have changed."""
    _make_plan.cache_clear()
    tuned_tables.cache_clear()
    for module in (
        *(route, up, down, routed_up, residual_down, norm_up),
        *(normed, normed_gate),
        *(place, grouped_up, grouped_norm_up, grouped_down),
    ):
        module.arguments.cache_clear()
