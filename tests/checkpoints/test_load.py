"""Loading: MLX folders, checkpoints that are converted once and kept, and the Hub's answers."""

import json
import shutil
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import blockffn_mlx as bf
from blockffn_mlx.checkpoints import cache as model_cache
from blockffn_mlx.checkpoints import hub
from blockffn_mlx.cli.convert import main as convert_main
from helpers.models import GOLDEN

REPO = "someone/BlockFFN-Test-SFT"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A model cache of the test's own."""
    monkeypatch.setattr(model_cache, "cache_folder", lambda: tmp_path / "cache")
    convert_module = sys.modules["blockffn_mlx.cli.convert"]
    monkeypatch.setattr(convert_module, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


class FakeHub:
    """Stands where the network would: one repository in a folder, and errors to raise."""

    def __init__(self, monkeypatch, snapshots, source):
        self.folder = snapshots / COMMIT
        shutil.copytree(GOLDEN / source, self.folder)
        self.error = None
        self.file_size = 1000
        self.downloads = 0
        monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(model_info=self.model_info))
        monkeypatch.setattr(hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **kwargs: None)

    def model_info(self, repo, revision=None):
        if self.error:
            raise self.error
        return SimpleNamespace(sha=COMMIT)

    def snapshot_download(self, repo, dry_run=False, **kwargs):
        if self.error:
            raise self.error
        if dry_run:
            return [
                SimpleNamespace(filename=name, file_size=self.file_size, will_download=True)
                for name in ("config.json", "pytorch_model.bin", "model.safetensors")
            ]
        assert kwargs["ignore_patterns"] == ["*.safetensors", "*.pt"]
        assert "*.bin" in kwargs["allow_patterns"] and "*.py" not in kwargs["allow_patterns"]
        self.downloads += 1
        bar = kwargs["tqdm_class"](name="huggingface_hub.snapshot_download", total=10, unit="B")
        bar.update(10)
        return str(self.folder)


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    return FakeHub(monkeypatch, tmp_path / "snapshots", "mla_linear")


def hub_error(kind: type, cause: bool = False) -> Exception:
    """An error as the Hub's client raises it for a dry run, or directly."""
    error = kind("no", response=SimpleNamespace(headers={}, request=None, status_code=401))
    if not cause:
        return error
    outer = DryRunError("dry run")
    outer.__cause__ = error
    return outer


def test_mlx_folder_loads_as_it_is(converted, cache):
    model, tokenizer = bf.load(converted("gqa_block"))
    data = np.load(GOLDEN / "gqa_block" / "golden.npz")
    assert np.abs(np.array(model(mx.array(data["input_ids"]))) - data["logits"]).max() < 1e-4
    assert tokenizer.eos_token_ids == {2} and not cache.exists()


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


def test_folder_without_tokenizer(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "gqa_block", source, ignore=shutil.ignore_patterns("token*"))
    report = bf.convert(source, tmp_path / "m")
    assert any("no tokenizer" in warning for warning in report.warnings)
    model, tokenizer = bf.load(tmp_path / "m")
    assert tokenizer is None and isinstance(model, bf.Model)


def test_hub_model_is_downloaded_and_converted_once(fake_hub):
    stages = []
    model, tokenizer = bf.load(REPO, on_progress=lambda *call: stages.append(call))
    assert model.args.attention_type == "mla" and model.args.chat_tuned
    assert ("download", 10, 10) in stages and stages[-1][0] == "convert"
    downloads = fake_hub.downloads
    bf.load(REPO)
    assert fake_hub.downloads == downloads
    (cached,) = model_cache.cached_models()
    origin = json.loads((cached.path / "config.json").read_text())["blockffn_mlx"]
    assert origin["source"] == REPO and origin["revision"] == COMMIT
    assert f"base_model: {REPO}" in (cached.path / "README.md").read_text()


def test_hub_model_that_is_converted_already(fake_hub, converted, cache):
    shutil.rmtree(fake_hub.folder)
    shutil.copytree(converted("gqa_block"), fake_hub.folder)
    assert bf.load(REPO)[0].args.num_experts == 12
    assert not cache.exists()


@pytest.mark.parametrize(
    "error, reason",
    [
        (hub_error(RepositoryNotFoundError), f"knows no {REPO}"),
        (hub_error(RepositoryNotFoundError, cause=True), f"knows no {REPO}"),
        (hub_error(GatedRepoError, cause=True), "is gated"),
        (hub_error(RevisionNotFoundError), "no revision v9"),
        (DryRunError("no network"), "cannot be reached"),
        (LocalEntryNotFoundError("not here"), "cannot be reached"),
        (RuntimeError("the HTTP library's own"), "cannot be reached"),
    ],
)
def test_hub_errors_are_one_sentence(fake_hub, cache, tmp_path, error, reason):
    fake_hub.error = error
    for call in (
        lambda: bf.load(REPO, revision="v9"),
        lambda: bf.convert(REPO, tmp_path / "m", revision="v9"),
    ):
        with pytest.raises((ValueError, OSError), match=reason) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not cache.exists() and not (tmp_path / "m").exists()


def test_upload(fake_hub, monkeypatch, tmp_path):
    calls = []
    api = SimpleNamespace(
        create_repo=lambda repo, exist_ok: calls.append((repo, exist_ok)),
        upload_folder=lambda folder_path, repo_id: calls.append((str(folder_path), repo_id)),
    )
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    bf.convert(GOLDEN / "gqa_block", tmp_path / "m", upload_repo="me/mine")
    assert calls == [("me/mine", True), (str(tmp_path / "m"), "me/mine")]
    api.create_repo = None
    with pytest.raises(OSError, match="is written, but me/mine could not be uploaded"):
        bf.convert(GOLDEN / "gqa_block", tmp_path / "m2", upload_repo="me/mine")
    assert (tmp_path / "m2" / "config.json").exists()


def test_full_disk_is_seen_before_the_download(fake_hub, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=10**9)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda place: usage)
    fake_hub.file_size = 10**9  # of two files that will come; the third is not wanted
    with pytest.raises(OSError, match="download of 2.0 GB but .* has only 1.0 GB free"):
        bf.load(REPO)
    assert fake_hub.downloads == 0


@pytest.mark.parametrize("path", ["./missing", "missing", "a/b/c"])
def test_missing_folder(path):
    with pytest.raises(OSError, match="is not a folder"):
        bf.load(path)


def test_damaged_mlx_folder_is_named(tmp_path, converted):
    folder = tmp_path / "m"
    shutil.copytree(converted("gqa_block"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        bf.load(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated|damaged"):
        bf.load(folder)
    weights.unlink()
    with pytest.raises(OSError, match="missing"):
        bf.load(folder)


def test_code_in_a_folder_never_runs(tmp_path, converted):
    folder = tmp_path / "m"
    shutil.copytree(converted("gqa_block"), folder)
    (folder / "blockffn_model.py").write_text("raise SystemExit('this ran')")
    settings = folder / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["blockffn_model.Tokenizer", "blockffn_model.Tokenizer"]}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "auto_map": auto_map}))
    assert bf.load(folder)[1] is not None


def test_cache_list_and_clear(capsys, monkeypatch, cache):
    bf.load(GOLDEN / "gqa_block")
    for flags, expected in (
        (["list"], "gqa_block"),
        (["list", "--json"], '"source": "gqa_block"'),
        (["clear"], "freed"),
        (["list"], "0 models"),
    ):
        monkeypatch.setattr(sys, "argv", ["blockffn-convert", "--cache", *flags])
        assert convert_main() == 0
        assert expected in capsys.readouterr().out
    assert not any(cache.iterdir())
