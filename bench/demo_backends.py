"""Compares the demo model through this GPU's kernels and through plain operations.

usage: demo_backends.py MODEL DATA OUT.json

Sparsity on validation text read in chunks as decoding and verification read it, and greedy answers
up to the first step where the two likeliest tokens are nearly as likely: in float32, to which the
comparison belongs, and in bfloat16, the packed weights' own type. On an NVIDIA GPU set
MLX_ENABLE_TF32=0, else float32 products are no float32.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from demo_evaluate import chat_prompts, gpu_name, make_parser

from blockffn_mlx import kernels, load
from blockffn_mlx.analysis.sparsity import sparsity_of_scores
from blockffn_mlx.models.activation import record_router_scores
from blockffn_mlx.training.config import load_config
from blockffn_mlx.training.packed import read_packed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from helpers.demo_text import NEAR_TIE, greedy  # noqa: E402

TEXT_TOKENS, CHUNK, ANSWER_TOKENS = 256, 32, 64
# Logits of 16 to 32 lie 0.125 apart in bfloat16: there a near-tie is a gap of up to two steps.
NEAR_TIES = {"float32": NEAR_TIE, "bfloat16": 0.25}


def main():
    args = make_parser(__doc__, prompts=2).parse_args()
    backend = kernels.available_backend()
    if backend is None:
        raise SystemExit("demo_backends.py: no kernels run on this machine")
    model, _ = load(args.model)
    corpus = read_packed(args.data).without(load_config(args.config).data.exclude)
    texts = [source.tokens[:TEXT_TOKENS].tolist() for source in corpus.validation.values()]
    prompts = [p for chats in chat_prompts(corpus, args.prompts).values() for p in chats]
    figures = {"gpu": gpu_name(), "texts": len(texts), "prompts": len(prompts)}
    for name, near_tie in NEAR_TIES.items():
        model.set_dtype(getattr(mx, name))
        figures[name] = compare(model, backend, texts, prompts, near_tie)
        print(name, json.dumps(figures[name]), flush=True)
        with open(args.out, "w") as file:
            json.dump(figures, file, indent=1)


def compare(model, backend: str, texts: list, prompts: list, near_tie: float) -> dict:
    """Figures of both routes and how they differ."""
    figures, answers = {"near_tie": near_tie}, {}
    for name in (backend, "ops"):
        for layer in model.layers:
            # "auto" takes the kernels for up to 64 tokens; a prompt may be longer.
            layer.mlp.backend = "ops" if name == "ops" else "auto"
        figures[name] = chunked_sparsity(model, texts)
        answers[name] = [greedy(model, prompt, ANSWER_TOKENS, near_tie) for prompt in prompts]
    figures |= {"compared_tokens": 0, "wrong": [], "whole_answers": 0}
    for index, pair in enumerate(zip(*answers.values(), strict=True)):
        (one, sure), (other, also_sure) = pair
        steps = min(sure, also_sure)
        figures["compared_tokens"] += steps
        figures["wrong"] += [index] * (one[:steps] != other[:steps])
        figures["whole_answers"] += one == other
    differences = [abs(figures[backend][name] - figures["ops"][name]) for name in ("tls", "cls_8")]
    figures["largest_difference_points"] = 100 * max(differences)
    return figures


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


if __name__ == "__main__":
    main()
