"""blockffn-generate: one answer to one prompt."""

import argparse
from itertools import chain
from typing import Any

from mlx_lm.generate import GenerationResponse

from ..checkpoints.prompt_cache import read_prompt_cache
from ..generate import KEPT_POSITIONS, RULE, figures, stream_generate
from ..pace import PrefillPace
from ..prompt import Prompt, choose_format, is_chat_model
from .common import (
    add_model_flags,
    complain,
    load_for_text,
    make_parser,
    note,
    print_json,
    read_stdin,
    reading_progress,
    run_main,
)
from .draft import add_draft_flags, draft_options
from .flags import add_cache_flags, add_format_flags, add_sampling_flags, sampler_of, text
from .terminal import printable

PROG = "blockffn-generate"


def parser() -> argparse.ArgumentParser:
    """The command's flags: mlx_lm.generate's names and defaults."""
    parser = make_parser(
        PROG,
        "Generate text with a BlockFFN model.",
        f'{PROG} --model demo --prompt "Tell me a story about a brave mouse."',
        f'{PROG} --model SparseLLM/BlockFFN-3B-SFT -q --draft auto --prompt "hello"',
    )
    add_model_flags(parser)
    parser.add_argument(
        "--prompt", "-p", type=text, default="hello", help="the message; - reads stdin"
    )
    parser.add_argument("--prefill-response", type=text, help="beginning of the answer")
    add_format_flags(parser)
    parser.add_argument(
        "--use-default-chat-template",
        action="store_true",
        help="chat even if the model does not look chat-tuned",
    )
    add_sampling_flags(parser)
    add_draft_flags(parser)
    add_cache_flags(parser, KEPT_POSITIONS + 1, "most positions the cache keeps")
    parser.add_argument(
        "--verbose",
        type=lambda text: text.lower() not in ("false", "f"),
        default=True,
        metavar="True|False",
        help="show figures below the answer (True)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def main() -> int:
    """Entry point."""
    args = parser().parse_args()
    return run_main(PROG, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Loads, generates, prints."""
    if args.raw and (args.system_prompt is not None or args.prefill_response is not None):
        raise ValueError("--raw takes neither --system-prompt nor --prefill-response")
    message = read_stdin() if args.prompt == "-" else args.prompt
    model, tokenizer = load_for_text(args)
    cache = None
    if args.prompt_cache_file is not None:
        cache = read_prompt_cache(args.prompt_cache_file, model)
    prompt = build_prompt(args, model, tokenizer, message)
    length = len(prompt.ids) + (cache[0].offset if cache else 0)
    limit = model.args.max_position_embeddings
    if length > limit and args.max_kv_size is None and not model.args.rope_scaling:
        complain(
            PROG,
            f"the prompt has {length:,} tokens, but the model knows positions up to {limit:,} "
            "only: what it answers may make no sense",
        )
    drafting = draft_options(args, model, tokenizer)
    if drafting and args.max_kv_size is not None:
        raise ValueError("--draft and --max-kv-size exclude each other: leave out one")
    with reading_progress(shown=not args.json) as progress:
        responses = stream_generate(
            model,
            tokenizer,
            prompt,
            max_tokens=args.max_tokens,
            sampler=sampler_of(args, tokenizer),
            max_kv_size=args.max_kv_size,
            prompt_cache=cache,
            prefill_step_size=PrefillPace(args.prefill_step_size),
            prompt_progress_callback=progress,
            kv_bits=args.kv_bits,
            kv_group_size=args.kv_group_size,
            quantized_kv_start=args.quantized_kv_start,
            **drafting,
        )
        first = next(responses)
    show = args.verbose and not args.json
    pieces: list[str] = []
    tokens: list[int] = []
    for response in chain([first], responses):
        if show and not tokens:  # not before it is certain that there is an answer
            print(RULE)
        pieces.append(response.text)
        tokens.append(response.token)
        if show:
            print(printable(response.text), end="", flush=True)
    if args.json:
        stats = {"draft": drafting["draft_stats"].as_dict()} if drafting else {}
        print_json({"text": "".join(pieces), "tokens": tokens, **summary(response), **stats})
    elif show:
        print(f"\n{RULE}\n{figures(response)}")
        if drafting:
            print(f"Draft: {drafting['draft_stats']}")
    else:
        print(printable("".join(pieces)))
    return 0


def build_prompt(args: argparse.Namespace, model: Any, tokenizer: Any, message: str) -> Prompt:
    """The message in the chat format, or as plain text for base models and `--raw`."""
    chat = not args.raw
    if chat and not is_chat_model(model, tokenizer) and not args.use_default_chat_template:
        left_out = "without a system prompt " if args.system_prompt or args.prefill_response else ""
        note(
            f"{PROG}: this looks like a base model, so the prompt is completed as plain text "
            f"{left_out}(--raw says so without this note, --use-default-chat-template chats)"
        )
        chat = False
    messages = [("user", message)]
    if chat and args.system_prompt is not None:
        messages.insert(0, ("system", args.system_prompt))
    if chat and args.prefill_response is not None:
        messages.append(("assistant", args.prefill_response))
    chosen = choose_format(tokenizer, chat, args.chat_template_config)
    return chosen.prompt(messages, args.stop, begun=args.prompt_cache_file is not None)


def summary(response: GenerationResponse) -> dict[str, Any]:
    """What the last response says of the whole run."""
    names = ("prompt_tokens", "prompt_tps", "generation_tokens", "generation_tps", "peak_memory")
    return {name: getattr(response, name) for name in (*names, "finish_reason")}
