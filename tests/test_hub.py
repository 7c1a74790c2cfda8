"""Builds from a stand-in hub that misbehaves, with the real client."""

import gzip
import io
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, DATASET, pointed_at, serving
from support import PROBES, ROOT, run

import fineweb
from lib.console import UserError
from lib.data.folder import find_shards
from lib.data.hub import list_files, with_retries
from lib.data.manifest import read_manifest

WORDS = "the of and to in is that for it as was with be by on not he his but at".split()  # noqa: SIM905


def texts_of(seed, count=900):
    """Random English-like documents, some of them empty or missing."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 200))) for _ in range(count)]
    return [rng.choice(["", None]) if i % 97 == 5 else text for i, text in enumerate(texts)]


def parquet_of(**columns):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=100)
    return file.getvalue()


TABLES = {
    f"data/train-{i:05d}-of-00003.parquet": parquet_of(id=list(range(900)), text=texts_of(i)) for i in range(3)
}  # fmt: skip
SECOND = "data/train-00001-of-00003.parquet"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.data.hub.PAUSES", (0.01, 0.01, 0.01, 0.01))
    test_table = {"data/test-00000-of-00001.parquet": parquet_of(text=["not for training"] * 9)}
    with serving({**TABLES, **test_table, "README.md": b"texts"}) as hub:
        pointed_at(hub.endpoint, tmp_path / "hf", monkeypatch)
        yield hub


@pytest.fixture
def build(hub, tmp_path):
    def build(out="out", source=DATASET, shard_size=10_000, workers=2, **flags):
        return fineweb.build(str(source), tmp_path / out, shard_size, workers, **flags)

    return build


def content(folder):
    """Every file but the lock: what a build leaves."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def refused(build, *words, **flags):
    with pytest.raises(UserError) as error:
        build(**flags)
    for word in words:
        assert word in str(error.value)


def command(hub, tmp_path, *flags):
    """fineweb.py as a user starts it, with its environment."""
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, str(ROOT / "fineweb.py"), "--source", DATASET, "--shard_size", "2000", *map(str, flags)]
    return dict(args=command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_only_the_split_is_built_and_nothing_else_is_left(hub, tmp_path):
    result = subprocess.run(**command(hub, tmp_path, "--out", tmp_path / "out"))
    assert result.returncode == 0 and "Warning" not in result.stdout, result.stdout
    manifest = read_manifest(tmp_path / "out")
    texts = [text for i in range(3) for text in texts_of(i)]
    assert manifest["documents"] == sum(map(bool, texts))
    assert manifest["skipped_empty"] == len(texts) - sum(map(bool, texts))
    assert manifest["revision"] == COMMIT and [file["file"] for file in manifest["files"]] == list(TABLES)
    assert set(content(tmp_path / "out")) == {"manifest.json", *(shard["file"] for shard in manifest["shards"])}
    assert all(hub.requests["GET", path] == 1 for path in TABLES)


def in_a_child(action):
    """Call action() in a forked process, all of whose children are in its process group."""

    def child():
        os.setpgid(0, 0)
        action()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def kill_with_children(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def test_eight_kills_at_any_instant_change_no_byte(build, tmp_path):
    build(out="undisturbed")
    begin = time.monotonic()
    build(out="timed")
    seconds = time.monotonic() - begin
    expected = content(tmp_path / "undisturbed")
    rng, kills, folder = random.Random(0), 0, 0
    while kills < 8:
        process = in_a_child(lambda: build(out=f"out{folder}"))  # noqa: B023
        process.join(rng.uniform(0.1, 1.1) * seconds)
        if process.exitcode is None:
            kill_with_children(process)
            kills += 1
        else:  # it got through: the kills that are left go to another build
            assert process.exitcode == 0 and content(tmp_path / f"out{folder}") == expected
            folder += 1
    build(out=f"out{folder}")
    assert content(tmp_path / f"out{folder}") == expected


# The first manifest, each shard and a manifest, the complete manifest; of the long rows only the instants that differ
@pytest.mark.parametrize(
    "kind, renames",
    [("sized", range(1, 9)), ("automatic", (2, 3, 24)), ("cut", (2, 3, 7, 13, 14))],
)
def test_a_kill_before_a_rename_changes_no_byte(kind, renames, build, tmp_path):
    """Before a file gets its final name is every instant there is: nothing else changes what a restart finds."""
    page = "x" * 10_000 if kind == "cut" else ""  # its size promises more tokens than it has
    lines = [json.dumps({"text": text, "page": page}) + "\n" for text in texts_of(0)]
    (tmp_path / "texts.jsonl").write_text("".join(lines[: 200 if kind == "cut" else None]))
    flags = dict(source=tmp_path / "texts.jsonl", workers=1, shard_size=30_000 if kind == "sized" else None)
    build(out="undisturbed", **flags)
    expected = content(tmp_path / "undisturbed")

    def build_until(number, out):
        replace, done = os.replace, []

        def replace_or_die(source, target):
            done.append(target)
            if len(done) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = replace_or_die
        build(out=out, **flags)

    for number in (*renames, renames[-1] + 1):
        process = in_a_child(lambda: build_until(number, f"out{number}"))  # noqa: B023
        process.join()
        assert (process.exitcode == -signal.SIGKILL) == (number in renames)  # there are no more than these
        build(out=f"out{number}", **flags)
        assert content(tmp_path / f"out{number}") == expected, number


def test_no_worker_outlives_a_killed_parent(build, hub, tmp_path):
    process = subprocess.Popen(**command(hub, tmp_path, "--out", tmp_path / "out", "--workers", 3))
    for line in process.stdout:
        if "tokens/s" in line:  # the first of its text is tokenized
            break
    process.kill()
    process.communicate(timeout=100)  # returns once the last process that holds the pipe is gone
    assert not (read_manifest(tmp_path / "out") or {}).get("complete")
    build(shard_size=2000)


def test_two_builds_at_once_make_one(build, tmp_path, capfd):
    build(out="undisturbed")
    both = [in_a_child(build) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
    assert "waiting for it" in capfd.readouterr().out


def test_every_mishap_is_survived(build, hub, tmp_path):
    build(out="undisturbed")
    hub.mishaps = [("info", "500"), *((SECOND, kind) for kind in ("429", "500", "cut", "short", "wrong"))]
    build()
    assert not hub.mishaps and content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_the_hubs_own_waiting_time_is_kept(build, hub, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("lib.data.hub.time.sleep", waited.append)
    hub.headers = {"RateLimit": '"api";r=0;t=44'}
    hub.mishaps = [("info", "429")]
    build()
    assert 44 in waited and "waiting 44 s, as the hub asks" in capsys.readouterr().err
    hub.headers = {"Retry-After": "3600"}
    hub.always["info"] = "429"
    refused(build, "in 3600 s, as the hub asks", "tried 1 times", out="other")


@pytest.mark.parametrize("kind, words", [("500", "500"), ("wrong", "has the hash")])
def test_lasting_trouble_is_named_and_loses_nothing(build, hub, tmp_path, kind, words):
    build(out="undisturbed")
    hub.always[SECOND] = kind
    refused(build, SECOND, "tried 5 times", words, "Start again")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npy")}
    assert finished
    hub.always.clear()
    hub.commit = "f" * 40  # the branch has moved on: the build stays with the commit that it began with
    build()
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), PermissionError(13, "Permission denied", "/hf/hub"),
     FileNotFoundError(2, "No such file or directory", "/dev/shm")],
)  # fmt: skip
def test_an_error_of_the_file_system_speaks_for_itself_and_is_not_retried(error):
    tries = []

    def attempt():
        tries.append(error)
        raise error

    with pytest.raises(UserError, match=re.escape(str(error))) as found:
        with_retries("a file", attempt)
    assert len(tries) == 1 and "network" not in str(found.value)


def test_an_error_of_another_kind_is_passed_on_whole():
    with pytest.raises(ImportError, match="^a package$"):
        with_retries("a file", lambda: (_ for _ in ()).throw(ImportError("a package")))


def test_no_network_is_named_with_the_remedy(build, tmp_path, monkeypatch):
    pointed_at("http://127.0.0.1:9", tmp_path / "hf", monkeypatch)
    refused(build, "ConnectError", "tried 5 times", "Start again")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(build, "OfflineModeIsEnabled")
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_is_checked_without_the_network(build, tmp_path, monkeypatch, capsys):
    build()
    pointed_at("http://127.0.0.1:9", tmp_path / "hf", monkeypatch)
    build()
    build(verify=True)
    out = capsys.readouterr().out
    assert "every size correct" in out and "every sha256 correct" in out
    shard = tmp_path / "out" / "texts_train_000001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(build, "texts_train_000001.npy is not the shard that its manifest lists", verify=True)
    shard.write_bytes(whole[:-2])
    refused(build, "texts_train_000001.npy")


def test_refusals_leave_no_shards(build, hub, tmp_path, capsys):
    for flags, words in (
        (dict(text_column="body"), ["none for training"]),
        (dict(text_column="id"), ['"id" is not text but 0']),
        (dict(name="sample-10BT"), ["BuilderConfig 'sample-10BT' not found"]),
        (dict(split="validation"), ["--split validation"]),
        (dict(revision="nowhere"), ["RevisionNotFoundError"]),
        (dict(source="someone/else"), ["someone/else", "RepositoryNotFoundError"]),
        (dict(source=ROOT / "tests", name="x"), ["--name"]),
    ):
        refused(build, *words, **flags)
        assert not (tmp_path / "out" / "manifest.json").exists(), flags
    assert "has no \"body\" column, only ['id', 'text']" in capsys.readouterr().out


def test_rows_without_text_are_counted(build, hub, capsys):
    hub.files = {
        "train-0.parquet": parquet_of(text=pa.array([None] * 3)),
        "train-1.parquet": parquet_of(text=["a text"] * 9),
        "train-2.parquet": parquet_of(body=["a text of another name"] * 5),
    }
    manifest = build(shard_size=9)
    assert (manifest["documents"], manifest["skipped_empty"]) == (9, 8)
    assert "8 documents without text left out" in capsys.readouterr().out


def test_an_interrupted_folder_refuses_other_flags_and_names_both(build, hub, tmp_path):
    hub.always[SECOND] = "500"
    refused(build)
    before = content(tmp_path / "out")
    (tmp_path / "other.txt").write_text("other text")
    for flags, words in (
        (dict(shard_size=5000), ["'shard_size': 10000", "'shard_size': 5000"]),
        (dict(revision="v1"), ["'main'", "'v1'"]),
        (dict(source=tmp_path / "other.txt"), ["already holds shards of", DATASET]),
    ):
        refused(build, *words, **flags)
    assert content(tmp_path / "out") == before


def test_every_file_is_on_the_disk_before_it_gets_its_name(build, hub, tmp_path, monkeypatch):
    synced, fsync, replace = {}, os.fsync, os.replace  # inode -> size at its last fsync

    def fsync_and_note(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size

    def check_and_replace(source, target):
        status = os.stat(source)
        if os.path.dirname(target) == str(tmp_path / "out"):
            assert synced.get(status.st_ino) == status.st_size, f"{target} was renamed before it was on the disk"
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync_and_note)
    monkeypatch.setattr(os, "replace", check_and_replace)
    build()
    assert len(synced) > 3


@pytest.mark.parametrize("row_group_size", [1000, 25_000])
def test_memory_does_not_grow_with_the_file(tmp_path, row_group_size):
    rng, path = random.Random(0), tmp_path / "large.parquet"
    texts = [rng.randbytes(1000).hex() for _ in range(25_000)]  # 50 MB that do not compress to less than 25
    pq.write_table(pa.table({"text": texts}), path, row_group_size=row_group_size)
    rows, peak = run(PROBES / "read_documents.py", path).stdout.split()
    assert int(rows) == 25_000 and int(peak) < 20e6, peak


def card(**configs):
    """A README.md that says which files make up each split of each configuration."""
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, pattern in splits.items():
            lines += [f"  - split: {split}", f"    path: {pattern}"]
    return "\n".join([*lines, "---", "# Texts"]).encode()


def zstd(content):
    return pa.Codec("zstd").compress(content, asbytes=True)


def content_for(path):
    """What a file of this name holds: one document, its own path."""
    lines = json.dumps({"text": path}).encode() + b"\n"
    if path.endswith(".parquet"):
        return parquet_of(text=[path])
    if path.endswith(".txt"):
        return path.encode()
    return gzip.compress(lines) if path.endswith(".gz") else zstd(lines) if path.endswith(".zst") else lines


WIKITEXT = [f"wikitext-{kind}/{split}-00000-of-00001.parquet"
            for kind in ("103-raw-v1", "2-raw-v1") for split in ("test", "train", "validation")]  # fmt: skip
EDU = [f"sample/10BT/{i:03d}_00000.parquet" for i in range(3)]
EDU += [f"data/CC-MAIN-2024-{week}/train-0000{i}-of-00002.parquet" for week in (10, 18) for i in range(2)]
EDU_CARD = card(**{"default": {"train": "data/*/*"}, "sample-10BT": {"train": "sample/10BT/*"}})
C4 = [f"en/c4-{split}.0000{i}-of-00002.json.gz" for split in ("train", "validation") for i in range(2)]
C4 += ["realnewslike/c4-train.00000-of-00001.json.gz", "multilingual/c4-af.tfrecord-00000-of-00064.json.gz"]
C4_CARD = card(en={"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"},
               realnewslike={"train": "realnewslike/c4-train.*.json.gz"})  # fmt: skip
PILE = ["train/00.jsonl.zst", "train/01.jsonl.zst", "val.jsonl.zst", "test.jsonl.zst"]
SMOL = [f"{name}/train-00000-of-00002.parquet" for name in ("cosmopedia-v2", "fineweb-edu-dedup", "python-edu")]
SMOL_CARD = card(**{x: {"train": f"{x}/train-*"} for x in ("cosmopedia-v2", "python-edu")})
WIKI = [f"20231101.{language}/train-0000{i}-of-00002.parquet" for language in ("de", "en") for i in range(2)]
WIKI_CARD = card(**{f"20231101.{x}": {"train": f"20231101.{x}/*"} for x in ("de", "en")})
WIKITEXT_CARD = card(**{f"wikitext-{x}-raw-v1": {split: f"wikitext-{x}-raw-v1/{split}-*" for split in ("train", "test")}
                        for x in (103, 2)})  # fmt: skip
GSM = [f"{name}/{split}-00000-of-00001.parquet" for name in ("main", "socratic") for split in ("test", "train")]
GSM_CARD = card(main={"train": "main/train-*", "test": "main/test-*"}, socratic={"train": "socratic/train-*"})
ALIKE = ["training-00000.parquet", "evaluation-00000.parquet"]
OPEN = [f"plain_text/train-0000{i}-of-00002.parquet" for i in range(2)]
NUMBERED = ["train1.parquet", "test1.parquet"]

# files, the card or None, flags, and the files that are chosen, or words of the refusal
LAYOUTS = {
    "FineWeb-Edu, a sample": (EDU, EDU_CARD, ["--name", "sample-10BT"], EDU[:3]),
    "FineWeb-Edu, whole": (EDU, EDU_CARD, [], EDU[3:]),
    "wikitext": (WIKITEXT, WIKITEXT_CARD, ["--name", "wikitext-2-raw-v1"], WIKITEXT[4:5]),
    "wikitext, test": (WIKITEXT, WIKITEXT_CARD, ["--name", "wikitext-2-raw-v1", "--split", "test"], WIKITEXT[3:4]),
    "wikitext, no name": (WIKITEXT, WIKITEXT_CARD, [], "wikitext-103-raw-v1', 'wikitext-2-raw-v1"),
    "wikitext, no split": (WIKITEXT, WIKITEXT_CARD, ["--name", "wikitext-2-raw-v1", "--split", "x"], "train, test"),
    "wikipedia": (WIKI, WIKI_CARD, ["--name", "20231101.en"], WIKI[2:]),
    "wikipedia, no name": (WIKI, WIKI_CARD, [], "20231101.de', '20231101.en"),
    "c4": (C4, C4_CARD, ["--name", "en"], C4[:2]),
    "the Pile": (PILE, None, [], PILE[:2]),
    "the Pile, test": (PILE, None, ["--split", "test"], "choose one of train"),
    "TinyStories": (["data/train-00000-of-00001-a.parquet", "data/validation-00000-of-00001-b.parquet"], b"", [],
                    ["data/train-00000-of-00001-a.parquet"]),  # fmt: skip
    "openwebtext": (OPEN, None, [], OPEN),
    "smollm-corpus": (SMOL, SMOL_CARD, ["--name", "cosmopedia-v2"], SMOL[:1]),
    "smollm-corpus, no name": (SMOL, SMOL_CARD, [], "cosmopedia-v2', 'python-edu"),
    "gsm8k": (GSM, GSM_CARD, ["--name", "main"], GSM[1:2]),
    "gsm8k, no name": (GSM, GSM_CARD, [], "main', 'socratic"),
    "a folder as name": (["c/train-0.parquet", "python/train-0.parquet"], None, ["--name", "python"],
                         ["python/train-0.parquet"]),  # fmt: skip
    "lines in .json": (["data/train.json", "data/test.json"], None, [], ["data/train.json"]),
    "plain text": (["train.txt", "test.txt"], None, [], ["train.txt"]),
    "names that are alike": (ALIKE, None, ["--split", "test"], ALIKE[1:2]),
    "training and evaluation": (ALIKE, None, [], ALIKE[:1]),
    "train1 and test1": (NUMBERED, None, [], NUMBERED[:1]),
    "no such split": (["train.parquet"], None, ["--split", "validation"], "choose one of train"),
    "csv": (["train.csv"], None, [], "train.csv, which cannot be read: supported are .parquet"),
    "nothing": (["model.safetensors"], None, [], "DataFilesNotFoundError"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_datasets_chooses_the_files(layout, hub, capsys):
    paths, readme, flags, expected = LAYOUTS[layout]
    hub.files = {path: content_for(path) for path in paths} | ({} if readme is None else {"README.md": readme})
    names = {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    if isinstance(expected, str):
        refused(list_files, expected, dataset=DATASET, **names)
        return
    commit, files = list_files(DATASET, **names)
    assert commit == COMMIT and [file["file"] for file in files] == expected
    assert not any(hub.requests["GET", path] for path in paths)
    size = sum(len(hub.files[path]) for path in expected)
    out = capsys.readouterr().out
    assert f", split {names.get('split', 'train')}, {size:,} bytes (files: {len(expected)})" in out


@pytest.mark.parametrize("layout", ["c4", "the Pile", "plain text"])
def test_compressed_lines_and_plain_text_of_the_hub_are_read(layout, build, hub, tmp_path):
    paths, readme, flags, expected = LAYOUTS[layout]
    hub.files = {path: content_for(path) for path in paths} | ({} if readme is None else {"README.md": readme})
    manifest = build(shard_size=3, workers=1, **({"name": "en"} if flags else {}))
    assert manifest["documents"] == len(expected) and manifest["skipped_empty"] == 0
    assert sorted(path for path in paths if hub.requests["GET", path]) == sorted(expected)


def test_a_copy_in_the_cache_is_no_answer(build, hub, tmp_path):
    """If `datasets` cannot list the files, it takes what it has loaded before, of any commit."""
    copy = tmp_path / "hf" / "datasets" / "someone___texts" / "default" / "0.0.0" / "abc"
    copy.mkdir(parents=True)
    (copy / "dataset_info.json").write_text(json.dumps({"config_name": "default", "dataset_name": "texts"}))
    hub.always["README.md"] = "500"
    refused(build, DATASET, "only an old copy", "Start again")
    assert not (tmp_path / "out").exists()


def test_a_resumed_build_keeps_the_files_that_it_began_with(build, hub, tmp_path):
    build(out="undisturbed")
    hub.always[SECOND] = "500"
    refused(build, SECOND)
    hub.always = {"tree": "500", "README.md": "500", "info": "500"}  # what the manifest says is enough
    build()
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_the_loader_refuses_shards_that_the_manifest_does_not_list_and_misses_those_that_it_does(build, tmp_path):
    build()
    shard = tmp_path / "out" / "texts_train_000001.npy"
    assert shard.name in find_shards(tmp_path / "out")[0]["train"]
    shard.rename(tmp_path / "out" / "foreign_train_000001.npy")
    with pytest.raises(UserError, match="foreign_train_000001.npy"):
        find_shards(tmp_path / "out")


def test_a_document_of_10_mb(build, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "one two three four " * 540_000}) + "\n\n")
    manifest = build(source=tmp_path / "long.jsonl", shard_size=1_000_000)
    assert (manifest["documents"], manifest["tokens"], len(manifest["shards"])) == (1, 2_160_002, 3)
