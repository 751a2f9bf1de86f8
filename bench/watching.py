"""What it costs to watch: decoding alone, recorded, and with the chat's strip drawn, alternating.

The 3B model's shapes on a GPU as in pass_h100.py, or --demo. A token's milliseconds, and those of
CPU time, medians.

usage: python bench/watching.py [--demo] [--layers 36] [--rounds 5] [--out FILE.json]
"""

import argparse
import io
import json
import time
from pathlib import Path
from statistics import median

import mlx.core as mx
from mlx_lm.generate import generate_step
from rich.console import Console

import blockffn_mlx as bf
from blockffn_mlx.chat.recording import recording
from blockffn_mlx.cli.chat_strip import ExpertStrip
from blockffn_mlx.cli.chat_view import LiveAnswer
from blockffn_mlx.models.activation import routed_indices

TOKENS = 256
WAYS = ("alone", "recorded", "drawn", "drawn with the strip")


def decode_ms(model, prompt: mx.array, way: str) -> tuple[float, float]:
    """Milliseconds a token: of the clock, of the CPU."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=30)
    with recording(model, way in ("recorded", "drawn with the strip")) as record:
        with_strip = way == "drawn with the strip"
        strip = ExpertStrip(record.latest, routed_indices(model)) if with_strip else None
        with LiveAnswer(console, None, strip) as shown:
            for index, _ in enumerate(generate_step(prompt, model, max_tokens=TOKENS)):
                if index == 0:
                    start, cpu = time.perf_counter(), time.process_time()
                    record.restart(keep=1)
                record.count()
                if way.startswith("drawn"):
                    shown.feed("word " if index % 40 else "word\n\n")
            taken = time.perf_counter() - start, time.process_time() - cpu
    return taken[0] / (TOKENS - 1) * 1e3, taken[1] / (TOKENS - 1) * 1e3


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.demo:
        model, tokenizer = bf.load("demo")
        prompt = mx.array(tokenizer.encode("Once upon a time, there was a brave mouse."))
    else:
        from pass_h100 import finished, sparse_model, token_ids

        model = finished(sparse_model(args.layers), 0)
        prompt = mx.array(token_ids(model, 64))
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for number in range(args.rounds + 1):
        for way in WAYS:
            taken = decode_ms(model, prompt, way)
            if number:  # the first round compiles
                times[way].append(taken)
        medians = {
            way: [round(median(each), 2) for each in zip(*taken, strict=True)]
            for way, taken in times.items()
        }
        print(json.dumps(medians), flush=True)
        if args.out:
            device = str(mx.device_info()) if hasattr(mx, "device_info") else ""
            Path(args.out).write_text(json.dumps({"device": device, "ms": times}, indent=1))


if __name__ == "__main__":
    main()
