"""Files of training text: encodings, names, and damage."""

import json
import lzma
import os

import pytest

from blockffn_mlx.training.data import read_files
from blockffn_mlx.training.packed import read_packed
from blockffn_mlx.training.text import read_documents, read_text, source_names
from blockffn_mlx.training.tokenizer import train_tokenizer


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a/x.txt", "b/y.txt"], ["x", "y"]),
        (["a/x.txt", "b/x.txt"], ["a/x.txt", "b/x.txt"]),
        (["x.txt", "x.jsonl"], ["x.txt", "x.jsonl"]),
        (["a/c/x.txt", "b/c/x.txt", "y.txt"], ["a/c/x.txt", "b/c/x.txt", "y"]),
        (["a/x.txt", "b/x.txt", "b/x.jsonl"], ["a/x.txt", "b/x.txt", "x.jsonl"]),
    ],
)
def test_files_of_one_name_are_sources_of_their_own(tmp_path, files, expected):
    paths = [tmp_path / file for file in files]
    assert list(source_names(paths)) == expected
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"text number {number} " * 40
        line = json.dumps({"text": text}) if path.suffix == ".jsonl" else text
        path.write_text(line)
    tokenizer = train_tokenizer(["text number"], 300)
    corpus = read_files(paths, tokenizer, 0.1)
    assert list(corpus.train) == list(corpus.validation) == expected
    for number, source in enumerate(corpus.train.values()):
        assert f"number {number}" in tokenizer.decode(source.tokens.tolist())


def test_a_file_is_named_once(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="x.txt twice"):
        list(source_names([tmp_path / "x.txt", tmp_path / "." / "x.txt"]))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_documents(tmp_path / "a.txt") == ["hello"]
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b\\u2028c"}\r\n')
    assert read_documents(tmp_path / "b.jsonl") == ["a", "b\u2028c"]


def test_surrogates_become_replacement_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud800 and \\udfff"}')
    (text,) = read_documents(tmp_path / "a.jsonl")
    assert text.encode().decode() == text and set(text) == set("\ufffd and ")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"\xff\xfeh\x00i\x00", "not UTF-8 text"),
        ("a.jsonl", b'{"text": "\xff"}', "not UTF-8 text"),
        ("a.jsonl", b"\n \n", "no documents"),
        ("a.jsonl", b"", "no documents"),
        ("a.json", b'[{"text": "a"}]', "one JSON object a line"),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_documents(tmp_path / name)


def test_special_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="not a regular file"):
            read_text(path)


def test_nothing_is_held_out_where_nothing_should_be(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "one two"}\n' * 5)
    tokenizer, paths = train_tokenizer(["one two"], 300), [tmp_path / "a.jsonl"]
    corpus = read_files(paths, tokenizer, 0.0)
    assert not corpus.validation and len(corpus.train["a"].starts) == 5
    corpus = read_files(paths, tokenizer, 0.5, [tmp_path / "b.jsonl"])
    assert len(corpus.train["a"].starts) == len(corpus.validation["b"].starts) == 5
    assert list(corpus.train) == ["a"] and list(corpus.validation) == ["b"]


@pytest.mark.parametrize("held_out", [0.0, 0.5, 0.99])
def test_nothing_to_train_on_is_an_error(tmp_path, held_out):
    (tmp_path / "a.txt").write_text("")
    tokenizer = train_tokenizer(["x"], 300)
    if held_out == 0:
        assert len(read_files([tmp_path / "a.txt"], tokenizer, held_out).train["a"].tokens) == 2
    else:
        with pytest.raises(ValueError, match="at least two"):
            read_files([tmp_path / "a.txt"], tokenizer, held_out)


MANIFESTS = [
    (lambda m: m.clear(), "special is not an object"),
    (lambda m: m.update(special=[]), "special is not an object"),
    (lambda m: m["special"].pop("pad"), "special pad is not a number"),
    (lambda m: m["special"].update(bos=-1), "special bos is not a number"),
    (lambda m: m.update(packs=[]), "packs is not an object"),
    (lambda m: m["packs"].update(a=3), "packs is not an object"),
    (lambda m: m["packs"]["a"].pop("file"), "file must name"),
    (lambda m: m["packs"]["a"].update(file="../a.u16.xz"), "file must name"),
    (lambda m: m["packs"]["a"].update(file=7), "file must name"),
    (lambda m: m["packs"]["a"].pop("sha256_raw"), "does not match its manifest"),
    (lambda m: m["packs"]["a"].pop("parts"), "parts is not a list"),
    (lambda m: m["packs"]["a"].update(parts=[1]), "parts is not an object"),
    (lambda m: m["packs"]["a"]["parts"][0].pop("tokens"), "tokens is not a number"),
    (lambda m: m["packs"]["a"]["parts"][0].update(offset=-1), "offset is not a number"),
    (lambda m: m["packs"]["a"]["parts"][0].update(tokens=10**6), "lies outside"),
    (lambda m: m["packs"]["a"]["parts"][0].update(tokens=0), "lies outside"),
    (lambda m: m["packs"]["a"]["parts"][0].update(split="dev"), "train or val"),
    (lambda m: m["packs"]["a"]["parts"][0].update(split=[]), "train or val"),
    (lambda m: m["packs"]["a"]["parts"][0].update(source=None), "needs a source"),
    (lambda m: m["packs"]["a"]["parts"][1].update(source="a"), "two train parts of a"),
]


@pytest.mark.parametrize(("change", "reason"), MANIFESTS)
def test_manifests_of_any_shape_are_refused_in_one_line(packed, change, reason):
    path = packed / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=reason) as error:
        read_packed(packed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000])
def test_a_manifest_that_is_no_object_is_refused(packed, text):
    (packed / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="manifest.json"):
        read_packed(packed)


def test_damaged_and_swollen_packs_are_refused(packed):
    path = packed / "a.u16.xz"
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:20], b"", b"no xz at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged|does not match"):
            read_packed(packed)
    # What unpacks to more than its parts is not unpacked.
    path.write_bytes(lzma.compress(bytes(200 << 20), preset=0))
    with pytest.raises(ValueError, match="does not match"):
        read_packed(packed)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_packed(packed)
    os.mkfifo(path)
    with pytest.raises(ValueError, match="not a regular file"):
        read_packed(packed)
