"""What a model needs in memory, and what the machine has for it."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..arrays import named_arrays
from ..device import machine_memory
from ..models.blockffn import ModelArgs
from ..quantisation import BITS

# Bits per weight that a scale and a bias of 16 bits add in groups of 64.
GROUP_BITS = 0.5


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a model needs, and bytes to be had.

    Attributes:
        weights: All weights.
        cache: The cache of a whole context.
        limit: What the machine gives: on a Mac the working set that Metal recommends, elsewhere
            the physical memory. 0 if nobody knows.
        bits: Bits per quantised weight, or of the unquantised type.
        quantized: Whether the weights are quantised.
    """

    weights: int
    cache: int
    limit: int
    bits: int
    quantized: bool

    @property
    def fits(self) -> bool:
        return not self.limit or self.weights + self.cache <= self.limit

    @property
    def weights_fit(self) -> bool:
        return not self.limit or self.weights <= self.limit

    def smaller(self) -> tuple[int, int] | None:
        """The widest quantisation that fits, as (bits, bytes of the weights); None if none does.

        Bytes are an estimate: the router and the norms are never quantised.
        """
        present = self.bits + GROUP_BITS * self.quantized
        for bits in reversed(BITS):
            size = int(self.weights * (bits + GROUP_BITS) / present)
            if size + self.cache <= self.limit:
                return bits, size
        return None


def memory_need(model: nn.Module, context: int) -> MemoryNeed:
    """What a model needs with a context of so many tokens; lazily loaded weights stay unread."""
    arrays = [array for _, array in named_arrays(model.parameters())]
    float_sizes = [a.dtype.size for a in arrays if mx.issubdtype(a.dtype, mx.floating)]
    quantized = [module.bits for _, module in model.named_modules() if hasattr(module, "bits")]
    return MemoryNeed(
        weights=sum(array.nbytes for array in arrays),
        cache=context * cache_width(model.args) * min(float_sizes),
        limit=machine_memory(),
        bits=max(quantized, default=8 * min(float_sizes)),
        quantized=bool(quantized),
    )


def cache_width(args: ModelArgs) -> int:
    """Numbers that the caches of all layers hold per token."""
    if args.attention_type == "mla":
        return args.num_hidden_layers * (args.kv_lora_rank + args.qk_rope_head_dim)
    return args.num_hidden_layers * 2 * args.num_key_value_heads * args.head_dim
