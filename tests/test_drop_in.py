"""Scripts written for mlx-lm, with `blockffn_mlx` in its place, and the signatures behind them.

tests/scripts has the scripts. Each leaves what it found in `result`, and numbers that may differ in
their last digits in `close`.
"""

import inspect
import re
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import RotatingKVCache

import blockffn_mlx as bf
from blockffn_mlx.training.config import Lora
from blockffn_mlx.training.lora import add_lora, save_adapter
from helpers.toy_chat import toy_folder

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.py"))
# Heads of 32 values, which a quantised cache wants.
DRAFTS_LESS_AT_ONCE = (speculative_generate_step, "prefill_step_size")
SIZES = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """What the scripts call MODEL, DRAFT and ADAPTERS."""
    place = tmp_path_factory.mktemp("drop_in")
    model = toy_folder(place / "model", **SIZES)
    loaded, _ = bf.load(model)
    settings = Lora(rank=4, num_layers=2)
    add_lora(loaded, settings)
    for name, weight in tree_flatten(loaded.trainable_parameters()):
        loaded.load_weights([(name, mx.random.normal(weight.shape, key=mx.random.key(2)))], False)
    save_adapter(place / "adapters", loaded, settings, str(model))
    return {"MODEL": str(model), "DRAFT": str(model), "ADAPTERS": str(place / "adapters")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_finds_the_same(script, folders, capsys):
    source = script.read_text()
    found = {}
    for package in ("mlx_lm", "blockffn_mlx"):
        text = source.replace("from mlx_lm import", f"from {package} import")
        names = dict(folders)
        exec(compile(text, script, "exec"), names)
        lines = [re.sub(r"\d+\.\d+", "#", line) for line in capsys.readouterr().out.splitlines()]
        found[package] = names["result"], lines, names.get("close", [])
    theirs, ours = found.values()
    assert ours[:2] == theirs[:2]
    for mine, expected in zip(ours[2], theirs[2], strict=True):
        assert np.allclose(mine, expected, atol=1e-5)


def test_the_adapters_of_the_scripts_change_something(folders):
    plain, tokenizer = bf.load(folders["MODEL"])
    adapted, _ = bf.load(folders["MODEL"], adapter_path=folders["ADAPTERS"])
    ids = mx.array([[5, 6, 7]])
    assert mx.abs(plain(ids) - adapted(ids)).max().item() > 0.1


def test_a_draft_that_has_a_cache_knows_the_turn_before(folders):
    """The same model as its own draft is right every time, after a cached turn too."""
    model, tokenizer = bf.load(folders["MODEL"])
    cache = model.make_cache() + model.make_cache()
    for text in ("once upon a time", " and then"):
        options = dict(draft_model=model, num_draft_tokens=3, prompt_cache=cache)
        answer = list(bf.stream_generate(model, tokenizer, text, 13, **options))
        assert [r.from_draft for r in answer[:12]] == [True, True, True, False] * 3
        assert len({layer.offset for layer in cache}) == 1


# Each function of mlx-lm's, and those that its remaining keywords go to.
FUNCTIONS = {
    "load": (),
    "generate": (),
    "stream_generate": (generate_step, speculative_generate_step),
    "batch_generate": (BatchGenerator,),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_mlx_lm_is_taken(name):
    kinds = inspect.Parameter
    ours = inspect.signature(getattr(bf, name)).parameters
    theirs = inspect.signature(getattr(mlx_lm, name)).parameters.values()
    theirs = [p for p in theirs if p.kind is not kinds.VAR_KEYWORD]
    assert len(ours) >= len(theirs)
    for mine, expected in zip(ours.values(), theirs, strict=False):
        is_path = expected.name == "path_or_hf_repo"  # a name of ours since the first version
        assert mine.name == expected.name or is_path
        assert mine.default == expected.default and mine.kind is kinds.POSITIONAL_OR_KEYWORD
    takes_more = any(p.kind is kinds.VAR_KEYWORD for p in ours.values())
    for function in FUNCTIONS[name]:
        for keyword in inspect.signature(function).parameters.values():
            known = ours.get(keyword.name)
            if keyword.kind is kinds.KEYWORD_ONLY:
                assert known or takes_more, keyword.name
                if known and (function, keyword.name) != DRAFTS_LESS_AT_ONCE:
                    assert known.default == keyword.default, keyword.name


def test_a_batch_keeps_its_caches_small(folders):
    model, tokenizer = bf.load(folders["MODEL"])
    prompts = [list(range(10, 30)), [5, 6]]
    options = dict(max_tokens=12, max_kv_size=8, return_token_ids=True)
    found = bf.batch_generate(model, tokenizer, prompts, **options).token_ids
    for prompt, tokens in zip(prompts, found, strict=True):
        cache = [RotatingKVCache(8) for _ in model.layers]
        alone = bf.stream_generate(model, tokenizer, prompt, 12, prompt_cache=cache)
        assert tokens == [response.token for response in alone]
