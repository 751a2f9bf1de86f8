"""blockffn-generate: one answer to one prompt."""

import argparse
import sys
from typing import Any

from mlx_lm.generate import GenerationResponse

from ..generate import RULE, figures, stream_generate
from ..prompt import Prompt, choose_format, is_chat_model
from .common import (
    add_format_flags,
    add_model_flags,
    add_sampling_flags,
    load_for_text,
    make_parser,
    print_json,
    run_main,
    sampler_of,
    stderr_console,
)
from .draft import add_draft_flags, draft_options

PROG = "blockffn-generate"


def parser() -> argparse.ArgumentParser:
    """The command's flags: mlx_lm.generate's names and defaults."""
    parser = make_parser(PROG, "Generate text with a BlockFFN model.")
    add_model_flags(parser)
    parser.add_argument("--prompt", "-p", default="hello", help="the message; - reads stdin")
    parser.add_argument("--prefill-response", help="beginning of the answer")
    add_format_flags(parser)
    parser.add_argument(
        "--use-default-chat-template",
        action="store_true",
        help="chat even if the model does not look chat-tuned",
    )
    add_sampling_flags(parser)
    add_draft_flags(parser)
    parser.add_argument("--max-kv-size", type=int, help="most positions the cache keeps")
    parser.add_argument("--prefill-step-size", type=int, default=2048)
    parser.add_argument("--kv-bits", type=int, help="quantise the cache to so many bits")
    parser.add_argument("--kv-group-size", type=int, default=64)
    parser.add_argument("--quantized-kv-start", type=int, default=5000)
    parser.add_argument(
        "--verbose", type=lambda text: text.lower() not in ("false", "f"), default=True
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def main() -> int:
    """Entry point."""
    args = parser().parse_args()
    return run_main(PROG, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Loads, generates, prints."""
    text = sys.stdin.read() if args.prompt == "-" else unescape(args.prompt)
    model, tokenizer = load_for_text(args)
    prompt = build_prompt(args, model, tokenizer, text)
    drafting = draft_options(args, model, tokenizer)
    responses = stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=args.max_tokens,
        sampler=sampler_of(args, tokenizer),
        max_kv_size=args.max_kv_size,
        prefill_step_size=args.prefill_step_size,
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        quantized_kv_start=args.quantized_kv_start,
        **drafting,
    )
    show = args.verbose and not args.json
    if show:
        print(RULE)
    pieces, tokens = [], []
    for response in responses:
        pieces.append(response.text)
        tokens.append(response.token)
        if show:
            print(response.text, end="", flush=True)
    if args.json:
        stats = {"draft": drafting["draft_stats"].as_dict()} if drafting else {}
        print_json({"text": "".join(pieces), "tokens": tokens, **summary(response), **stats})
    elif show:
        print(f"\n{RULE}\n{figures(response)}")
        if drafting:
            print(f"Draft: {drafting['draft_stats']}")
    else:
        print("".join(pieces))
    return 0


def build_prompt(args: argparse.Namespace, model: Any, tokenizer: Any, text: str) -> Prompt:
    """The message in the chat format, or as plain text for base models and `--raw`."""
    chat = not args.raw and tokenizer.has_chat_template
    if chat and not is_chat_model(model, tokenizer) and not args.use_default_chat_template:
        stderr_console().print(
            f"[dim]{PROG}: this looks like a base model, so the prompt is completed as plain text "
            "(--raw says so without this note, --use-default-chat-template chats)[/]"
        )
        chat = False
    messages = [("user", text)]
    if chat and args.system_prompt is not None:
        messages.insert(0, ("system", args.system_prompt))
    if chat and args.prefill_response is not None:
        messages.append(("assistant", args.prefill_response))
    chosen = choose_format(tokenizer, chat, args.chat_template_config)
    return chosen.prompt(messages, args.stop)


def summary(response: GenerationResponse) -> dict[str, Any]:
    """What the last response says of the whole run."""
    names = ("prompt_tokens", "prompt_tps", "generation_tokens", "generation_tps", "peak_memory")
    return {name: getattr(response, name) for name in (*names, "finish_reason")}


def unescape(text: str) -> str:
    """Turns typed backslash-n and backslash-t into the characters, as mlx_lm.generate does."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
