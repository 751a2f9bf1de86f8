"""Flags that several commands share, in mlx-lm's names; each value is checked at the door."""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from ..quantisation import BITS, GROUP_SIZES
from ..speculative.verify import each_row


@dataclass(frozen=True)
class Number:
    """The type of a flag or command that takes a number.

    Attributes:
        kind: int or float.
        low, high: The least and the largest value.
        special: One more value, with a meaning of its own.
    """

    kind: type
    low: float
    high: float = math.inf
    special: float | None = None

    def __call__(self, text: str) -> Any:
        """The number that a text is.

        Raises:
            argparse.ArgumentTypeError: If it is none, or out of range.
        """
        try:
            value = self.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        fits = self.low <= value <= self.high and math.isfinite(value)
        if not fits and value != self.special:
            span = f"at least {self.low}"
            if self.high < math.inf:
                span = f"from {self.low} to {self.high}"
            raise argparse.ArgumentTypeError(f"{text} is outside its range: {span}")
        return value


COUNT = Number(int, 1)
SHARE = Number(float, 0, 1)
TEMPERATURE = Number(float, 0)
TOP_K = Number(int, 0)
SEED = Number(int, 0, 2**64 - 1)
MAX_TOKENS = Number(int, 1, special=-1)


def text(typed: str) -> str:
    """A text from the command line: \\n and \\t are a line feed and a tab, as for mlx-lm."""
    return typed.replace("\\n", "\n").replace("\\t", "\t")


def json_object(typed: str) -> dict[str, Any]:
    """The value of a flag that takes a JSON object."""
    try:
        value = json.loads(typed)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{typed[:60]!r} is not a JSON object")
    return value


def add_format_flags(parser: argparse.ArgumentParser):
    """What makes a prompt of messages, and what ends an answer."""
    parser.add_argument("--system-prompt", type=text, help="system message for the chat template")
    parser.add_argument(
        "--raw",
        "--ignore-chat-template",
        action="store_true",
        help="complete the prompt as plain text, special tokens in it included",
    )
    parser.add_argument(
        "--chat-template-config",
        type=json_object,
        default={},
        metavar="JSON",
        help="arguments for the template",
    )
    parser.add_argument(
        "--extra-eos-token", nargs="+", default=(), metavar="TOKEN", help="more tokens that end it"
    )
    parser.add_argument(
        "--stop", type=text, nargs="+", default=(), metavar="TEXT", help="texts that end the answer"
    )


def add_sampling_flags(parser: argparse.ArgumentParser, max_tokens: int = 100):
    """mlx-lm's sampling flags."""
    parser.add_argument(
        "--max-tokens", "-m", type=MAX_TOKENS, default=max_tokens, help="the most; -1 for no limit"
    )
    parser.add_argument("--temp", type=TEMPERATURE, default=0.0, help="sampling temperature")
    parser.add_argument("--top-p", type=SHARE, default=1.0, help="likeliest tokens of this share")
    parser.add_argument("--min-p", type=SHARE, default=0.0, help="least share of the likeliest's")
    parser.add_argument("--top-k", type=TOP_K, default=0, help="so many likeliest; 0 for all")
    parser.add_argument(
        "--xtc-probability", type=SHARE, default=0.0, help="how often XTC leaves out the likeliest"
    )
    parser.add_argument(
        "--xtc-threshold", type=Number(float, 0, 0.5), default=0.1, help="what XTC counts as likely"
    )
    parser.add_argument(
        "--min-tokens-to-keep", type=COUNT, default=1, help="fewest that --min-p leaves"
    )
    parser.add_argument("--seed", type=SEED, help="seed of the random number generator")


def add_cache_flags(parser: argparse.ArgumentParser, least_size: int, size_help: str):
    """mlx-lm's flags for the cache of keys and values."""
    parser.add_argument("--max-kv-size", type=Number(int, least_size), help=size_help)
    parser.add_argument(
        "--prompt-cache-file",
        metavar="FILE",
        help="go on after the prompt that mlx_lm.cache_prompt read with this model",
    )
    parser.add_argument(
        "--prefill-step-size", type=COUNT, default=2048, help="prompt tokens per pass"
    )
    parser.add_argument("--kv-bits", type=int, choices=BITS, help="quantise the cache to so many")
    parser.add_argument(
        "--kv-group-size", type=int, choices=GROUP_SIZES, default=64, help="values per scale of it"
    )
    parser.add_argument(
        "--quantized-kv-start", type=Number(int, 0), default=5000, help="tokens before it begins"
    )


def add_end_tokens(tokenizer: Any, tokens: list[str]):
    """Lets more tokens end an answer, given as text or as ids.

    Raises:
        ValueError: If the tokenizer has no such token.
    """
    known = tokenizer.get_vocab()
    for token in tokens:
        if token not in known and not (token.isdecimal() and int(token) in known.values()):
            raise ValueError(f"--extra-eos-token {token!r}: the tokenizer has no such token")
        tokenizer.add_eos_token(token)


def sampler_of(args: argparse.Namespace, tokenizer: Any) -> Callable[[mx.array], mx.array]:
    """mlx-lm's sampler for the sampling flags; seeds the generator if a seed was given."""
    if args.seed is not None:
        mx.random.seed(args.seed)
    sampler = make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    # A draft is verified in rows, and XTC would flip one coin for all of them.
    return each_row(sampler) if args.xtc_probability > 0 else sampler
