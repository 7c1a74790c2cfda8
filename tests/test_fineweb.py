import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import ROOT, command_of, disk, environment, run

import fineweb
from lib.console import UserError
from lib.data.stream import find_shards

TEXTS = [
    "Hello world.", "", "A second document,\nwith two lines. " * 40, "naïve café 東京 🚀",
    "ends with <|endoftext|> in words", None, "x" * 5000, "  spaces  and\ttabs ",
] * 30  # fmt: skip


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet_of(**columns):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def zstd(content):
    return pa.Codec("zstd").compress(content, asbytes=True)


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "texts.parquet"
    path.write_bytes(parquet_of(id=list(range(len(TEXTS))), text=TEXTS))
    return path


def read_shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def content_of(folder):
    """Every file but the lock: what a build leaves."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def decode_documents(folder):
    tokens = np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"), key=lambda p: p.name[-10:])])
    assert tokens.dtype == np.dtype("<u2") and tokens[0] == 50256
    starts = np.flatnonzero(tokens == 50256)
    return [fineweb.get_tokenizer().decode(doc[1:].tolist()) for doc in np.split(tokens, starts)[1:]]


def test_tokenizer_is_gpt2():
    encoder = fineweb.get_tokenizer()
    assert encoder.n_vocab == 50257 and encoder.eot_token == 50256
    assert encoder.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]


def test_round_trip_of_every_format(tmp_path, parquet):
    lines = json_lines(TEXTS)
    (tmp_path / "texts.jsonl").write_bytes(lines)
    (tmp_path / "texts.jsonl.gz").write_bytes(gzip.compress(lines))
    half = lines.index(b"\n", len(lines) // 2) + 1
    (tmp_path / "texts.jsonl.zst").write_bytes(zstd(lines[:half]) + zstd(lines[half:]))  # two frames, as pzstd writes
    for folder, compress in {"txt": bytes, "txt.gz": gzip.compress, "txt.zst": zstd}.items():
        (tmp_path / folder).mkdir()
        for i, text in enumerate(TEXTS):
            (tmp_path / folder / f"{i:04d}.{folder}").write_bytes(compress((text or "").encode()))
    kept = [text for text in TEXTS if text]
    for source in sorted({parquet, *tmp_path.iterdir()}):
        out = tmp_path / f"out_{source.name}"
        manifest = fineweb.build(str(source), out, shard_size=3000, workers=2)
        assert decode_documents(out) == kept
        assert manifest["documents"] == len(kept) and manifest["skipped_empty"] == len(TEXTS) - len(kept)
        assert not list(out.glob("*.tmp"))


def test_shards_and_manifest_agree(tmp_path, parquet):
    out = tmp_path / "out"
    fineweb.build(str(parquet), out, shard_size=1000, workers=1)
    manifest = json.loads((out / "manifest.json").read_text())
    shards = manifest["shards"]
    assert [s["file"] for s in shards][:2] == ["texts_val_000000.npy", "texts_train_000001.npy"]
    assert [s["file"] for s in shards] == sorted(read_shards(out), key=lambda name: name[-10:])
    assert all(s["tokens"] == 1000 for s in shards[:-1]) and 0 < shards[-1]["tokens"] <= 1000
    assert sum(s["tokens"] for s in shards) == manifest["tokens"]
    for shard in shards:
        assert hashlib.sha256((out / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


def test_workers_and_start_method_change_no_byte(tmp_path, parquet):
    results = []
    for workers, method in ((1, "fork"), (4, "fork"), (2, "spawn")):
        script = (
            f"import fineweb\nif __name__ == '__main__': "
            f"fineweb.build({str(parquet)!r}, {str(tmp_path / method) + str(workers)!r}, 3000, {workers}, {method!r})"
        )
        (tmp_path / "build.py").write_text(script)
        subprocess.run([sys.executable, str(tmp_path / "build.py")], env={"PYTHONPATH": str(ROOT)}, check=True)
        results.append(read_shards(tmp_path / f"{method}{workers}"))
    assert results[0] == results[1] == results[2] and len(results[0]) > 2


def test_a_document_longer_than_a_shard(tmp_path):
    source = tmp_path / "long.txt"
    source.write_text("one two three four five " * 500)
    fineweb.build(str(source), tmp_path / "out", shard_size=300, workers=1)
    assert len(read_shards(tmp_path / "out")) > 5
    assert decode_documents(tmp_path / "out") == [source.read_text()]


def test_a_finished_folder_is_left_alone_and_an_unfinished_one_is_redone(tmp_path, parquet, capsys):
    out = tmp_path / "out"
    fineweb.build(str(parquet), out, 1000, 1)
    before = read_shards(out)
    fineweb.build(str(parquet), out, 1000, 1)
    assert "already complete" in capsys.readouterr().out
    start = {"complete": False, "shards": [], "progress": dict(file=0, row=0, skip=0)}
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, **start}))
    (out / "texts_train_000002.npy").write_bytes(b"")
    fineweb.build(str(parquet), out, 1000, 1)
    assert read_shards(out) == before


REFUSED = {  # a source, what is in it, what is said
    "missing.txt": (None, "no file or folder"),
    "folder.d": (None, "no file or folder"),
    "table.csv": (b"text", "holds no file that ends in"),
    "empty.txt": (b"", "leaves none for training"),
    "bad.jsonl": (b'{"text": "fine"}\n{"text": \n', "bad.jsonl, line 2"),
    "no_text.jsonl": (b'{"body": "fine"}\n', "line 1"),
    "latin.txt": (b"caf\xe9", "not UTF-8 at byte 3"),
    "latin.jsonl": (b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "latin.jsonl, line 2"),
    "broken.parquet": (b"no parquet", "cannot read"),
    "columns.parquet": (parquet_of(body=["a"]), "['body']"),
    "broken.txt.gz": (b"no gzip", "cannot read"),
    "short.jsonl.gz": (gzip.compress(json_lines(TEXTS))[:-9], "cannot read"),
    "damaged.txt.gz": (gzip.compress(b"text " * 99)[:15] + b"x" * 30, "cannot read"),
    "broken.jsonl.zst": (b"no zstd", "cannot read"),
    "short.jsonl.zst": (zstd(json_lines(TEXTS))[:-9], "cannot read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_source_that_cannot_be_read_is_refused_and_leaves_no_folder(name, tmp_path):
    content, message = REFUSED[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(fineweb.UserError, match=re.escape(message)):
        fineweb.build(str(tmp_path / name), tmp_path / "out", 1000, 1)
    assert not (tmp_path / "out").exists()


def test_a_shard_size_that_leaves_no_train_shard_is_refused(tmp_path, parquet):
    with pytest.raises(fineweb.UserError, match="--shard_size"):
        fineweb.build(str(parquet), tmp_path / "out", 100_000_000, 1)
    assert not (tmp_path / "out").exists()


def test_the_shards_of_another_source_are_refused(tmp_path, parquet):
    fineweb.build(str(parquet), tmp_path / "out", 1000, 1)
    (tmp_path / "other.txt").write_text("other text " * 3000)
    with pytest.raises(fineweb.UserError, match="already holds shards of"):
        fineweb.build(str(tmp_path / "other.txt"), tmp_path / "out", 1000, 1)


def test_shards_without_a_manifest_are_refused(tmp_path, parquet):
    fineweb.build(str(parquet), tmp_path / "out", 1000, 1)
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(fineweb.UserError, match="unknown origin"):
        fineweb.build(str(parquet), tmp_path / "out", 1000, 1)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    (folder / "texts.jsonl").write_bytes(json_lines(TEXTS))
    fineweb.build(str(folder / "texts.jsonl"), folder / "out", workers=1)
    return folder


def change(**fields):
    return lambda text: json.dumps({**json.loads(text), **fields})


DAMAGED = {  # what becomes of a manifest, what is said of it
    "truncated": (lambda text: text[: len(text) // 2], "line"),
    "empty": (lambda text: "", "Expecting value"),
    "{}": (lambda text: "{}", "complete"),
    "[]": (lambda text: "[]", "complete"),
    "null": (lambda text: "null", "complete"),
    "deep": (lambda text: "[" * 100_000, "recursion"),
    "of another program": (lambda text: '{"name": "app", "version": 3}', "another program's"),
    "complete is text": (change(complete="false"), "complete"),
    "shards is a dict": (change(shards={}), "shards"),
    "a shard is a name": (change(shards=["texts_val_000000.npy"]), "file"),
    "tokens is text": (change(shards=[{"file": "a_val_000000.npy", "tokens": "7", "sha256": "0"}]), '"tokens"'),
    "no documents": (change(complete=False, documents=None), "documents"),
    "no progress": (change(complete=False), "progress"),
    "progress is short": (change(complete=False, progress={"file": 0}), "row"),
    "files are names": (change(complete=False, progress=dict(file=0, row=0, skip=0), files=["a"]), "file"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_manifest_is_named_with_the_remedy(kind, built, tmp_path):
    damage, word = DAMAGED[kind]
    out = tmp_path / "out"
    shutil.copytree(built / "out", out)
    (out / "manifest.json").write_text(damage((out / "manifest.json").read_text()))
    before = {path: path.read_bytes() for path in out.iterdir()}
    result = run("fineweb.py", "--source", built / "texts.jsonl", "--out", out)
    assert result.returncode == 2 and "Traceback" not in result.stdout
    assert all(part in result.stdout for part in ("manifest.json is unfinished or damaged", word, "delete it"))
    for split in ("train", "val"):
        with pytest.raises(fineweb.UserError, match="manifest.json is unfinished or damaged"):
            find_shards(out, [split])
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_an_unfinished_folder_is_said_to_be_to_the_trainer(built, tmp_path):
    shutil.copytree(built / "out", tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    path.write_text(change(complete=False, progress=dict(file=0, row=0, skip=0))(path.read_text()))
    with pytest.raises(fineweb.UserError, match="is unfinished: start fineweb.py again"):
        find_shards(tmp_path / "out")


def test_own_text_is_cut_into_ten_shards_or_so(tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(json_lines(TEXTS))
    size = int((tmp_path / "texts.jsonl").stat().st_size * 0.25) // 10
    result = run("fineweb.py", "--source", tmp_path / "texts.jsonl", "--out", tmp_path / "out")
    assert result.returncode == 0 and f"shards of {size:,} tokens" in result.stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["shard_size"] == size and 5 < len(manifest["shards"]) < 15
    assert {shard["tokens"] for shard in manifest["shards"][:-1]} == {size}
    assert decode_documents(tmp_path / "out") == [text for text in TEXTS if text]
    again = run("fineweb.py", "--source", tmp_path / "texts.jsonl", "--out", tmp_path / "out")
    assert again.returncode == 0 and "already complete" in again.stdout
    other = run("fineweb.py", "--source", tmp_path / "texts.jsonl", "--out", tmp_path / "out", "--shard_size", 1000)
    assert other.returncode == 2 and f"'shard_size': {size}" in other.stdout and "'shard_size': 1000" in other.stdout


def test_text_with_fewer_tokens_than_its_size_promises_still_trains(tmp_path):
    records = [{"text": f"Only {i} of many bytes.", "page": "x" * 2000} for i in range(300)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run("fineweb.py", "--source", tmp_path / "pages.jsonl", "--out", tmp_path / "out").returncode == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["shard_size"] == manifest["tokens"] // 10 and len(manifest["shards"]) in (10, 11)
    assert decode_documents(tmp_path / "out") == [record["text"] for record in records]
    assert all(find_shards(tmp_path / "out")[0].values())
    refused = run("fineweb.py", "--source", tmp_path / "pages.jsonl", "--out", tmp_path / "no", "--shard_size", 10_000)
    assert refused.returncode == 2 and "--shard_size" in refused.stdout


def test_text_with_more_tokens_than_its_size_promises_has_more_shards(tmp_path):
    (tmp_path / "same.parquet").write_bytes(parquet_of(text=["A text that is the same in every row. " * 9] * 60))
    manifest = fineweb.build(str(tmp_path / "same.parquet"), tmp_path / "out", workers=1)
    assert len(manifest["shards"]) > 20 and manifest["documents"] == 60


def test_shards_are_named_so_that_the_loader_knows_them(tmp_path):
    (tmp_path / "東京.txt").write_text("naïve café 東京 " * 100)
    fineweb.build(str(tmp_path / "東京.txt"), tmp_path / "out", workers=1)
    assert find_shards(tmp_path / "out")[0]["val"][0] == "text_val_000000.npy"


def test_a_build_in_a_folder_of_other_files_leaves_them_alone(tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(json_lines(TEXTS))
    for name in (".download/mine", "mine.incomplete", "mine.tmp", "mine_val_00.npy", "poem.txt.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run("fineweb.py", "--source", "texts.jsonl", "--out", ".", "--text_column", "no", cwd=tmp_path).returncode
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run("fineweb.py", "--source", "texts.jsonl", "--out", ".", cwd=tmp_path).returncode == 0
    assert all(path.read_bytes() == content for path, content in before.items())


def test_every_file_is_on_the_disk_before_it_gets_its_name(tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(json_lines(TEXTS))
    result = run("tests/probes/durable_renames.py", "--source", tmp_path / "texts.jsonl", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(os.name != "posix", reason="limits of the operating system")
def test_a_disk_that_fills_up_is_said_and_the_restart_ends_with_the_same_bytes(tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(json_lines(TEXTS))
    flags = ["--source", tmp_path / "texts.jsonl", "--shard_size", 500, "--out"]
    assert run("fineweb.py", *flags, tmp_path / "undisturbed").returncode == 0
    out = tmp_path / "out"
    full = run("tests/probes/limit_file_size.py", 5000, *flags, out)  # bytes: the manifest outgrows it
    assert full.returncode == 2 and "cannot write" in full.stdout and "start again" in full.stdout
    assert "Traceback" not in full.stdout and 5 < len(read_shards(out)) < len(read_shards(tmp_path / "undisturbed"))
    assert not list(out.glob("*.tmp"))
    assert run("fineweb.py", *flags, out).returncode == 0
    assert content_of(out) == content_of(tmp_path / "undisturbed")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 kB."""
    with disk(tmp_path / "disk", "256k"):
        yield tmp_path / "disk"


def test_a_full_disk_is_said_and_the_restart_ends_with_the_same_bytes(tmp_path, small_disk):
    same = ["A text that is the same in every row, so that the size of the file promises little. " * 9] * 2000
    (tmp_path / "same.parquet").write_bytes(parquet_of(text=same))
    flags = ["--source", tmp_path / "same.parquet", "--shard_size", 20_000, "--out"]
    assert run("fineweb.py", *flags, tmp_path / "undisturbed").returncode == 0
    full = run("fineweb.py", *flags, small_disk / "out")
    assert full.returncode == 2 and "No space left on device" in full.stdout and "start again" in full.stdout
    assert "Traceback" not in full.stdout and len(read_shards(small_disk / "out")) > 2
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert run("fineweb.py", *flags, small_disk / "out").returncode == 0
    assert content_of(small_disk / "out") == content_of(tmp_path / "undisturbed")


def test_a_source_that_was_changed_to_another_of_its_size_is_noticed(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.jsonl").write_bytes(json_lines([f"a cat and {i} dogs" for i in range(9000)]))
    flags = dict(source=str(tmp_path / "texts"), out=tmp_path / "out", workers=1)
    fineweb.build(**flags)
    fineweb.build(**flags)  # is complete
    path = tmp_path / "texts" / "b.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[::-1]))
    with pytest.raises(UserError, match="revision"):
        fineweb.build(**flags)


def test_the_front_door_says_it_in_one_line_and_exits_with_2(tmp_path):
    result = run("fineweb.py", "--source", tmp_path / "missing.txt", "--out", tmp_path / "out")
    assert result.returncode == 2 and "error: no file or folder" in result.stdout
    assert "Traceback" not in result.stdout and not (tmp_path / "out").exists()
    assert run("fineweb.py", "--sauce", "x").returncode == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_console_that_is_lost_ends_no_build(tmp_path, parquet):
    with open("/dev/full", "w") as full:
        command = command_of("fineweb.py", "--source", parquet, "--out", tmp_path / "out", "--shard_size", "1000")
        assert subprocess.run(command, stdout=full, stderr=full, env=environment(), timeout=60).returncode == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"]


def test_byte_order_marks_are_no_text_and_dead_links_are_named(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(b"\xef\xbb\xbfOne two")
    (tmp_path / "texts" / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "Three"}\n')
    (tmp_path / "texts" / "c.txt").mkdir()  # a folder
    (tmp_path / "texts" / "d.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match="cannot read .*d.txt"):
        fineweb.build(str(tmp_path / "texts"), tmp_path / "out", shard_size=2, workers=1)
    (tmp_path / "texts" / "d.txt").unlink()
    fineweb.build(str(tmp_path / "texts"), tmp_path / "out", shard_size=2, workers=1)
    assert decode_documents(tmp_path / "out") == ["One two", "Three"]
