"""Conversions that are kept: found again, made anew, shared by processes, listed and removed."""

import json
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import blockffn_mlx as bf
from blockffn_mlx import device
from blockffn_mlx.checkpoints import cache as model_cache
from blockffn_mlx.checkpoints.atomic_folder import atomic_folder
from blockffn_mlx.cli.convert import main as convert_main
from helpers.models import GOLDEN

pytestmark = pytest.mark.usefixtures("cache")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_checkpoint_is_converted_once(tmp_path, cache):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "gqa_block", source)
    stages = []
    for _ in range(2):
        model, tokenizer = bf.load(str(source), on_progress=lambda *call: stages.append(call[0]))
        assert tokenizer is not None and model.args.num_experts == 12
    assert set(stages) == {"convert"} and len(list(cache.iterdir())) == 1
    converted_times = len(stages)
    bf.load(source, quantize=True, on_progress=lambda *call: stages.append(call[0]))
    assert len(list(cache.iterdir())) == 2 and len(stages) > converted_times
    # Another state of the source is another model.
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "scale_depth": 2.8}))
    assert bf.load(source)[0].args.scale_depth == 2.8


def test_cache_key_holds_the_version(monkeypatch):
    before = model_cache.cached_path("a/b", COMMIT, {})
    monkeypatch.setattr(model_cache, "__version__", "99")
    assert model_cache.cached_path("a/b", COMMIT, {}) != before


def test_cache_names_stay_inside_the_cache():
    for source in ("/model", "/", "/a/b/..", "a/b\n[1]*", ".hidden/.x"):
        path = model_cache.cached_path(source, [], {})
        assert path.parent == model_cache.cache_folder(), source
        assert model_cache.is_cached(path) and not set(path.name) & set("\n[]*/")


def test_other_weights_of_the_same_size_and_time_are_another_model(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "gqa_block", source)
    before = model_cache.folder_state(source)
    weights = source / "model.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    data = weights.read_bytes()
    weights.write_bytes(data[:-4] + bytes(4))
    os.utime(weights, ns=times)
    assert weights.stat().st_mtime_ns == times[1] and weights.stat().st_size == len(data)
    assert model_cache.folder_state(source) != before


@pytest.mark.parametrize("damage", ["config", "weights", "emptied"])
def test_a_damaged_conversion_is_made_anew(cache, damage):
    source = GOLDEN / "gqa_block"
    bf.load(source)
    (kept,) = cache.iterdir()
    if damage == "config":
        (kept / "config.json").write_text("{")
    elif damage == "weights":
        (kept / "model.safetensors").write_bytes(b"x" * 100)
    else:
        for file in kept.iterdir():
            file.unlink()
    assert model_cache.cached_models()[0].path == kept  # nor does a list of them fail
    with pytest.warns(UserWarning, match="damaged and made anew"):
        bf.load(source)
    bf.load(source)


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("how", ["a file", "nowhere", "no home"])
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, how):
    (tmp_path / "cache").touch()
    place = tmp_path / "cache" if how == "a file" else Path("/proc/no/cache")
    if how == "no home":
        monkeypatch.setattr(Path, "home", no_home)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        place = device.cache_folder()
    monkeypatch.setattr(model_cache, "cache_folder", lambda: place)
    with pytest.warns(UserWarning, match="the cache cannot be written"):
        model, _ = bf.load(GOLDEN / "gqa_block")
    assert model.args.num_experts == 12


def test_two_that_convert_the_same_model_wait_for_each_other(cache):
    source = str(GOLDEN / "gqa_block")
    settings = dict(quantize=False, q_bits=None, q_group_size=None, dtype=None, q_mode="affine")
    kept = model_cache.cached_path(source, model_cache.folder_state(Path(source)), settings)
    holding, done = threading.Event(), threading.Event()

    def first():
        with atomic_folder(kept) as fresh:
            holding.set()
            done.wait(5)
            shutil.copytree(other, fresh, dirs_exist_ok=True)

    other = cache.parent / "other"
    bf.convert(source, other)
    with ThreadPoolExecutor() as pool:
        job = pool.submit(first)
        holding.wait(5)
        threading.Timer(0.5, done.set).start()
        bf.load(source)
        job.result()
    assert [folder.name for folder in cache.iterdir()] == [kept.name]


def test_a_conversion_that_another_finished_first_is_used(monkeypatch):
    module = sys.modules["blockffn_mlx.checkpoints.load"]
    real = module.convert

    def late(*args, **settings):
        real(*args, **settings)  # the other process
        return real(*args, **settings)

    monkeypatch.setattr(module, "convert", late)
    assert bf.load(GOLDEN / "gqa_block")[0].args.num_experts == 12


def test_cache_list_remove_and_clear(capsys, monkeypatch, cache):
    bf.load(GOLDEN / "gqa_block")
    bf.load(GOLDEN / "gqa_block", quantize=True, q_bits=8, q_group_size=32)
    packed = next(
        model for model in model_cache.cached_models() if model.weights == "8 bits"
    ).path.name
    for flags, expected in (
        (["list"], "8 bits"),
        (["list"], "float32"),
        (["remove", packed], "freed"),
        (["list"], "1 model in"),
        (["list", "--json"], '"source": "gqa_block"'),
        (["clear"], "freed"),
        (["list"], "0 models"),
    ):
        monkeypatch.setattr(sys, "argv", ["blockffn-convert", "--cache", *flags])
        assert convert_main() == 0
        assert expected in capsys.readouterr().out
    assert not any(cache.iterdir())
    monkeypatch.setattr(sys, "argv", ["blockffn-convert", "--cache", "remove", packed])
    assert convert_main() == 1 and "no model called" in capsys.readouterr().err
