"""What a run refuses before its first step."""

import json

import pytest

from blockffn_mlx.training.build import prepare
from blockffn_mlx.training.config import load_config
from helpers.small_run import make_trainer


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparsity.all=1", "unknown key all; known are al, "),
        ("stage.0.steps=-1", "must be positive"),
        ("stage.0.steps='many'", "steps: expected int"),
        ("stage.0.packing='tight'", "packing 'tight'"),
        ("stage.0.accumulate=3", "accumulate must divide"),
        ("stage.0.context=24", "not a multiple"),
        ("stage.1.final_lr=0.0", "final_lr above 0"),
        ("stage.2.steps=4", "there is no stage 2"),
        ("optimizer.dtype='int8'", "dtype 'int8'"),
        ("optimizer.compiled=3", "expected bool"),
        ("nothing", "write it as table.key=value"),
    ],
)
def test_bad_settings_are_refused(folder, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(folder / "run.toml", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.width=3", "unknown key width"),
        ("data.path=[]", "data.path is empty"),
        ("data.path=['missing.txt']", "No such file or folder: missing.txt"),
        ("model.vocab_size=200", "holds token .* vocab_size is 200"),
        ("lora.rank=4", r"remove \[lora\], or fine-tune"),
    ],
)
def test_misfits_are_refused(folder, override, message):
    with pytest.raises(ValueError, match=message):
        prepare(load_config(folder / "run.toml", [override]))


def conversation(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})


@pytest.mark.parametrize(
    ("lines", "setting", "reason"),
    [
        ([conversation(("user", "the fox"))], "stage.0.assistant_only=true", "no assistant speaks"),
        (
            [conversation(("user", "the fox " * 60), ("assistant", "late"))],
            "stage.0.assistant_only=true",
            "within rows of 32 tokens",
        ),
        ([conversation(("user", "x"), ("assistant", "y"))], "stage.0.assistant_only=true", None),
        ([conversation(("user", "the fox"))], "stage.0.assistant_only=false", None),
        ([json.dumps({"text": "the fox"})], "stage.0.assistant_only=true", None),
    ],
)
def test_a_run_that_learns_nothing_is_refused(folder, lines, setting, reason):
    _, _, tokenizer = prepare(load_config(folder / "run.toml"))
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(folder / "chat")
    (folder / "chats.jsonl").write_text("\n".join(lines * 4))
    paths = [f"data.path='{folder}/chats.jsonl'", f"data.tokenizer='{folder}/chat'"]
    settings = [*paths, setting, "stage.0.packing='documents'", "stage.1.steps=0"]
    if reason is None:
        drawn = make_trainer(folder, *settings)._draw()
        assert any(batch.scored.any().item() for batch, _ in drawn)
    else:
        with pytest.raises(ValueError, match=reason):
            make_trainer(folder, *settings)
