"""The Hub: against a server on this machine that answers as it does, and where nothing answers."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants

import blockffn_mlx as bf
from blockffn_mlx.checkpoints import cache as model_cache
from blockffn_mlx.checkpoints import hub
from blockffn_mlx.checkpoints.reader import load_checkpoint
from blockffn_mlx.speculative import EagleDrafter, make_drafter
from helpers.hub_server import COMMIT, HubServer, hub_server, self_signed
from helpers.models import GOLDEN

REPO = "someone/BlockFFN-Test-SFT"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Caches of the test's own: the Hub's and ours."""
    monkeypatch.setattr(model_cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path, monkeypatch):
    shutil.copytree(GOLDEN / "mla_linear", tmp_path / "repo")
    with hub_server(tmp_path / "repo") as running:
        monkeypatch.setattr(hub, "ENDPOINT", running.url)
        yield running


def asked_for(server: HubServer) -> set[str]:
    """The files that were downloaded."""
    return {path.partition(f"/resolve/{COMMIT}/")[2] for path in server.requests} - {""}


def go_offline(monkeypatch, how: str):
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    if how == "by choice":
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_model_is_downloaded_and_converted_once(server, cache):
    stages = []
    model, _ = bf.load(REPO, on_progress=lambda *call: stages.append(call))
    assert model.args.attention_type == "mla" and model.args.chat_tuned
    assert model.origin.name == REPO and model.origin.checkpoint.name == COMMIT
    assert stages[0][0] == "download" and stages[-1][0] == "convert"
    wanted = {"config.json", "pytorch_model.bin", "tokenizer.model", "generation_config.json"}
    assert wanted <= asked_for(server)
    assert not [name for name in asked_for(server) if name.endswith((".py", ".npz"))]
    server.requests.clear()
    bf.load(REPO)
    assert not asked_for(server)
    (kept,) = model_cache.cached_models()
    assert kept.source == REPO and kept.origin["revision"] == COMMIT
    assert f"base_model: {REPO}" in (kept.path / "README.md").read_text()


def test_a_converted_repository_is_taken_as_it_is(server, converted, cache):
    shutil.rmtree(server.folder)
    shutil.copytree(converted("gqa_block"), server.folder)
    assert bf.load(REPO)[0].args.num_experts == 12
    assert not cache.exists()


@pytest.mark.filterwarnings("ignore:.*What was downloaded before is used")
@pytest.mark.parametrize("how", ["no network", "by choice"])
@pytest.mark.parametrize("revision", [None, "v1", COMMIT, COMMIT[:7]])
def test_what_was_loaded_once_loads_offline(server, monkeypatch, how, revision):
    bf.load(REPO, revision=revision)
    go_offline(monkeypatch, how)
    assert bf.load(REPO, revision=revision)[0].args.attention_type == "mla"
    shutil.rmtree(model_cache.cache_folder())  # converted anew from the Hub's cache
    assert bf.load(REPO, revision=revision)[0].args.attention_type == "mla"
    with pytest.raises(OSError, match="not downloaded before|cannot be reached"):
        bf.load(REPO, revision="other")
    with pytest.raises(OSError, match="not downloaded before|cannot be reached"):
        bf.load("someone/else")


def test_a_kept_conversion_needs_no_download_of_its_source(server, monkeypatch, tmp_path):
    bf.load(REPO)
    shutil.rmtree(tmp_path / "hub")
    go_offline(monkeypatch, "by choice")
    assert bf.load(REPO)[0].args.attention_type == "mla"
    assert bf.load(REPO, revision=COMMIT[:7])[0].args.attention_type == "mla"
    with pytest.raises(OSError, match="not downloaded before"):
        bf.load(REPO, revision="v1")


@pytest.mark.parametrize("trouble", ["limited", "busy", "broken", "proxy"])
def test_trouble_of_the_hub_does_not_stop_what_is_here(server, trouble):
    bf.load(REPO)
    server.trouble = trouble
    with pytest.warns(UserWarning, match="What was downloaded before is used"):
        bf.load(REPO)


@pytest.mark.parametrize(
    "trouble, kind, reason",
    [
        ("gated", ValueError, "is gated: accept its terms"),
        ("bad token", ValueError, "does not accept your token"),
        ("unknown", ValueError, f"has no {REPO}"),
        ("private", ValueError, f"has no {REPO}"),
        ("no revision", ValueError, "has no revision v9"),
        ("forbidden", ValueError, r"forbids access .*403"),
        ("limited", OSError, r"limits how often .*429"),
        ("broken", OSError, r"trouble of its own \(500\)"),
        ("busy", OSError, r"trouble of its own \(503\)"),
        ("proxy", OSError, "the proxy refused"),
    ],
)
def test_trouble_is_named_for_what_it_is(server, tmp_path, cache, trouble, kind, reason):
    server.trouble = trouble
    for call in (
        lambda: bf.load(REPO, revision="v9"),
        lambda: bf.convert(REPO, tmp_path / "m", revision="v9"),
    ):
        with pytest.raises(kind, match=reason) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not cache.exists() and not (tmp_path / "m").exists()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_a_certificate_that_nobody_signed(tmp_path, monkeypatch):
    with hub_server(tmp_path, self_signed(tmp_path)) as server:
        monkeypatch.setattr(hub, "ENDPOINT", server.url)
        with pytest.raises(OSError, match=r"certificate cannot be verified \(TLS\)"):
            bf.load(REPO)


@pytest.mark.parametrize("body", [b"<html>please log in</html>", b"[]", b'{"sha": "../../x"}'])
def test_what_is_no_hub_is_said_to_be_none(server, monkeypatch, body):
    monkeypatch.setattr(server, "listing", lambda *args: (200, {}, body, False))
    with pytest.raises(OSError, match="does not answer as the Hub does|cannot be reached"):
        bf.load(REPO)


def test_where_no_server_answers():
    with pytest.raises(OSError, match="cannot be reached for .*: check the network"):
        bf.load(REPO)


@pytest.mark.parametrize("listens", [True, False])
def test_a_proxy_in_the_way_is_named(server, tmp_path, listens):
    """Proxies are read from the environment once a process, so that this takes another."""
    code = f"import blockffn_mlx as bf; bf.load({REPO!r})"
    proxy = server.url if listens else "http://127.0.0.1:9"
    environment = {**os.environ, "HTTPS_PROXY": proxy, "HF_ENDPOINT": "https://hub.invalid"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    reason = "the proxy refused the way" if listens else "the proxy that HTTPS_PROXY names"
    assert reason in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["not an id/x", "a/..", "a/b?c"])
def test_what_is_no_id_is_said_to_be_none(name):
    with pytest.raises(ValueError, match="neither a folder here nor a Hub id"):
        bf.load(name)


def test_weights_are_told_by_what_they_are(server):
    (server.folder / "pytorch_model.bin").unlink()
    shutil.copy(GOLDEN / "gqa_block" / "model.safetensors", server.folder)
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(GOLDEN / "gqa_block" / name, server.folder)
    others = [
        "training_args.bin",
        "optimizer.bin",
        "scheduler.bin",
        "optimizer.pt",
        "rng_state.bin",
    ]
    others += ["scheduler.pt", "checkpoint-5/model.safetensors", "original/consolidated.pt"]
    for name in others:
        (server.folder / name).parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(server.folder / name, "w") as file:
            file.writestr("x/data.pkl", b"\x80\x02ctransformers.training_args\nT\nq\x00)\x81q\x01.")
    assert bf.load(REPO)[0].args.num_experts == 12
    assert "model.safetensors" in asked_for(server) and not asked_for(server) & set(others)


@pytest.mark.parametrize(
    "names, chosen",
    [
        (["pytorch_model.bin", "model.safetensors"], ["pytorch_model.bin"]),
        (["a.safetensors", "training_args.bin"], ["a.safetensors"]),
        (["a.pt", "optimizer.pt"], ["a.pt"]),
        (["model-1-of-2.safetensors", "model-2-of-2.safetensors", "x.bin"], None),
        (["sub/pytorch_model.bin", "draft/model.safetensors", "../x.bin"], None),
        (["model.safetensors", "..\\x.json", "/x.json", "../../x.json"], ["model.safetensors"]),
    ],
)
def test_one_set_of_weights_is_chosen_in_each_folder(names, chosen):
    if chosen is None:
        chosen = names[:2] if names[0].startswith("model") else ["draft/model.safetensors"]
    assert hub._files_of_model([*names, "README.md", "code.py"]) == chosen


def test_a_head_in_the_repository_is_found(server):
    shutil.rmtree(server.folder)
    shutil.copytree(GOLDEN / "gqa_block", server.folder)
    shutil.copytree(GOLDEN / "gqa_block_eagle", server.folder / "draft")
    model, _ = bf.load(REPO)
    assert isinstance(make_drafter("auto", model), EagleDrafter)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "config.json", "tokenizer.model"])
def test_what_arrives_is_what_was_announced(server, cache, name):
    server.damaged = {name}
    with pytest.raises(OSError, match=f"{name} of {REPO} arrived damaged"):
        bf.load(REPO)
    assert not cache.exists()
    server.damaged = set()
    bf.load(REPO)  # the damaged file was not kept


def test_half_a_file_is_no_file(server, cache):
    server.cut = {"pytorch_model.bin"}
    with pytest.raises(OSError, match="cannot be reached|trouble|damaged"):
        bf.load(REPO)
    assert not cache.exists()


def test_a_full_disk_is_seen_before_the_download(server, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=hub.FREE_SPACE_MARGIN + 1000)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(OSError, match="is a download of 0.0 GB but .* free"):
        bf.load(REPO)
    assert not asked_for(server)


def test_only_what_was_written_is_uploaded(monkeypatch, tmp_path):
    calls = []

    class Api:
        def __init__(self, endpoint):
            pass

        def create_repo(self, repo, exist_ok):
            calls.append(repo)

        def upload_folder(self, folder_path, repo_id, allow_patterns):
            calls.append(sorted(allow_patterns))

    monkeypatch.setattr(hub, "HfApi", Api)
    bf.convert(GOLDEN / "gqa_block", tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine alone")
    bf.convert(GOLDEN / "gqa_block", tmp_path / "m", overwrite=True, upload_repo="me/mine")
    assert (tmp_path / "m" / "notes.txt").exists()
    written = {file.name for file in (tmp_path / "m").iterdir()} - {"notes.txt"}
    assert calls == ["me/mine", sorted(written)]
    monkeypatch.setattr(Api, "create_repo", None)
    with pytest.raises(OSError, match="is written, but me/mine could not be uploaded"):
        bf.convert(GOLDEN / "gqa_block", tmp_path / "m2", upload_repo="me/mine")
    assert (tmp_path / "m2" / "config.json").exists()


@pytest.mark.parametrize("command", ["convert", "generate"])
def test_commands_in_a_pipe_draw_no_bars(server, tmp_path, command):
    """Neither ours nor the Hub client's, on the first and on an offline run."""
    flags = {
        "convert": ["--hf-path", REPO, "--mlx-path", tmp_path / "m", "--json"],
        "generate": ["--model", REPO, "-p", "hi", "--raw", "-m", "1", "--json"],
    }[command]
    run = f"import sys; from blockffn_mlx.cli.{command} import main; sys.exit(main())"
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "XDG_CACHE_HOME": str(tmp_path / "xdg"),
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", run, *map(str, flags)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    assert "%" not in done.stderr and "\r" not in done.stderr and "it/s" not in done.stderr


def test_a_draft_named_by_its_id_loads_offline(server, monkeypatch, golden):
    shutil.rmtree(server.folder)
    shutil.copytree(GOLDEN / "gqa_block_eagle", server.folder)
    model, _, _ = golden("gqa_block")
    assert isinstance(make_drafter("me/head", model), EagleDrafter)
    go_offline(monkeypatch, "by choice")
    assert isinstance(make_drafter("me/head", model), EagleDrafter)


def test_references_stay_inside_the_cache(tmp_path):
    hub.remember("me/model", "../../../../escaped", COMMIT)
    assert not [file for file in tmp_path.rglob("*escaped*")]
    hub.remember("me/model", "refs/pr/1", COMMIT)
    assert hub.kept_snapshot("me/model", "refs/pr/1") is None  # nothing was downloaded
    hub.snapshot_folder("me/model", COMMIT).mkdir(parents=True)
    assert hub.kept_snapshot("me/model", "refs/pr/1").name == COMMIT
    for name in ("../x", "a" * 5000, "\0"):
        assert hub.kept_snapshot("me/model", name) is None


def test_the_demo_and_folders_ask_no_network(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda **settings: pytest.fail("it asked the Hub"))
    bf.load("demo", lazy=True)
    bf.load(GOLDEN / "gqa_block")
    assert load_checkpoint(Path(GOLDEN / "gqa_block"))
