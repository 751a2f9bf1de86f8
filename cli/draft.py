"""The flags for speculation, and what they come to."""

import argparse
from functools import partial
from typing import Any

from rich.progress import MofNCompleteColumn

from ..speculative import SpeculationStats, make_drafter, make_policy
from ..speculative.tree import MAX_NODES
from .common import loading_progress
from .flags import Number


def add_draft_flags(parser: argparse.ArgumentParser, default: str = "none"):
    """`--draft` and `--draft-width`, and mlx-lm's names for them."""
    parser.add_argument(
        "--draft",
        "--draft-model",
        default=default,
        metavar="auto|none|lookup|PATH",
        help="what to speculate with: an EAGLE head or a smaller model (folder or Hub id), "
        "lookup in the text so far, or auto: the head in the model's folder, else lookup "
        f"({default})",
    )
    parser.add_argument(
        "--draft-width",
        type=draft_width,
        default="auto",
        metavar="N|auto",
        help="tokens per verified chunk, 1 to 64; auto measures this machine once, and drafts "
        "only while it pays (auto)",
    )
    parser.add_argument(
        "--num-draft-tokens",
        dest="draft_width",
        type=width_of_drafts,
        metavar="N",
        help="the same as a width of N + 1",
    )


def draft_width(typed: str) -> str:
    """A width: a number, or auto."""
    if typed == "auto":
        return typed
    if not typed.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{typed!r} is neither auto nor a number")
    return str(Number(int, 1, MAX_NODES)(typed))


def width_of_drafts(typed: str) -> str:
    """The width of a chunk that drafts so many tokens: the one before them is verified as well."""
    return str(Number(int, 0, MAX_NODES - 1)(typed) + 1)


def draft_options(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The flags as arguments of `stream_generate`; empty without a draft.

    Hand the same ones to every turn of a conversation: the drafter follows it, and the policy
    and the counts go on.
    """
    drafter = make_drafter(args.draft, model, tokenizer)
    if drafter is None:
        return {}
    if args.kv_bits is not None:
        raise ValueError("--draft and --kv-bits exclude each other: leave out one")
    with loading_progress(MofNCompleteColumn(), not getattr(args, "json", False)) as progress:
        on_progress = partial(progress, "measure passes")
        policy = make_policy(args.draft_width, model, on_progress, drafter)
    return {"draft": drafter, "draft_width": policy, "draft_stats": SpeculationStats()}
