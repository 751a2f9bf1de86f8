"""Measures a demo model on its validation data: loss and sparsity per source, draft acceptance.

usage: demo_evaluate.py MODEL DATA OUT.json [--tokens N] [--prompts N]
MODEL is a packed folder, or demo.
"""

import argparse
import json
import platform

import mlx.core as mx
import numpy as np

from blockffn_mlx import load, speculative, stream_generate
from blockffn_mlx.training.config import load_config
from blockffn_mlx.training.data import Corpus
from blockffn_mlx.training.evaluate import evaluate
from blockffn_mlx.training.objective import token_losses
from blockffn_mlx.training.packed import read_packed
from blockffn_mlx.training.sampling import Batch, validation_windows

# Sources of real conversations: their held-out requests are the prompts of the acceptance runs.
CHAT_SOURCES = ("real_story_chat", "oasst_pairs", "persona_chat", "topical_chat", "fairytaleqa_qa")
# A chain of five drafted tokens, and the paper's tree; both count the root.
SHAPES = {
    "chain of 5": {"width": 6, "top_k": 1, "depth": 4},
    "tree of 32": {"width": 32, "top_k": 10, "depth": 5},
}
ANSWER_TOKENS = 96
POSITION_WINDOWS = 64


def make_parser(description: str, prompts: int) -> argparse.ArgumentParser:
    """What every look at the demo is told."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--config", default="examples/demo.toml")
    parser.add_argument("--prompts", type=int, default=prompts, help="of each chat source")
    return parser


def main():
    parser = make_parser(__doc__, prompts=8)
    parser.add_argument("--tokens", type=int, help="of each source; all if left out")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    config = load_config(args.config)
    settings, context = config.data, config.stage[-1].context
    corpus = read_packed(args.data).without(settings.exclude)
    figures = {
        "machine": platform.machine() if mx.default_device() == mx.cpu else gpu_name(),
        "tokens_per_source": args.tokens or "all",
        "context": context,
        **evaluate(model, corpus, context, args.batch_size, args.tokens, settings.template),
    }
    figures["loss_by_position"] = loss_by_position(model, corpus, context, args.batch_size)
    draft = speculative.make_drafter("auto", model, tokenizer)
    prompts = chat_prompts(corpus, args.prompts)
    figures["acceptance"] = {
        name: acceptance(model, tokenizer, draft, prompts, **shape)
        for name, shape in SHAPES.items()
    }
    with open(args.out, "w") as file:
        json.dump(figures, file, indent=1)
    print(json.dumps({name: figures[name] for name in ("real", "template", "all", "acceptance")}))


def loss_by_position(model, corpus: Corpus, context: int, batch_size: int) -> list[float]:
    """Nats a token of continuous text in each eighth of the context."""
    windows, _ = validation_windows(corpus.validation["books_md"], context, corpus.pad)
    rows = []
    for begin in range(0, POSITION_WINDOWS, batch_size):
        parts = [mx.array(array[begin : begin + batch_size]) for array in windows[:-1]]
        rows.append(token_losses(model, Batch(*parts, segments=None)))
        mx.eval(rows)
    return mx.concatenate(rows).reshape(-1, 8, context // 8).mean((0, 2)).tolist()


def gpu_name() -> str:
    """The name of the GPU."""
    return str(mx.device_info()["device_name"])


def chat_prompts(corpus: Corpus, count: int) -> dict[str, list[list[int]]]:
    """Held-out conversations up to their first answer, the first ones of each source."""
    prompts = {}
    for name in CHAT_SOURCES:
        source = corpus.validation[name]
        ends = np.append(source.starts[1:], len(source.tokens))
        documents = [source.tokens[a:b] for a, b in zip(source.starts, ends, strict=True)]
        cuts = [np.flatnonzero(d == source.markers.assistant) for d in documents]
        chats = [d[: c[0] + 1].tolist() for d, c in zip(documents, cuts, strict=True) if len(c)]
        prompts[name] = [chat for chat in chats if len(chat) < 384][:count]
    return prompts


def acceptance(model, tokenizer, draft, prompts, width: int, **shape: int) -> dict:
    """Mean tokens a round, bonus included, of greedy answers with trees of one shape."""
    for name, value in shape.items():
        setattr(draft, name, value)
    result, everything = {}, speculative.SpeculationStats()
    for name, chats in prompts.items():
        stats = speculative.SpeculationStats()
        for prompt in chats:
            for _ in stream_generate(
                model,
                tokenizer,
                prompt,
                ANSWER_TOKENS,
                draft=draft,
                draft_width=speculative.FixedWidth(width),
                draft_stats=stats,
            ):
                pass
        result[name] = stats.as_dict()
        everything.rounds += stats.rounds
        everything.round_tokens += stats.round_tokens
    result["all"] = {"rounds": everything.rounds, "tokens_per_round": everything.tokens_per_round}
    return result


if __name__ == "__main__":
    main()
