"""Compares the demo model through this GPU's kernels and through plain operations.

usage: demo_backends.py MODEL DATA OUT.json

Sparsity on validation text read in chunks as decoding and verification read it, and greedy answers
up to the first step where the two likeliest tokens are nearly as likely.
"""

import argparse
import json

import mlx.core as mx
import numpy as np
from demo_evaluate import chat_prompts, gpu_name

from blockffn_mlx import kernels, load
from blockffn_mlx.sparsity import record_router_scores, sparsity_of_scores
from blockffn_mlx.training.config import load_config
from blockffn_mlx.training.data import read_packed

TEXT_TOKENS, CHUNK, ANSWER_TOKENS = 256, 32, 64
NEAR_TIE = 0.05  # logits


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--config", default="examples/demo.toml")
    parser.add_argument("--prompts", type=int, default=2, help="of each chat source")
    args = parser.parse_args()
    backend = kernels.available_backend()
    if backend is None:
        raise SystemExit("demo_backends.py: no kernels run on this machine")
    model, tokenizer = load(args.model)
    corpus = read_packed(args.data).without(load_config(args.config).data.exclude)
    texts = [source.tokens[:TEXT_TOKENS].tolist() for source in corpus.validation.values()]
    prompts = [p for chats in chat_prompts(corpus, args.prompts).values() for p in chats]
    figures = {"gpu": gpu_name(), "texts": len(texts), "prompts": len(prompts)}
    answers = {}
    for name in (backend, "ops"):
        for layer in model.layers:
            # "auto" takes the kernels for up to 64 tokens; a prompt may be longer.
            layer.mlp.backend = "ops" if name == "ops" else "auto"
        figures[name] = chunked_sparsity(model, texts)
        answers[name] = [greedy(model, prompt, tokenizer.eos_token_ids) for prompt in prompts]
    agreement = [compare(*pair) for pair in zip(answers["ops"], answers[backend], strict=True)]
    figures["compared_tokens"] = sum(steps for steps, _ in agreement)
    figures["wrong"] = [i for i, (_, same) in enumerate(agreement) if not same]
    figures["whole_answers"] = sum(a[0] == b[0] for a, b in zip(*answers.values(), strict=True))
    differences = [abs(figures[backend][name] - figures["ops"][name]) for name in ("tls", "cls_8")]
    figures["largest_difference_points"] = 100 * max(differences)
    with open(args.out, "w") as file:
        json.dump(figures, file, indent=1)
    print(json.dumps(figures))


def chunked_sparsity(model, texts: list[list[int]]) -> dict:
    """TLS, CLS_8 and reuse over texts that are read CHUNK tokens at a time."""
    with record_router_scores(model) as recorded:
        for text in texts:
            cache = model.make_cache()
            for begin in range(0, len(text) - CHUNK + 1, CHUNK):
                logits = model(mx.array([text[begin : begin + CHUNK]]), cache)
                mx.eval(logits, [passes[-1] for passes in recorded])
    result = sparsity_of_scores([mx.concatenate(passes, axis=0) for passes in recorded])
    return {"tls": result.tls, "cls_8": result.cls, "reuse": result.reuse}


def greedy(model, prompt: list[int], eos_token_ids: set[int]) -> tuple[list[int], list[float]]:
    """A greedy answer, and at each step how far its logit is above the next."""
    cache, tokens, gaps, ids = model.make_cache(), [], [], prompt
    while len(tokens) < ANSWER_TOKENS and not (tokens and tokens[-1] in eos_token_ids):
        logits = np.array(model(mx.array([ids]), cache)[0, -1].astype(mx.float32))
        second, first = np.partition(logits, -2)[-2:]
        tokens.append(int(logits.argmax()))
        gaps.append(float(first - second))
        ids = tokens[-1:]
    return tokens, gaps


def compare(one: tuple, other: tuple) -> tuple[int, bool]:
    """(steps before the first near-tie of either, whether the tokens agree there)."""
    ties = [i for i, gap in enumerate(map(min, one[1], other[1])) if gap < NEAR_TIE]
    steps = ties[0] if ties else max(len(one[0]), len(other[0]))
    return steps, one[0][:steps] == other[0][:steps]


if __name__ == "__main__":
    main()
