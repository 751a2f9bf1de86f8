"""A run's output folder: one run at a time, the same run, and checkpoints that are whole."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import blockffn_mlx as bf
from blockffn_mlx.training.build import prepare, save_model
from blockffn_mlx.training.config import load_config
from blockffn_mlx.training.run_folder import ChangedRun, hold_folder
from blockffn_mlx.training.state import DamagedState, find_states, read_state, save_state
from blockffn_mlx.training.tokenizer import open_tokenizer
from helpers.small_run import log_of, make_trainer, weights_of

SHORT = ["stage.0.steps=8", "stage.1.steps=0", "keep_checkpoints=3", "checkpoint_interval=2"]
EVIL = """
open({ran!r}, "w")
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast): pass
"""


def command(*arguments: str, typed: str = "") -> subprocess.CompletedProcess:
    run = "import sys; from blockffn_mlx.cli.train import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", run, *arguments], capture_output=True, text=True, input=typed
    )


@pytest.fixture
def trained(folder):
    """A finished short run."""
    make_trainer(folder, *SHORT).train()
    return folder


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("stage.0.lr=1e-4", "stage.0.lr was 0.005 and is 0.0001"),
        ("stage.0.steps=9", "stage.0.steps was 8 and is 9"),
        ("seed=5", "seed was 0 and is 5"),
        ("sparsity.al=0.5", "sparsity.al was 0.002 and is 0.5"),
        ("optimizer.clip=2.0", "optimizer.clip was 1.0 and is 2.0"),
        ("model.rope_theta=5000.0", "model.rope_theta was not set and is 5000.0"),
        ("stage.1.steps=2", "stage.1 is new"),
        ("data.held_out=0.3", "data.held_out was 0.2 and is 0.3; the data has changed"),
        ("data.exclude=['lines']", "the data has changed"),
    ],
)
def test_another_run_in_the_folder_is_refused_unless_told_to_go_on(trained, override, reason):
    other = make_trainer(trained, *SHORT, override)
    with pytest.raises(ChangedRun, match=reason):
        other.train()
    other = make_trainer(trained, *SHORT, override)
    other.accept_changes = True
    assert other.train()
    assert make_trainer(trained, *SHORT, override).train()  # now it is this run's


def test_other_text_in_the_same_files_is_another_run(trained):
    path = trained / "text.txt"
    path.write_text(path.read_text().replace("mouse", "horse"))
    with pytest.raises(ChangedRun, match="the data has changed"):
        make_trainer(trained, *SHORT).train()


def test_the_same_text_elsewhere_is_the_same_run(trained):
    moved = trained / "moved"
    moved.mkdir()
    for name in ("text.txt", "lines.jsonl"):
        shutil.move(trained / name, moved / name)
    paths = [str(moved / name) for name in ("text.txt", "lines.jsonl")]
    assert make_trainer(trained, *SHORT, f"data.path={paths}").train()


@pytest.mark.parametrize(
    "override", ["log_interval=3", "eval_interval=7", "checkpoint_interval=5", "keep_checkpoints=1"]
)
def test_what_is_written_when_may_change(trained, override):
    assert make_trainer(trained, *SHORT, override).train()


def test_a_finished_model_of_somebody_elses_is_not_taken_for_ours(folder):
    (folder / "run" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match="no training run of this folder wrote it"):
        make_trainer(folder, *SHORT).train()


def test_a_file_is_no_output(folder):
    with (
        pytest.raises(ValueError, match="run.toml is not a folder"),
        hold_folder(folder / "run.toml"),
    ):
        pass


def test_a_held_folder_is_refused_at_once(folder):
    code = (
        "import sys; from pathlib import Path\n"
        "from blockffn_mlx.training.run_folder import hold_folder\n"
        "with hold_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", code, str(folder / "run")]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        done = command(str(folder / "run.toml"))
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "another process is training into" in done.stderr
        assert not (folder / "run" / "tokenizer").exists()
        holder.kill()
    # The lock dies with its holder.
    with hold_folder(folder / "run"), hold_folder(folder / "run"):
        pass


def test_the_command_says_how_to_go_on(trained):
    settings = [word for override in SHORT for word in ("--set", override)]
    done = command(str(trained / "run.toml"), *settings, "--set", "stage.0.lr=1.0")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("--accept-changes.")
    assert "stage.0.lr was 0.005 and is 1.0" in done.stderr
    changed = [str(trained / "run.toml"), *settings, "--set", "stage.0.lr=1.0"]
    done = command(*changed, "--accept-changes")
    assert done.returncode == 0, done.stderr


def damage(path: Path, how: str):
    arrays, state = path / "arrays.safetensors", path / "state.json"
    if how == "truncated arrays":
        arrays.write_bytes(arrays.read_bytes()[:-4])
    elif how == "one flipped bit":
        content = bytearray(arrays.read_bytes())
        content[len(content) // 2] ^= 1
        arrays.write_bytes(content)
    elif how == "missing arrays":
        arrays.unlink()
    elif how == "empty state":
        state.write_text("{}")
    elif how == "truncated state":
        state.write_text(state.read_text()[:-20])
    elif how == "changed state":
        content = json.loads(state.read_text())
        state.write_text(json.dumps({**content, "seconds": 0.0}))
    elif how == "missing state":
        state.unlink()
    else:
        content = json.loads(state.read_text())
        del content["check"]  # as earlier versions wrote it
        state.write_text(json.dumps({**content, how: "nonsense"}))


DAMAGE = [
    "truncated arrays",
    "one flipped bit",
    "missing arrays",
    "empty state",
    "truncated state",
    "changed state",
    "missing state",
    "step",
    "stage",
    "sampler",
    "adaptive",
    "random",
]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(trained, how):
    unbroken = make_trainer(trained, *SHORT)
    unbroken.train()
    damage(trained / "run" / "checkpoints" / "step-00000008", how)
    notes = []
    resumed = make_trainer(trained, *SHORT, on_note=notes.append)
    assert resumed.train()
    assert len(notes) == 1 and "step-00000008 is damaged" in notes[0]
    for name, weight in weights_of(unbroken).items():
        assert (weights_of(resumed)[name] == weight).all(), name
    assert log_of(resumed) == log_of(unbroken)
    read_state(trained / "run" / "checkpoints" / "step-00000008")
    assert (trained / "run" / "checkpoints" / "damaged-step-00000008").is_dir()


@pytest.mark.parametrize("how", ["truncated arrays", "empty state"])
def test_only_damaged_checkpoints_are_one_line(trained, how):
    for path in find_states(trained / "run" / "checkpoints"):
        damage(path, how)
    with pytest.raises(ValueError, match="is damaged .* and so is every other") as error:
        make_trainer(trained, *SHORT).train()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line",
    ["{}", "[]", "null", "not json", '{"step": "x", "kind": "train"}', '{"kind": "train"}', "\x00"],
)
def test_a_log_with_other_lines_goes_on(trained, line):
    with (trained / "run" / "log.jsonl").open("a") as log:
        log.write(line + "\n")
    resumed = make_trainer(trained, *SHORT)
    assert resumed.train()
    assert [r["step"] for r in log_of(resumed) if r["kind"] == "train"] == list(range(1, 9))


def test_checkpoints_of_before_have_no_check(trained):
    for path in find_states(trained / "run" / "checkpoints"):
        state = json.loads((path / "state.json").read_text())
        for name in ("check", "sha256", "made_by"):
            del state[name]
        (path / "state.json").write_text(json.dumps(state))
    (trained / "run" / "run.json").unlink()
    assert make_trainer(trained, *SHORT).resume()
    assert make_trainer(trained, *SHORT).train()


def test_pruning_removes_only_what_the_run_wrote(tmp_path):
    arrays, kept = {"a": mx.ones(3)}, []
    for step in (1, 2):
        save_state(tmp_path, step, arrays, {}, keep=9)
    copy = shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001-best")
    renamed = shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000000")
    noted = tmp_path / "step-00000002"
    (noted / "notes.txt").write_text("the good one")
    elsewhere = tmp_path / "elsewhere"
    shutil.move(tmp_path / "step-00000001", elsewhere)
    (tmp_path / "step-00000001").symlink_to(elsewhere)
    (tmp_path / "step-mine").mkdir()
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "state.json").write_text('{"step": 3}')
    kept = [copy, renamed, noted, elsewhere, tmp_path / "step-00000001", tmp_path / "step-mine"]
    kept.append(tmp_path / "step-00000003")
    before = {path: sorted(p.name for p in path.iterdir()) for path in kept}
    for step in (4, 5, 6):
        save_state(tmp_path, step, arrays, {}, keep=1)
    assert {path: sorted(p.name for p in path.iterdir()) for path in kept} == before
    assert not (tmp_path / "step-00000004").exists() and not (tmp_path / "step-00000005").exists()
    assert [path.name for path in find_states(tmp_path)][-1] == "step-00000006"


def test_a_copy_with_a_name_of_its_own_is_not_taken_up(trained):
    folder = trained / "run" / "checkpoints"
    shutil.copytree(folder / "step-00000004", folder / "step-zzz")
    shutil.copytree(folder / "step-00000004", folder / "step-00000099-best")
    trainer = make_trainer(trained, *SHORT)
    assert trainer.resume() and trainer.step == 8


def test_a_damaged_state_names_itself(tmp_path):
    path = save_state(tmp_path, 1, {"a": mx.ones(3)}, {"seconds": 1.5}, keep=1)
    arrays, state = read_state(path)
    assert np.array(arrays["a"]).tolist() == [1, 1, 1] and state["seconds"] == 1.5
    damage(path, "one flipped bit")
    with pytest.raises(DamagedState, match="step-00000001 is damaged"):
        read_state(path)


@pytest.mark.parametrize("left", [[], ["tokenizer_config.json"], ["tokenizer.json"]])
def test_half_a_tokenizer_does_not_block_the_next_run(folder, left):
    kept = folder / "run" / "tokenizer"
    kept.mkdir(parents=True)
    for name in left:
        (kept / name).write_text("{")
    _, _, tokenizer = prepare(load_config(folder / "run.toml"))
    again = open_tokenizer(kept)
    assert again.encode("the fox") == tokenizer.encode("the fox")


def test_a_killed_run_leaves_a_whole_tokenizer_or_none(folder, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    def killed(self, path):
        (Path(path) / "tokenizer_config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(load_config(folder / "run.toml"))
    assert not (folder / "run" / "tokenizer").exists()
    prepare(load_config(folder / "run.toml"))


@pytest.mark.parametrize("answer", ["y\n", "yes\n", ""])
def test_a_tokenizers_own_code_never_runs_and_nobody_is_asked(trained, answer):
    evil, ran = trained / "evil", trained / "ran"
    shutil.copytree(trained / "run" / "tokenizer", evil)
    (evil / "evil.py").write_text(EVIL.format(ran=str(ran)))
    code = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    settings = json.loads((evil / "tokenizer_config.json").read_text())
    settings |= {"auto_map": code, "tokenizer_class": "Evil"}
    (evil / "tokenizer_config.json").write_text(json.dumps(settings))
    (evil / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": code}))
    settings = [f"data.tokenizer='{evil}'", f"output='{trained}/other'", *SHORT]
    flags = [word for setting in settings for word in ("--set", setting)]
    done = command(str(trained / "run.toml"), *flags, typed=answer)
    assert not ran.exists()
    assert "Traceback" not in done.stderr and "[y/N]" not in done.stdout + done.stderr
    assert done.returncode == 0 or done.stderr.count("\n") == 1


LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from blockffn_mlx.cli.train import main
sys.exit(main())
"""


@pytest.mark.parametrize("limit", [3_000, 60_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on(folder, limit):
    """Files that may not grow stand for a disk without room."""
    settings = [word for override in SHORT for word in ("--set", override)]
    arguments = [sys.executable, "-c", LIMITED, str(limit), str(folder / "run.toml"), *settings]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    done = command(str(folder / "run.toml"), *settings)
    assert done.returncode == 0, done.stderr


def test_what_killed_checkpoints_left_is_removed(trained):
    """The run's own; a folder beside it that merely looks so stays."""
    states = trained / "run" / "checkpoints"
    code = (
        "import os, sys; from pathlib import Path\n"
        "from blockffn_mlx.checkpoints.atomic_folder import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])): os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(states / "step-00000099")])
    assert len(list(states.glob(".*.partial"))) == 1
    (states / ".mine.partial").mkdir()
    (states / ".mine.partial" / "notes").write_text("x")
    assert make_trainer(trained, *SHORT).train()
    assert [path.name for path in states.glob(".*.partial")] == [".mine.partial"]


def test_a_home_folder_is_filled_in(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    overrides = ["output='~/homely'", "data.path=['~/text.txt']"]
    config = load_config(folder / "run.toml", overrides)
    assert config.output == str(folder / "homely") and config.data.path == [f"{folder}/text.txt"]
    with pytest.raises(ValueError, match="no such home folder"):
        load_config(folder / "run.toml", ["output='~nobody_of_that_name/x'"])


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"settings": 3}'])
def test_a_damaged_record_of_the_run_asks_before_it_goes_on(trained, text):
    (trained / "run" / "run.json").write_text(text)
    with pytest.raises(ChangedRun):
        make_trainer(trained, *SHORT).train()
    told = make_trainer(trained, *SHORT, accept_changes=True)
    assert told.train() and make_trainer(trained, *SHORT).train()


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_tokens_beside_a_tokenizer_reach_the_model(trained, name):
    folder = shutil.copytree(trained / "run" / "tokenizer", trained / "tokenizer")
    (folder / name).write_text('{"eos_token_id": [1, 7]}')
    config = load_config(trained / "run.toml", [f"data.tokenizer='{folder}'"])
    model, _, tokenizer = prepare(config)
    save_model(trained / "model", model, tokenizer, mx.float32)
    assert bf.load(trained / "model")[1].eos_token_ids == {1, 7}
