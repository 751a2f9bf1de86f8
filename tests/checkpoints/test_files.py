"""The door: special files, pointers of Git LFS, byte-order marks, size and depth."""

import codecs
import json
import os

import mlx.core as mx
import pytest

from blockffn_mlx.checkpoints import files
from blockffn_mlx.checkpoints.reader import load_checkpoint, load_pickle, read_json
from helpers.torch_files import save_bin

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5907000000\n"
READERS = [
    (read_json, "config.json"),
    (load_checkpoint, "model.safetensors"),
    (load_checkpoint, "pytorch_model.bin"),
    (load_checkpoint, "run.pt"),
    (load_pickle, "freq_1.pkl"),
    (files.read_text, "chat_template.jinja"),
]


@pytest.mark.parametrize("read, name", READERS)
@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "lfs"])
def test_what_is_no_file_is_refused(tmp_path, read, name, kind):
    path = tmp_path / name
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(POINTER)
    with pytest.raises((ValueError, OSError), match="Git LFS" if kind == "lfs" else None) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("mark, encoding", [(codecs.BOM_UTF8, "utf-8"), (b"", "utf-16")])
def test_byte_order_marks(tmp_path, mark, encoding):
    path = tmp_path / "config.json"
    path.write_bytes(mark + json.dumps({"name": "模型"}, ensure_ascii=False).encode(encoding))
    assert read_json(path) == {"name": "模型"}
    (tmp_path / "model.safetensors.index.json").write_bytes(
        mark + json.dumps({"weight_map": {"w": "w.bin"}}).encode(encoding)
    )
    save_bin(tmp_path / "w.bin", {"w": mx.ones(2), "v": mx.ones(1)})
    assert list(load_checkpoint(tmp_path)) == ["w"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xff{}",
        b"\xef\xbb\xbf",
        b"[]",
        b"null",
        b"{} {}",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' * 200 + b"1" + b"}" * 200,
        b'{"a": ' + b"9" * 10_000 + b"}",
        b"[" * 1_000_000,
        b" " * (files.MAX_JSON_BYTES + 1),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="config.json") as caught:
        read_json(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_folder_is_checked_for_those_who_read_without_limits(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "dangling").symlink_to("nowhere")
    files.check_folder(tmp_path)
    with pytest.raises(ValueError, match="more than"):
        files.check_folder(tmp_path, limit=1)
    (tmp_path / "added_tokens.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="not a regular file"):
        files.check_folder(tmp_path)
