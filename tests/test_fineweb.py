import contextlib
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from fake_hub import pointed_at
from support import ROOT, command_of, disk, environment, finish, read_until, run, run_warm

import fineweb
from lib.console import UserError
from lib.data.folder import find_shards
from lib.data.readers import documents_of

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
        assert sorted(decode_documents(out)) == sorted(kept)
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
        results.append(content_of(tmp_path / f"{method}{workers}"))
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
    "empty.txt": (b"", "no file has text"),
    "bad.jsonl": (b'{"text": "fine"}\n{"text": \n', "bad.jsonl, line 2"),
    "no_text.jsonl": (b'{"body": "fine"}\n', 'none has it in "text"'),
    "latin.txt": (b"caf\xe9", "not UTF-8"),
    "latin.jsonl": (b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "latin.jsonl, line 2"),
    "broken.parquet": (b"no parquet", "cannot read"),
    "columns.parquet": (parquet_of(body=["a"]), 'none has it in "text"'),
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
    assert not read_shards(tmp_path / "out")


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


DAMAGED = {  # how a manifest is damaged
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "{}": lambda text: "{}",
    "[]": lambda text: "[]",
    "null": lambda text: "null",
    "deep": lambda text: "[" * 100_000,
    "of another program": lambda text: '{"name": "app", "version": 3}',
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_manifest_is_named_with_the_remedy(kind, built, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(built / "out", out)
    (out / "manifest.json").write_text(DAMAGED[kind]((out / "manifest.json").read_text()))
    before = {path: path.read_bytes() for path in out.iterdir()}
    for use in (lambda: fineweb.build(str(built / "texts.jsonl"), out), lambda: find_shards(out, ["train"])):
        with pytest.raises(UserError, match="manifest.json is damaged.* delete .* build it again.* another program"):
            use()
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_an_unfinished_folder_is_said_to_be_to_the_trainer(built, tmp_path):
    shutil.copytree(built / "out", tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    path.write_text(change(complete=False, progress=dict(file=0, row=0, skip=0))(path.read_text()))
    with pytest.raises(fineweb.UserError, match="is unfinished: start fineweb.py again"):
        find_shards(tmp_path / "out")


def test_own_text_is_cut_into_ten_shards_or_so(tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_bytes(json_lines(TEXTS))
    size = int((tmp_path / "texts.jsonl").stat().st_size * 0.25) // 10
    flags = dict(source=str(tmp_path / "texts.jsonl"), out=tmp_path / "out", workers=1)
    fineweb.build(**flags)
    assert f"shards of {size:,} tokens" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["shard_size"] == size and 5 < len(manifest["shards"]) < 15
    assert {shard["tokens"] for shard in manifest["shards"][:-1]} == {size}
    assert decode_documents(tmp_path / "out") == [text for text in TEXTS if text]
    fineweb.build(**flags)
    assert "already complete" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"'shard_size': {size}.*'shard_size': 1000"):
        fineweb.build(**flags, shard_size=1000)


def test_text_with_fewer_tokens_than_its_size_promises_still_trains(tmp_path):
    records = [{"text": f"Only {i} of many bytes.", "page": "x" * 2000} for i in range(300)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    fineweb.build(str(tmp_path / "pages.jsonl"), tmp_path / "out", workers=1)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["shard_size"] == manifest["tokens"] // 10 and len(manifest["shards"]) in (10, 11)
    assert decode_documents(tmp_path / "out") == [record["text"] for record in records]
    assert all(find_shards(tmp_path / "out")[0].values())
    with pytest.raises(UserError, match="--shard_size"):
        fineweb.build(str(tmp_path / "pages.jsonl"), tmp_path / "no", 10_000, 1)


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


@pytest.mark.skipif(os.name != "posix", reason="limits of the operating system")
def test_a_disk_that_fills_up_is_said_and_the_restart_ends_with_the_same_bytes(tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(json_lines(TEXTS))
    flags = ["--source", tmp_path / "texts.jsonl", "--shard_size", 500, "--out"]
    fineweb.build(str(tmp_path / "texts.jsonl"), tmp_path / "undisturbed", 500, 1)
    out = tmp_path / "out"
    full = run_warm("tests/probes/limit_file_size.py", 5000, *flags, out)  # bytes: the manifest outgrows it
    assert full.returncode == 2 and "cannot write" in full.stdout and "start again" in full.stdout
    assert "Traceback" not in full.stdout and 5 < len(read_shards(out)) < len(read_shards(tmp_path / "undisturbed"))
    assert not list(out.glob("*.tmp"))
    fineweb.build(str(tmp_path / "texts.jsonl"), out, 500, 1)
    assert content_of(out) == content_of(tmp_path / "undisturbed")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 kB."""
    with disk(tmp_path / "disk", "256k"):
        yield tmp_path / "disk"


def test_a_full_disk_is_said_and_the_restart_ends_with_the_same_bytes(tmp_path, small_disk):
    same = ["A text that is the same in every row, so that the size of the file promises little. " * 9] * 2000
    (tmp_path / "same.parquet").write_bytes(parquet_of(text=same))
    flags = dict(source=str(tmp_path / "same.parquet"), shard_size=20_000, workers=1)
    fineweb.build(**flags, out=tmp_path / "undisturbed")
    with pytest.raises(UserError, match="No space left on device.* start again"):
        fineweb.build(**flags, out=small_disk / "out")
    assert len(read_shards(small_disk / "out")) > 2
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    fineweb.build(**flags, out=small_disk / "out")
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
    with pytest.raises(UserError, match="as it was; changed, new or gone since then: b.jsonl. Restore"):
        fineweb.build(**flags)
    path.rename(tmp_path / "texts" / "c.jsonl")
    with pytest.raises(UserError, match="since then: b.jsonl, c.jsonl. Restore"):
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


def build_from(path, out, *flags):
    """Run fineweb.py on a path, and expect success; returns what it says."""
    said = io.StringIO()
    command = ["fineweb.py", "--source", str(path), "--out", str(out), "--workers", "1", *map(str, flags)]
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(said):
        fineweb.main()
    return said.getvalue()


def test_hidden_files_are_never_text_and_are_counted(tmp_path):
    texts = tmp_path / "texts"
    names = (".ipynb_checkpoints/a.txt", "._a.txt", ".Trash/b.txt", "__MACOSX/c.txt", "deep/.hidden/d.txt")
    for name in (*names, "a.txt", "deep/b.txt", "notes.csv"):
        (texts / name).parent.mkdir(parents=True, exist_ok=True)
        (texts / name).write_text(f"the text of {name} " * 5)
    said = build_from(texts, tmp_path / "out", "--shard_size", 20)
    assert "files: 2" in said and "5 hidden" in said and "1 of another kind" in said
    assert set(decode_documents(tmp_path / "out")) == {f"the text of {name} " * 5 for name in ("a.txt", "deep/b.txt")}


def test_links_are_followed_once_and_suffixes_have_any_case(tmp_path):
    texts, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for path in (texts / "a.TXT", elsewhere / "c.Txt.GZ", elsewhere / "d.JSONL"):
        path.parent.mkdir(exist_ok=True)
    (texts / "a.TXT").write_text("first " * 9)
    (elsewhere / "c.Txt.GZ").write_bytes(gzip.compress(b"second " * 9))
    (elsewhere / "d.JSONL").write_bytes(json_lines(["third " * 9]))
    (texts / "a_link.txt").symlink_to("a.TXT")
    (texts / "b").symlink_to(elsewhere)
    (texts / "b_again").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(tmp_path / "texts")  # a circle
    said = build_from(texts, tmp_path / "out", "--shard_size", 8)
    assert "files: 3" in said and "3 linked twice" in said
    assert sorted(decode_documents(tmp_path / "out")) == ["first " * 9, "second " * 9, "third " * 9]


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="root gives up its right to read everything")
def test_folders_without_permission_are_named_and_no_traceback(tmp_path):
    texts, nobody = tmp_path / "texts", ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    for name in ("a.txt", "closed/b.txt", "list_only/c.txt"):
        (texts / name).parent.mkdir(parents=True, exist_ok=True)
        (texts / name).write_text("some words " * 50)
    (texts / "closed").chmod(0)
    (texts / "list_only").chmod(0o444)

    def run_as_nobody(*flags):
        return subprocess.run(
            [*nobody, *command_of("fineweb.py", "--workers", 1, *flags)], env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=100,
        )  # fmt: skip

    for flags in (
        ("--source", texts, "--out", tmp_path / "other"),
        ("--source", texts / "closed" / "b.txt", "--out", tmp_path / "other"),
        ("--source", "demo", "--out", texts / "closed" / "out"),
        ("--source", "demo", "--out", texts / "list_only"),
    ):
        result = run_as_nobody(*flags)
        assert result.returncode == 2 and "Permission denied" in result.stdout, result.stdout
        assert "Traceback" not in result.stdout, result.stdout


@pytest.mark.parametrize("flag", ["--source", "--out"])
def test_a_path_that_the_system_refuses_is_one_line(flag, tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 50)
    flags = {"--source": tmp_path / "a.txt", "--out": tmp_path / "out"}
    for path in ("x" * 300, tmp_path / "a.txt" / "b"):
        chosen = {**flags, flag: path}
        with pytest.raises(UserError):
            fineweb.build(str(chosen["--source"]), chosen["--out"], workers=1)


def test_home_is_expanded_in_every_path(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 50)
    for flags in (("--source", "~/a.txt", "--out", "~/out"), ("--source=~/a.txt", "--out=~/out2")):
        result = run("fineweb.py", *flags, cwd=tmp_path, env={"HOME": str(tmp_path)})
        assert result.returncode == 0, result.stdout
    assert (tmp_path / "out" / "manifest.json").exists() and (tmp_path / "out2" / "manifest.json").exists()


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_file_names_that_are_not_utf_8(locale, tmp_path):
    folder = os.fsencode(tmp_path / "texts") + b"\xe9"
    os.mkdir(folder)
    for name in (b"caf\xe9.txt", "東京.txt".encode()):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b"some words " * 50)
    flags = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = run("fineweb.py", "--source", os.fsdecode(folder), "--out", tmp_path / "out", env=flags)
    assert result.returncode == 0, result.stdout
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"]


def test_columns_of_text_by_another_name_are_read(tmp_path):
    texts = ["a cat", "naïve", None, "a cat"] * 9
    for kind in (pa.dictionary(pa.int32(), pa.string()), pa.binary(), pa.large_string(), pa.string_view()):
        path = tmp_path / f"{kind}.parquet".replace("/", "")
        pq.write_table(pa.table({"text": pa.array(texts).cast(pa.string()).cast(kind)}), path, compression="brotli")
        fineweb.build(str(path), tmp_path / f"out_{path.stem}", shard_size=9, workers=1)
        assert decode_documents(tmp_path / f"out_{path.stem}") == [text for text in texts if text]


def test_a_pointer_of_git_lfs_is_no_text(tmp_path):
    for name in ("a.txt", "b.parquet"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match="a.txt is a git-LFS pointer.*git lfs pull") as error:
        fineweb.build(str(tmp_path), tmp_path / "out", workers=1)
    assert f"cannot read {tmp_path / 'b.parquet'}" in str(error.value)


def test_a_mistyped_path_is_reported_before_the_network_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lib.data.hub.PAUSES", ())
    pointed_at("http://127.0.0.1:9", tmp_path, monkeypatch)
    with pytest.raises(UserError, match="ConnectError"):
        fineweb.build("my/textx", tmp_path / "out", workers=1)
    assert capsys.readouterr().out.startswith("there is no file or folder my/textx here")


def test_line_ends_of_windows_are_read_as_newlines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\nthree\rfour\n" * 9 + b"\r")
    (tmp_path / "b.jsonl").write_bytes(json_lines(["one\r\ntwo"]).replace(b"\n", b"\r\n"))  # says what it means
    for name, text in (("a.txt", "one\ntwo\nthree\rfour\n" * 9 + "\r"), ("b.jsonl", "one\r\ntwo")):
        fineweb.build(str(tmp_path / name), tmp_path / name[0], shard_size=2, workers=1)
        assert decode_documents(tmp_path / name[0]) == [text]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32-le"])
@pytest.mark.parametrize("text", ["A text in English.\n" * 20, "Текст по-русски и ещё немного слов.\n" * 20])
def test_utf_16_is_refused(encoding, text, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match="iconv"):
        fineweb.build(str(tmp_path / "a.txt"), tmp_path / "out", shard_size=9, workers=1)


def test_lines_of_json_as_others_write_them(tmp_path):
    lines = [
        '{"text": "huge", "id": %s}' % ("9" * 5000), '{"text": "no number", "x": [NaN, -Infinity, 1e999]}',
        '{"text": "no", "text": "the last one"}', '{"text": "line\u2028separator"}', "", '{"text": null}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(lines).encode())
    parts = [gzip.compress(line.encode() + b"\n") for line in lines]
    (tmp_path / "b.jsonl.gz").write_bytes(b"".join(parts))  # a file of several members
    for name in ("a.jsonl", "b.jsonl.gz"):
        manifest = fineweb.build(str(tmp_path / name), tmp_path / name[0], shard_size=4, workers=1)
        assert decode_documents(tmp_path / name[0]) == ["huge", "no number", "the last one", "line\u2028separator"]
        assert manifest["skipped_empty"] == 2
    for bad, words in (('{"text": 5}', "5.0"), ('[{"text": "a"}]', "jq -c"), ('{"text": ["a"]}', "not text but ['a']")):
        (tmp_path / "bad.jsonl").write_text(bad)
        with pytest.raises(UserError, match=re.escape(words)):
            fineweb.build(str(tmp_path / "bad.jsonl"), tmp_path / "bad", shard_size=4, workers=1)


def test_json_files_are_read_where_they_are_named_or_alone(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.json").write_bytes(json_lines(["a cat and a dog"]))
    fineweb.build(str(tmp_path / "texts"), tmp_path / "out", shard_size=2, workers=1)
    (tmp_path / "texts" / "b.txt").write_text("a fish and a bird")
    for source, expected in (("texts", "a fish and a bird"), ("texts/a.json", "a cat and a dog")):
        out = tmp_path / f"out_{Path(source).name}"
        fineweb.build(str(tmp_path / source), out, shard_size=2, workers=1)
        assert decode_documents(out) == [expected]


def test_10_000_row_groups(tmp_path):
    table = pa.table({"text": [f"row {i}" for i in range(10_000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1, compression="zstd")
    assert [*documents_of(tmp_path / "a.parquet", row=9_998)] == ["row 9998", "row 9999"]
    assert sum(1 for _ in documents_of(tmp_path / "a.parquet")) == 10_000


def test_a_million_white_space_characters_end_no_build(tmp_path):
    text = "a table" + " " * 1_500_000 + "of few words" + "\n" * 1_000_000 + "end"
    (tmp_path / "a.jsonl").write_bytes(json_lines(["first", text, "x" * 1_000_000]))
    (tmp_path / "b.txt").write_text(text)
    for name, expected in (("a.jsonl", ["first", text, "x" * 1_000_000]), ("b.txt", [text])):
        build_from(tmp_path / name, tmp_path / name[0], "--shard_size", 1_000_000)
        assert decode_documents(tmp_path / name[0]) == expected


def test_a_text_that_the_tokenizer_refuses_is_named(tmp_path, monkeypatch):
    class Panic(BaseException):
        pass

    def panic(self, text, **kwargs):
        if "poison" in text:
            raise Panic("stack")
        return encode_to_numpy(self, text, **kwargs)

    encode_to_numpy = tiktoken.Encoding.encode_to_numpy
    monkeypatch.setattr(tiktoken.Encoding, "encode_to_numpy", panic)
    source = tmp_path / "texts.jsonl"
    source.write_bytes(json_lines(["a"] * 300 + ["poison"] + ["b"] * 5000))
    flags = dict(shard_size=200, workers=1, start_method="fork")
    with pytest.raises(UserError, match="the tokenizer fails on 6 characters .*'poison': stack"):
        fineweb.build(str(source), tmp_path / "out", **flags)
    monkeypatch.undo()
    for out in ("out", "undisturbed"):  # nothing that followed it was written
        fineweb.build(str(source), tmp_path / out, **flags)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "undisturbed")


def test_a_txt_is_tokenized_in_pieces_that_change_no_token(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.tokenizer.LONGEST", 1000)
    rng = random.Random(0)
    text = "".join(rng.choice(["word", " ", "\n", "   ", "é", "1", "don't", "\r\n", "東"]) for _ in range(30_000))
    (tmp_path / "a.txt").write_bytes(text.encode())
    text = text.replace("\r\n", "\n")
    assert len(list(documents_of(tmp_path / "a.txt"))) > 20
    manifest = fineweb.build(str(tmp_path / "a.txt"), tmp_path / "out", shard_size=5000, workers=2)
    tokens = np.concatenate(
        [np.load(path) for path in sorted((tmp_path / "out").glob("*.npy"), key=lambda p: p.name[-10:])]
    )
    assert manifest["documents"] == 1 and tokens.tolist() == [50256, *fineweb.get_tokenizer().encode_ordinary(text)]
    # unfinished as it was when a .txt was one row, as it is now, and of versions with other rows: all end the same
    expected = content_of(tmp_path / "out")
    rows = [len(fineweb.encode(piece)) for piece in documents_of(tmp_path / "a.txt")]
    old = {"documents": 7, "tokens": 7, "version": None}
    for changes in (
        {"progress": {"file": 0, "row": 0, "skip": 5000}, "documents": 0, "tokens": 0},
        {"progress": {"file": 0, "row": 2, "skip": 4999 - sum(rows[:2])}, "documents": 1, "tokens": 1 + sum(rows[:2])},
        {"progress": {"file": 0, "row": 9, "skip": 3}, **old},
        {"progress": {"file": 0, "row": 9, "skip": 3}, **old, "version": 2},
    ):
        unfinished = {**manifest, "complete": False, "shards": manifest["shards"][:1], **changes}
        if not unfinished["version"]:
            del unfinished["version"]
        (tmp_path / "out" / "manifest.json").write_text(json.dumps(unfinished))
        fineweb.build(str(tmp_path / "a.txt"), tmp_path / "out", shard_size=5000, workers=1)
        found = content_of(tmp_path / "out")
        finished = json.loads(found.pop("manifest.json"))
        finished.pop("version", 3)
        assert finished.items() <= json.loads(expected["manifest.json"]).items()
        assert found.items() < expected.items()


def test_a_txt_takes_a_few_times_its_size_of_memory(tmp_path):
    with open(tmp_path / "a.txt", "w") as file:
        for _ in range(20):
            file.write("some words and more\n" * 50_000)  # 20 MB
    tracemalloc.start()
    assert sum(map(len, documents_of(tmp_path / "a.txt"))) == 20_000_000
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()


@pytest.mark.parametrize("mark", ["<|endoftext|>", "= =\n", "\n\n"])
def test_split_on_makes_documents_of_a_txt(mark, tmp_path):
    texts = [f"Story {i} of some words,\nin two lines." for i in range(30)]
    (tmp_path / "a.txt").write_bytes(f"\n{mark}\n".join(texts).replace("\n", "\r\n").encode() + mark.encode())
    manifest = fineweb.build(str(tmp_path / "a.txt"), tmp_path / "out", shard_size=90, workers=1, split_on=mark)
    assert decode_documents(tmp_path / "out") == texts and manifest["documents"] == 30
    assert manifest["skipped_empty"] == (29 if mark == "\n\n" else 0)  # between two of four newlines
    tokens = np.concatenate([np.load(tmp_path / "out" / shard["file"]) for shard in manifest["shards"]])
    assert tokens.tolist() == [token for text in texts for token in [50256, *fineweb.encode(text).tolist()]]
    with pytest.raises(UserError, match="split_on"):
        fineweb.build(str(tmp_path / "a.txt"), tmp_path / "out", shard_size=90, workers=1)


def test_splitting_is_offered_where_a_txt_has_the_mark(tmp_path):
    (tmp_path / "a.txt").write_text("one story\n<|endoftext|>\nanother story\n" * 9)
    said = build_from(tmp_path / "a.txt", tmp_path / "out")
    assert said.count('--split_on "<|endoftext|>"') == 1
    assert "10 documents" in build_from(tmp_path / "a.txt", tmp_path / "split", "--split_on", "<|endoftext|>")


@pytest.mark.parametrize(
    "typed, meant", [(r"\n\n", "\n\n"), (r"\t", "\t"), ("\r\n\r\n", "\n\n"), (r"\r\n\r\n", "\n\n")]
)
def test_a_separator_may_be_typed_in_a_shell(typed, meant, tmp_path):
    (tmp_path / "a.txt").write_text(meant.join(["one story"] * 9))
    assert fineweb.build(str(tmp_path / "a.txt"), tmp_path / "out", 9, 1, split_on=typed)["documents"] == 9


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_separator_that_never_occurs_is_an_error(name, tmp_path):
    (tmp_path / name).write_text('{"text": "one story"}\n')
    with pytest.raises(UserError, match="never occurs in a .txt"):
        fineweb.build(str(tmp_path / name), tmp_path / "out", workers=1, split_on="|endoftext|>")
    assert not (tmp_path / "out").exists()


def test_what_fineweb_wrote_is_never_source(tmp_path):
    for name in ("texts/a.json", "texts/b.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(json_lines(["a story"] * 9))
    for out in ("texts", "texts/out"):
        for _ in range(2):
            manifest = fineweb.build(str(tmp_path / "texts"), tmp_path / out, 9, 1)
            assert manifest["documents"] == 18 and manifest["complete"]


def test_all_bad_files_are_named_before_anything_is_built(tmp_path):
    bad = {"a.txt": b"\xff", "b.jsonl": b"{", "c.parquet": b"no", "d.jsonl": b"[1]", "e.txt.gz": b"no"}
    for name, data in {**bad, "fine.txt": b"some words"}.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match="5 of 6 files cannot be used") as error:
        fineweb.build(str(tmp_path), tmp_path / "out", workers=1)
    assert all(name in str(error.value) for name in bad) and not (tmp_path / "out").exists()


def test_rows_without_text_are_counted(tmp_path):
    lines = ['{"text": "a story"}', '{"text": null}', '{"body": "x"}', '{"text": ""}', ""]
    (tmp_path / "a.jsonl").write_text("\n".join(lines * 9))
    (tmp_path / "b.parquet").write_bytes(parquet_of(text=pa.array([None] * 5)))
    (tmp_path / "c.parquet").write_bytes(parquet_of(body=["a story"] * 3))
    manifest = fineweb.build(str(tmp_path), tmp_path / "out", 9, 1)
    assert (manifest["documents"], manifest["skipped_empty"]) == (9, 35 + 8)


def test_the_validation_split_of_a_folder_is_a_sample_of_its_files(tmp_path, capsys):
    for i in range(100):
        (tmp_path / f"{i:02d}.txt").write_text(f"{i:02d} " * 50)
    manifest = fineweb.build(str(tmp_path), tmp_path / "out", workers=1)
    first = [int(text[:2]) for text in decode_documents(tmp_path / "out")][:8]
    assert first != sorted(first) and max(first) > 50 and [int(f["file"][:2]) for f in manifest["files"][:8]] == first
    assert "held out for validation: the first" in capsys.readouterr().out


def test_workers_that_cannot_start_are_named_with_the_limits(parquet, tmp_path, monkeypatch):
    forks, fork = [], os.fork

    def fork_twice():
        forks.append(1)
        if len(forks) > 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", fork_twice)
    with pytest.raises(UserError, match="worker processes.*Resource temporarily unavailable.*ulimit -u.*/dev/shm"):
        fineweb.build(str(parquet), tmp_path / "out", 1000, 4, "fork")
    for child in multiprocessing.active_children():  # they were told to end
        child.join(10)
    assert not (tmp_path / "out").exists() and not multiprocessing.active_children()


def test_a_child_without_a_main_guard_is_named(parquet, tmp_path):
    code = f"import fineweb; fineweb.build({str(parquet)!r}, {str(tmp_path / 'out')!r}, 1000, 2, 'spawn')"
    (tmp_path / "unguarded.py").write_text(code)
    result = subprocess.run(
        [sys.executable, tmp_path / "unguarded.py"], env=environment(), capture_output=True, text=True
    )
    assert "bootstrapping phase" in result.stderr and "if __name__ == '__main__'" in result.stderr


@pytest.mark.parametrize("flag", ["source", "out"])
def test_a_url_is_no_folder(flag, parquet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="s3://bucket/x is a URL, not a path"):
        fineweb.build(**{"source": str(parquet), "out": tmp_path / "out", flag: "s3://bucket/x"}, workers=1)
    assert not (tmp_path / "s3:").exists()


def test_ctrl_c_ends_a_loop_of_the_shell(tmp_path):
    """It says how to go on, and dies of the signal, as a shell wants it."""
    (tmp_path / "texts.jsonl").write_bytes(json_lines(["some words " * 2000] * 3000))
    command = command_of("fineweb.py", "--source", tmp_path / "texts.jsonl", "--out", tmp_path / "out", "--workers", 1,
                         "--shard_size", 5000)  # fmt: skip
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    read_until(process, "tokens/s")
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == -signal.SIGINT and "resumes after the last finished shard" in output
    assert "Traceback" not in output and not list((tmp_path / "out").glob("*.tmp"))
