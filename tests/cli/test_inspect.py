"""blockffn-inspect: what it shows, what it writes, what it refuses."""

import csv
import json

import numpy as np
import pytest

from helpers.commands import run


@pytest.fixture(scope="module")
def folder(converted):
    return converted("gqa_block")


def refused(*flags) -> str:
    """The one line on stderr of a command that was refused."""
    result = run("inspect", *flags)
    assert result.returncode == 1 and not result.stdout, result.stdout
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    return result.stderr


def test_one_token_has_no_pairs_and_no_chunks():
    result = run("inspect", "demo", "-p", "hi", "--json")
    found = json.loads(result.stdout)
    assert result.stderr == "" and len(found["tokens"]) == 1
    assert 0 < found["tls"] < 1 and found["cls"] is found["reuse"] is None
    shown = run("inspect", "demo", "-p", "hi")
    assert "nan" not in shown.stdout and "over 1 token " in shown.stdout


def test_nothing_is_nothing_to_look_at(folder, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "no documents" in refused(folder, "--text", empty)
    assert "nothing to look at" in refused(folder)


def test_the_three_formats_tell_the_same(folder, tmp_path):
    lines = tmp_path / "lines.jsonl"
    texts = ["a first text, of some length", 'and \u2028 a second, "quoted",\nwith two lines']
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ["-p", "the prompt", "--text", lines, "--window", 6, "--json"]
    arrays, rows = tmp_path / "scores.npz", tmp_path / "scores.csv"
    document = json.loads(run("inspect", folder, *flags, "--out", arrays).stdout)
    assert run("inspect", folder, *flags, "--out", rows).returncode == 0
    dense = np.load(arrays)
    scores = dense["scores"]
    assert scores.shape == (len(dense["token_id"]), 2, 12) and scores.dtype == np.float32
    assert document["tls"] == pytest.approx(1 - (scores != 0).mean())
    assert dense["names"].tolist() == ["prompt", "lines.jsonl, 1", "lines.jsonl, 2"]
    assert np.isnan(dense["nats"]).sum() == 3  # nothing foretells a text's first token
    measured = dense["nats"][dense["document"] > 0]
    assert np.nanmean(measured) == pytest.approx(document["loss"]["nats_per_token"], rel=1e-5)
    with rows.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == (scores != 0).sum()
    starts = {name: (dense["document"] == i).argmax() for i, name in enumerate(dense["names"])}
    for row in read[:: len(read) // 50]:
        at = starts[row["document"]] + int(row["position"])
        assert float(row["score"]) == pytest.approx(
            scores[at, int(row["layer"]), int(row["expert"])], rel=1e-6
        )
        assert dense["token"][at] == row["token"]


def test_conversations_are_read_as_the_chat_lays_them_out(tmp_path):
    lines, target = tmp_path / "chats.jsonl", tmp_path / "scores.npz"
    turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi there."}]
    lines.write_text(json.dumps({"messages": turns}) + "\n")
    assert run("inspect", "demo", "--text", lines, "--out", target, "--json").returncode == 0
    tokens = np.load(target)["token"].tolist()
    assert "".join(tokens).count("Hi there.") == 1 and "<|assistant|>" in tokens


def test_a_page_is_whole_and_holds_every_text(folder, tmp_path):
    page, text = tmp_path / "page.html", tmp_path / "text.txt"
    text.write_text("some words <b>that</b> come again")
    flags = ["-p", "the prompt", "--text", text, "--json", "--html", page]
    document = json.loads(run("inspect", folder, *flags).stdout)
    written = page.read_text(encoding="utf-8")
    data = json.loads(written.split('id="data">')[1].split("</script>")[0])
    assert data["names"] == ["prompt", "text.txt"] and "%%" not in written
    assert np.mean(data["tls"]) == pytest.approx(document["tls"], abs=1e-4)
    assert float(data["facts"]["perplexity"]) == pytest.approx(
        document["loss"]["perplexity"], abs=0.01
    )
    assert "".join(data["texts"]).endswith("some words <b>that</b> come again")


def test_parquet_where_pyarrow_is(folder, tmp_path, monkeypatch):
    from blockffn_mlx.analysis import export

    target = tmp_path / "scores.parquet"
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert "pip install pyarrow" in refused(folder, "-p", "hi", "--out", target)
    monkeypatch.undo()
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    assert run("inspect", folder, "-p", "hi there", "--out", target).returncode == 0
    table = parquet.read_table(target)
    assert table.column_names == list(export.COLUMNS) and table.num_rows > 10


def test_a_file_that_fails_on_its_way_is_not_there(folder, tmp_path, monkeypatch):
    from blockffn_mlx.cli import inspect

    def failing(*arguments):
        yield next(watch(*arguments))
        raise OSError("the disk is full")

    watch = inspect.watch
    monkeypatch.setattr(inspect, "watch", failing)
    for name in ("s.csv", "s.npz"):
        assert "disk is full" in refused(folder, "-p", "hi there", "--out", tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--svg", "x.png"], "ends in .svg"),
        (["--html", "x.txt"], "ends in .html"),
        (["--out", "x.json"], ".npz, .csv, .parquet"),
        (["--svg", "missing/x.svg"], "there is no folder"),
        (["--out", "missing/x.csv"], "there is no folder"),
        (["--text", "."], "is a directory"),
        (["--text", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--text", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--window", "4", "--stride", "5"], "longer than --window"),
        (["--against-bits", "7"], "bit widths"),
        (["--against", "demo", "--against-bits", "4"], "ask for one"),
    ],
)
def test_what_cannot_be_is_one_line(folder, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    said = refused(folder, "-p", "hi", *flags)
    assert says in said and "Errno" not in said
    assert not list(tmp_path.iterdir())


def test_a_smaller_stride_gives_more_context(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words that come again, some words that come again " * 4)

    def loss(*flags):
        found = json.loads(run("inspect", folder, "--text", text, "--json", *flags).stdout)
        assert found["tokens"] == []  # texts can be long: --out has those
        return found["loss"]

    whole, windows = loss("--window", 4096), loss("--window", 8)
    strided = loss("--window", 4096, "--stride", 3)
    assert strided["nats_per_token"] == pytest.approx(whole["nats_per_token"], rel=1e-4)
    assert windows["tokens"] == whole["tokens"] and windows != whole
    assert whole["perplexity"] == pytest.approx(np.exp(whole["nats_per_token"]))


def test_against_itself_nothing_changes_and_few_bits_change_much(folder):
    flags = ["-p", "some words to look at, and some more", "--json"]
    same = json.loads(run("inspect", folder, *flags, "--against", folder).stdout)["against"]
    assert len(same) == 1 and same[0]["kl"] < 1e-6 and same[0]["changed"] == 0
    assert all(layer["lost"] == layer["gained"] == 0 for layer in same[0]["layers"])
    few = json.loads(run("inspect", folder, *flags, "--against-bits", "8,2").stdout)["against"]
    assert [row["name"] for row in few] == ["8 bits", "2 bits"]
    assert few[0]["kl"] < few[1]["kl"] and few[0]["lost"] < few[1]["lost"]
    assert few[0]["bits_per_weight"] > few[1]["bits_per_weight"]
    drawn = run("inspect", folder, *flags[:2], "--against-bits", "2")
    assert "bits/weight" in drawn.stdout and "experts of each layer" in drawn.stdout
    assert "where it differs most" in drawn.stdout and len(few[1]["most"]) == 10


def test_other_tokens_are_not_compared(folder, tmp_path):
    assert "not comparable" in refused(folder, "-p", "hi there", "--json", "--against", "demo")


def test_layers_have_the_models_numbers(converted):
    """A DECO's first layers are dense: its tables begin with the first that has a router."""
    folder = converted("deco_simple")
    found = json.loads(run("inspect", folder, "-p", "some words here", "--json").stdout)
    rows = run("inspect", folder, "-p", "some words here").stdout.split("Sparsity over")[1]
    named = [line.split("│")[1].strip() for line in rows.splitlines() if line.count("│") > 3]
    first = json.loads((folder / "config.json").read_text())["moe_layer_freq"].index(1)
    assert first > 0 and named[0] == str(first) and len(named) == len(found["layers"]) + 1
    assert [layer["layer"] for layer in found["layers"]] == list(map(int, named[:-1]))
    talk = run("chat", "--model", folder, "-m", "4", input="some words here\n/sparsity\n").stdout
    drawn = talk.split("experts 0 to")[1].splitlines()[1:]
    assert [row.split()[0] for row in drawn[: len(named) - 1]] == named[:-1]
