import hashlib
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import ROOT, run

import fineweb

TEXTS = [
    "Hello world.", "", "A second document,\nwith two lines. " * 40, "naïve café 東京 🚀",
    "ends with <|endoftext|> in words", None, "x" * 5000, "  spaces  and\ttabs ",
] * 30  # fmt: skip


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"id": list(range(len(TEXTS))), "text": TEXTS}), path)
    return path


def read_shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


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
    jsonl = tmp_path / "texts.jsonl"
    jsonl.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n")
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "txt" / f"{i:04d}.txt").write_bytes((text or "").encode())
    kept = [text for text in TEXTS if text]
    for source in (parquet, jsonl, tmp_path / "txt"):
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
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "complete": False, "shards": []}))
    (out / "texts_train_000002.npy").write_bytes(b"")
    fineweb.build(str(parquet), out, 1000, 1)
    assert read_shards(out) == before


def test_refusals(tmp_path, parquet):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "no_text.jsonl").write_text('{"body": "fine"}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "columns.parquet")
    for source, message in {
        "missing.txt": "no file or folder", "empty": "holds no file", "empty.txt": "leaves none for training",
        "bad.jsonl": "bad.jsonl, line 2", "no_text.jsonl": "line 1", "latin.txt": "not UTF-8 at byte 3",
        "latin.jsonl": "latin.jsonl, line 2",
        "broken.parquet": "cannot read", "columns.parquet": r"\['body'\]",
    }.items():  # fmt: skip
        with pytest.raises(fineweb.InputError, match=message):
            fineweb.build(str(tmp_path / source), out, 1000, 1)
        assert not out.exists(), source
    with pytest.raises(fineweb.InputError, match="--shard_size"):
        fineweb.build(str(parquet), out, 100_000_000, 1)

    fineweb.build(str(parquet), out, 1000, 1)
    (tmp_path / "other.txt").write_text("other text " * 3000)
    with pytest.raises(fineweb.InputError, match="already holds shards"):
        fineweb.build(str(tmp_path / "other.txt"), out, 1000, 1)
    (out / "manifest.json").unlink()
    with pytest.raises(fineweb.InputError, match="unknown origin"):
        fineweb.build(str(parquet), out, 1000, 1)


def test_the_front_door_says_it_in_one_line_and_exits_with_2(tmp_path):
    result = run("fineweb.py", "--source", tmp_path / "missing.txt", "--out", tmp_path / "out")
    assert result.returncode == 2 and "error: no file or folder" in result.stdout
    assert "Traceback" not in result.stdout and not (tmp_path / "out").exists()
    assert run("fineweb.py", "--sauce", "x").returncode == 2
