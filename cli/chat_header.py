"""What a chat says of its model before the first message."""

import argparse
from pathlib import Path
from typing import Any

from ..analysis.footprint import MemoryNeed
from ..checkpoints.demo import DEMO
from ..models.activation import routed_layers
from .chat_view import View

DEMO_NOTE = (
    "BlockFFN demo, 19 million parameters: short stories and small talk, often wrong.\n"
    "For a real model: blockffn-chat --model SparseLLM/BlockFFN-3B-SFT"
)


def check_memory(view: View, name: str, need: MemoryNeed, context: int):
    """Warns of a model that leaves no room for its context.

    Raises:
        ValueError: If its weights alone are too large for this machine.
    """
    if need.fits:
        return
    total, limit = need.weights + need.cache, need.limit
    smaller = need.smaller()
    advice = "take a smaller model"
    if smaller:
        advice = f"convert it with -q --q-bits {smaller[0]} (about {smaller[1] / 1e9:.1f} GB)"
    text = (
        f"{name} needs {total / 1e9:.1f} GB with its context of {context:,} tokens, and this "
        f"machine has {limit / 1e9:.1f} GB for it"
    )
    if not need.weights_fit:
        raise ValueError(f"{text}: {advice}")
    view.warn(f"{text}: it may become slow; {advice}, or give a smaller --max-kv-size")


def introduce(view: View, settings: argparse.Namespace, model: Any, need: MemoryNeed, context: int):
    """Says what the model is, and how it will answer."""
    name = model_name(settings)
    if settings.model == DEMO:
        view.note(DEMO_NOTE)
    elif settings.raw:
        view.note(f"{name}: each message is completed as plain text")
    elif not model.args.chat_tuned:
        view.warn(
            f"{name} looks like a base model, not tuned for chat: it may ramble "
            "(--raw completes plain text)"
        )
    if view.is_live:
        view.note(f"{name} · {of_model(model, need)}")
        view.note(" · ".join((f"context of {context:,} tokens", *of_settings(settings))))


def model_name(settings: argparse.Namespace) -> str:
    """A model's name without the folders around it."""
    return Path(settings.model).name or settings.model


def of_model(model: Any, need: MemoryNeed) -> str:
    """Its layers, experts, bits and size."""
    layers, size = routed_layers(model), need.weights
    bits = f"{need.bits} bits" if need.quantized else f"{need.bits}-bit floats"
    amount = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
    return f"{len(layers)} layers of {model.args.num_experts} experts · {bits}, {amount}"


def of_settings(settings: argparse.Namespace) -> list[str]:
    """How answers are sampled, how long they may be, and what drafts them."""
    sampled = "greedy"
    if settings.temp:
        off = {"top_p": 1, "min_p": 0, "top_k": 0}
        values = {name: getattr(settings, name) for name in off}
        more = [f"{k.replace('_', '-')} {v:g}" for k, v in values.items() if v != off[k]]
        sampled = ", ".join([f"temp {settings.temp:g}", *more])
    limit = "no limit" if settings.max_tokens < 0 else f"up to {settings.max_tokens} tokens"
    draft = "no draft" if settings.draft == "none" else f"draft {Path(settings.draft).name}"
    return [sampled, limit, draft]
