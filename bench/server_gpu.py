"""Stock mlx_lm.server on a GPU: eight requests at once against the same ones singly.

The demo in float32, in a folder as the converter writes it. The server's own main runs in a thread
of this process, so that `bench/cuda_cache.py` can compile its kernels beforehand; nothing of it is
changed but that each plan of a layer is noted when it is made.

usage: python bench/server_gpu.py [--out bench/server_gpu.json] [--max-tokens 16]
Seconds where the kernels are compiled beforehand, two minutes on an H100 where they are not.
"""

import argparse
import atexit
import json
import os
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from mlx_lm import server

import blockffn_mlx as bf
from blockffn_mlx.ffn import plan

QUESTIONS = (
    "Hi!",
    "Tell me a story.",
    "Tell me a story about a brave mouse.",
    "What do you like to eat in the morning?",
    "Who are you, and what can you do for me today?",
    "Tell me a story about a girl who finds a red ball in the garden.",
    "My dog is sad because it rains. What could we play inside, do you think?",
    "Once there was a boy named Tom who had a boat. Tell me what he did with it one day.",
)


def note_plans() -> set[tuple[int, str, str | None, bool]]:
    """Notes (tokens of a pass, strategy, backend, fused) of every plan that is made from now on."""
    make, seen = plan._make_plan, set()

    def noted(sizes: Any, *settings: Any):
        made = make(sizes, *settings)
        seen.add((sizes.num_tokens, made.strategy, made.backend, made.fused))
        return made

    noted.cache_clear = make.cache_clear
    plan._make_plan = noted
    return seen


def start(folder: Path) -> int:
    """Starts the server; returns its port when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--log-level", "WARNING", "--prompt-cache-size", "1"]  # prompts are read each time
    sys.argv = [
        "server",
        "--model",
        str(folder),
        "--port",
        str(port),
        "--trust-remote-code",
        *flags,
    ]
    threading.Thread(target=server.main, daemon=True).start()
    for _ in range(300):
        try:
            urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
            return port
        except (URLError, ConnectionError):
            time.sleep(0.2)
    raise RuntimeError("the server does not answer")


def ask(port: int, question: str, max_tokens: int) -> str:
    """One greedy answer."""
    messages = [{"role": "user", "content": question}]
    body = json.dumps({"messages": messages, "max_tokens": max_tokens, "temperature": 0}).encode()
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=600) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--max-tokens", type=int, default=16)
    args = parser.parse_args()
    plans = note_plans()
    # Answers of different lengths, so that the batch shrinks one by one.
    limits = [args.max_tokens + i for i in range(len(QUESTIONS))]
    document: dict[str, Any] = {"seconds": {}, "answers": []}

    def keep():
        document["plans"] = sorted(plans, key=str)
        if args.out:
            args.out.write_text(json.dumps(document, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as place:
        bf.convert("demo", Path(place) / "demo", dtype="float32")
        port = start(Path(place) / "demo")
        for way in ("first", "together"):
            begin = time.perf_counter()
            with ThreadPoolExecutor(len(QUESTIONS)) as pool:
                texts = list(pool.map(lambda q, limit: ask(port, q, limit), QUESTIONS, limits))
            document["seconds"][way] = time.perf_counter() - begin
            print(f"{way}: {document['seconds'][way]:.2f} s", flush=True)
        for tokens, strategy, backend, fused in sorted(plans, key=str):
            kind = f"{backend or 'plain operations'}{' fused' if fused else ''}"
            print(f"{tokens} tokens: {strategy}, {kind}", flush=True)
        keep()
        begin = time.perf_counter()
        for question, limit, text in zip(QUESTIONS, limits, texts, strict=True):
            alone = ask(port, question, limit)
            row = {"question": question, "same": alone == text, "together": text, "alone": alone}
            document["answers"].append(row)
            print(f"{'same' if row['same'] else 'DIFFERENT'}: {question} -> {alone!r}", flush=True)
            keep()
        document["seconds"]["singly"] = time.perf_counter() - begin
        keep()
    same = sum(row["same"] for row in document["answers"])
    print(f"{same} of {len(QUESTIONS)} answers are those of single requests", flush=True)
    return 0 if same == len(QUESTIONS) else 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    atexit.register(os._exit, status)  # the server's threads go on
    sys.exit(status)
