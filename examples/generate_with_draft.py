"""Generates with a draft, and says what speculation did. usage: generate_with_draft.py [MODEL]"""

import sys

import blockffn_mlx as bf
from blockffn_mlx.speculative import SpeculationStats

model, tokenizer = bf.load(sys.argv[1] if len(sys.argv) > 1 else "demo")
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Tell me about the moon."}], add_generation_prompt=True
)
stats = SpeculationStats()
# "auto" is the model's own draft head, else a lookup in the text so far. Greedy output is what
# plain decoding would give; a fixed width always drafts, "auto" only where it pays.
for response in bf.stream_generate(
    model, tokenizer, prompt, max_tokens=24, draft="auto", draft_width=8, draft_stats=stats
):
    print(response.text, end="", flush=True)
print(f"\n{stats}")
