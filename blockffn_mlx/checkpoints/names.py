"""Names as other tools leave them: behind prefixes of wrappers, or of projections in one piece."""

import re
from collections.abc import Collection

from .tensor_info import TensorInfo

# Names that every architecture shares.
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.(.+)")

# What wrappers put before every name, and the names that wrapped modules have inside others.
PREFIXES = ("module.", "_orig_mod.", "_forward_module.", "base_model.model.")
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def strip_prefixes(names: Collection[str]) -> list[str]:
    """Names without what DDP, torch.compile, FSDP and PEFT put around those of the model.

    Raises:
        ValueError: If only some of the names have such a prefix.
    """
    bare = list(names)
    if bare and all(name.startswith(("model.model.", "model.lm_head.")) for name in bare):
        bare = [name.removeprefix("model.") for name in bare]
    while with_prefix := [name for name in bare if name.startswith(PREFIXES)]:
        prefix = next(prefix for prefix in PREFIXES if with_prefix[0].startswith(prefix))
        others = [name for name in bare if not name.startswith(prefix)]
        if others:
            raise ValueError(
                f"some of the tensors' names begin with {prefix!r} and some do not (such as "
                f"{with_prefix[0]!r} and {others[0]!r}): save the inner model's state dict."
            )
        bare = [name.removeprefix(prefix) for name in bare]
    return [WRAPPERS.sub("", name) for name in bare]


def split_fused(
    named: dict[str, TensorInfo],
    raw_names: dict[str, str],
    fused: str,
    parts: tuple[str, ...],
    first_rows: int | None = None,
):
    """Replaces each layer's fused projection by its parts, which are blocks of its rows.

    Args:
        named: Tensors under canonical names; changed.
        raw_names: The raw name of each; changed.
        fused: A projection's name inside its layer, such as "self_attn.qkv_proj".
        parts: The names of its parts in the order of their rows.
        first_rows: Rows of the first part, of which the others share the rest equally; all have
            the same if None.

    Raises:
        ValueError: If the rows cannot be so divided.
    """
    for name in [name for name in named if f".{fused}." in name]:
        info, raw = named.pop(name), raw_names.pop(name)
        rows = info.shape[0] if info.shape else 0
        first = rows // len(parts) if first_rows is None else first_rows
        rest, odd = divmod(rows - first, len(parts) - 1)
        if rest < 1 or odd or first < 1:
            raise ValueError(
                f"{raw} has the shape {list(info.shape)}, which does not hold {', '.join(parts)}."
            )
        start = 0
        for part in parts:
            target = name.replace(fused, f"{fused.rpartition('.')[0]}.{part}")
            if target in named:
                raise ValueError(f"{raw} and {raw_names[target]} are the same tensor: remove one.")
            stop = start + (first if start == 0 else rest)
            named[target], raw_names[target] = info.rows(start, stop), raw
            start = stop


def check_names(
    expected: dict[str, tuple[int, ...]], named: dict[str, TensorInfo], raw_names: dict[str, str]
):
    """Raises ValueError if a model's tensor is missing, or one that it does not have is there."""
    for problem, names in (
        ("lacks the tensor", [name for name in expected if name not in named]),
        ("has the unexpected tensor", [raw_names[name] for name in named if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"the checkpoint {problem} {names[0]}{more}.")
