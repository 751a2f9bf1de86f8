"""Stock mlx_lm.server on a GPU: eight requests at once against the same ones singly.

The demo in float32, in a folder as the converter writes it. The server runs in a process of its
own, where nothing is changed but that each plan of a layer is written down when it is made.

usage: python bench/server_gpu.py [--out bench/server_gpu.json] [--max-tokens 48]
About a minute on an H100, most of it compiling.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import blockffn_mlx as bf
from blockffn_mlx.ffn import plan

PLANS = "BLOCKFFN_SERVER_PLANS"  # in the server's environment: the file that takes its plans
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


def serve():
    """mlx_lm's own main, with the plans of this package's layers written down."""
    from mlx_lm.server import main

    make, seen = plan._make_plan, set()

    def recorded(sizes: Any, *settings: Any):
        made = make(sizes, *settings)
        row = (sizes.num_tokens, made.strategy, made.backend, made.fused)
        if row not in seen:
            seen.add(row)
            with open(os.environ[PLANS], "a") as file:
                file.write(json.dumps(row) + "\n")
        return made

    recorded.cache_clear = make.cache_clear
    plan._make_plan = recorded
    main()


def ask(port: int, question: str | None, max_tokens: int) -> dict[str, Any]:
    """One greedy answer; without a question, whether the server is there."""
    url = f"http://127.0.0.1:{port}/{'v1/chat/completions' if question else 'health'}"
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0}
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request if question else url, timeout=300) as answer:
        return json.load(answer)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--max-tokens", type=int, default=48)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, plans, log = Path(place) / "demo", Path(place) / "plans", Path(place) / "log"
        plans.touch()
        bf.convert("demo", folder, dtype="float32")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, __file__, "--model", folder, "--port", port]
        with open(log, "w") as output:
            server = subprocess.Popen(
                [*map(str, command), "--trust-remote-code"],
                env={**os.environ, PLANS: str(plans)},
                stdout=output,
                stderr=output,
            )
        try:
            document = measure(port, args.max_tokens, server, plans)
        except BaseException:
            print(log.read_text()[-3000:], file=sys.stderr)
            raise
        finally:
            server.kill()
            server.wait()
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    same = sum(row["same"] for row in document["answers"])
    print(f"{same} of {len(QUESTIONS)} answers are those of single requests")
    return 0 if same == len(QUESTIONS) else 1


def measure(port: int, max_tokens: int, server: subprocess.Popen, plans: Path) -> dict[str, Any]:
    """All requests at once, then one by one, then at once again when everything is compiled."""
    while True:
        try:
            ask(port, None, 1)
            break
        except (URLError, ConnectionError):
            if server.poll() is not None:
                raise RuntimeError("the server ended") from None
            time.sleep(0.2)
    seconds, texts = {}, {}
    for way in ("first", "together", "singly"):
        start = time.perf_counter()
        with ThreadPoolExecutor(1 if way == "singly" else len(QUESTIONS)) as pool:
            answers = pool.map(lambda question: ask(port, question, max_tokens), QUESTIONS)
            texts[way] = [answer["choices"][0]["message"]["content"] for answer in answers]
        seconds[way] = time.perf_counter() - start
        print(f"{way}: {seconds[way]:.2f} s", flush=True)
    made = [json.loads(line) for line in plans.read_text().splitlines()]
    for tokens, strategy, backend, fused in sorted(made, key=lambda row: row[0]):
        kind = " fused" if fused else ""
        print(f"{tokens} tokens: {strategy}, {backend or 'plain operations'}{kind}")
    answers = []
    for question, *each in zip(QUESTIONS, *texts.values(), strict=True):
        answers.append({"question": question, "same": len(set(each)) == 1, "texts": each})
        print(f"{'same' if answers[-1]['same'] else 'DIFFERENT'}: {question} -> {each[-1][:60]!r}")
    return {"seconds": seconds, "plans": made, "answers": answers}


if __name__ == "__main__":
    if PLANS in os.environ:
        serve()
    else:
        sys.exit(main())
