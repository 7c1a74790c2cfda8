"""fineweb.py as a user runs it, against a stand-in hub that misbehaves."""

import errno
import gzip
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, DATASET, serving
from support import PROBES, ROOT, run

from lib.console import UserError
from lib.data.hub import choose_shards, with_retries
from lib.data.manifest import read_manifest
from lib.data.stream import find_shards

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


def bin_of(tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.asarray(tokens, "<u2").tobytes()


TABLES = {
    f"data/train-{i:05d}-of-00003.parquet": parquet_of(id=list(range(900)), text=texts_of(i)) for i in range(3)
}  # fmt: skip
SECOND = "data/train-00001-of-00003.parquet"
BINS = {f"edu_{'train' if i else 'val'}_{i:06d}.bin": bin_of([50256, 1, 2, i] * 500) for i in range(3)}


@pytest.fixture
def hub():
    test_table = {"data/test-00000-of-00001.parquet": parquet_of(text=["not for training"] * 9)}
    with serving({**TABLES, **test_table, "README.md": b"texts"}) as hub:
        yield hub


@pytest.fixture
def environment(tmp_path, hub):
    return {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1",
        "HUB_RETRY_DELAY": "0.01",
    }  # fmt: skip


@pytest.fixture
def build(environment, tmp_path):
    def build(*flags, out="out", source=DATASET, shard_size=10_000, workers=2):
        return run(
            "fineweb.py", "--source", source, "--out", tmp_path / out, "--shard_size", shard_size, "--workers", workers,
            *flags, env=environment,
        )  # fmt: skip

    return build


def content(folder):
    """Every file but the lock: what a build leaves."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def assert_refused(result, *words):
    assert result.returncode == 2 and "Traceback" not in result.stdout, result.stdout
    for word in words:
        assert word in result.stdout, result.stdout


def test_only_the_split_is_built_and_nothing_else_is_left(build, hub, tmp_path):
    result = build()
    assert result.returncode == 0, result.stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    texts = [text for i in range(3) for text in texts_of(i)]
    assert manifest["documents"] == sum(map(bool, texts)) and manifest["skipped_empty"] == len(texts) - sum(
        map(bool, texts)
    )
    assert manifest["revision"] == COMMIT and [file["file"] for file in manifest["files"]] == list(TABLES)
    assert set(content(tmp_path / "out")) == {"manifest.json", *(shard["file"] for shard in manifest["shards"])}
    assert all(hub.requests["GET", path] == 1 for path in TABLES)


def test_workers_change_no_byte_of_shards_and_manifest(build, tmp_path):
    for workers in (1, 3):
        assert build(out=f"out{workers}", workers=workers).returncode == 0
    assert content(tmp_path / "out1") == content(tmp_path / "out3")


def test_eight_kills_at_any_instant_change_no_byte(build, hub, environment, tmp_path):
    begin = time.monotonic()
    assert build(out="undisturbed", shard_size=2000).returncode == 0
    seconds = time.monotonic() - begin
    expected = content(tmp_path / "undisturbed")
    rng, kills, folder = random.Random(0), 0, 0
    while True:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "fineweb.py"), "--source", DATASET, "--out", str(tmp_path / f"out{folder}"),
             "--shard_size", "2000", "--workers", "2"],
            env={**os.environ, **environment}, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=rng.uniform(0.5, 1.1) * seconds if kills < 8 else 100)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, output.decode()
        assert content(tmp_path / f"out{folder}") == expected
        if kills >= 8:
            break
        folder += 1  # it got through: the kills that are left go to another build


# The first manifest, each shard and a manifest, the complete manifest; of the long rows only the instants that differ
@pytest.mark.parametrize(
    "kind, renames",
    [("sized", range(1, 9)), ("automatic", (2, 3, 24)), ("cut", (2, 3, 7, 13, 14)), ("ready made", (2, 3, 4, 8))],
)
def test_a_kill_before_a_rename_changes_no_byte(kind, renames, environment, hub, tmp_path):
    """Before a file gets its final name is every instant there is: nothing else changes what a restart finds."""
    page = "x" * 10_000 if kind == "cut" else ""  # its size promises more tokens than it has
    lines = [json.dumps({"text": text, "page": page}) + "\n" for text in texts_of(0)]
    (tmp_path / "texts.jsonl").write_text("".join(lines[: 200 if kind == "cut" else None]))
    flags = ["--source", tmp_path / "texts.jsonl", "--workers", 1, "--out"]
    if kind == "sized":
        flags = ["--shard_size", 30_000, *flags]
    if kind == "ready made":
        hub.files, flags[1] = BINS, DATASET
    assert run("fineweb.py", *flags, tmp_path / "undisturbed", env=environment).returncode == 0
    expected = content(tmp_path / "undisturbed")
    for number in (*renames, renames[-1] + 1):
        out = tmp_path / f"out{number}"
        killed = run("tests/probes/kill_at_rename.py", number, *flags, out, env=environment).returncode < 0
        assert killed == (number in renames)  # there are no more than these
        assert run("fineweb.py", *flags, out, env=environment).returncode == 0
        assert content(out) == expected, number


def test_no_worker_outlives_a_killed_parent(build, hub, environment, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "fineweb.py"), "--source", DATASET, "--out", str(tmp_path / "out"),
         "--shard_size", "2000", "--workers", "3"],
        env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "tokens/s" in process.stderr.readline()  # the first of its text is tokenized
    process.kill()
    process.communicate(timeout=100)  # returns once the last process that holds the pipes is gone
    assert not (read_manifest(tmp_path / "out") or {}).get("complete")
    assert build(shard_size=2000).returncode == 0


def test_every_mishap_is_survived(build, hub, tmp_path):
    assert build(out="undisturbed").returncode == 0
    hub.mishaps = [("info", "500"), *((SECOND, kind) for kind in ("429", "500", "cut", "short", "wrong"))]
    result = build()
    assert result.returncode == 0, result.stdout
    assert not hub.mishaps and content(tmp_path / "out") == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("kind, words", [("500", "500"), ("wrong", "has the hash")])
def test_lasting_trouble_is_named_and_loses_nothing(build, hub, tmp_path, kind, words):
    assert build(out="undisturbed").returncode == 0
    hub.always[SECOND] = kind
    assert_refused(build(), SECOND, "tried 5 times", words, "start again")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npy")}
    assert finished
    hub.always.clear()
    hub.commit = "f" * 40  # the branch has moved on: the build stays with the commit that it began with
    assert build().returncode == 0
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_not_taken_for_the_network(number):
    tries = []

    def attempt():
        tries.append(number)
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        with_retries("a file", attempt)
    assert len(tries) == 1


def test_no_network_is_said_with_the_remedy(build, environment, tmp_path):
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    assert_refused(build(), "Check the network", "--source demo")
    environment["HF_HUB_OFFLINE"] = "1"
    assert_refused(build(), "Check the network", "tried 1 times")
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_is_checked_without_the_network(build, hub, environment, tmp_path):
    assert build().returncode == 0
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    assert "every size is correct" in build().stdout
    assert "every sha256 is correct" in build("--verify").stdout
    shard = tmp_path / "out" / "texts_train_000001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_refused(build("--verify"), "texts_train_000001.npy", "sha256")
    shard.write_bytes(whole[:-2])
    assert_refused(build(), "texts_train_000001.npy")


def test_refusals_leave_nothing_behind(build, hub, tmp_path):
    for flags, words in {
        ("--text_column", "body"): ["no \"body\" column", "'id', 'text'"],
        ("--text_column", "id"): ["int64"],
        ("--name", "sample-10BT"): ["--name sample-10BT", "folders with files of text: data"],
        ("--split", "validation"): ["--split validation"],
        ("--revision", "nowhere"): ["--revision"],
    }.items():  # fmt: skip
        assert_refused(build(*flags), *words)
        assert not (tmp_path / "out").exists(), flags
    assert_refused(build(source="someone/else"), "someone/else", "hf auth login")
    assert_refused(build("--name", "x", source=ROOT / "tests"), "--name")
    hub.claims[SECOND] = 10**15
    assert_refused(build(), "GB of disk", "GB are free")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_folder_refuses_other_flags_and_names_both(build, hub, tmp_path):
    hub.always[SECOND] = "500"
    build()
    before = content(tmp_path / "out")
    assert_refused(build(shard_size=5000), "'shard_size': 10000", "'shard_size': 5000")
    assert_refused(build("--revision", "v1"), "'main'", "'v1'")
    (tmp_path / "other.txt").write_text("other text")
    assert_refused(build(source=tmp_path / "other.txt"), "already holds shards of", DATASET)
    assert content(tmp_path / "out") == before


def test_keep_keeps_the_files(build, hub, tmp_path):
    assert build("--keep").returncode == 0
    assert all((tmp_path / "out" / ".fineweb_download" / path).read_bytes() == TABLES[path] for path in TABLES)


def test_shards_that_are_tokenized_already_are_fetched_whole(build, hub, tmp_path):
    hub.files = {**BINS, "README.md": b"shards"}
    hub.always["edu_train_000002.bin"] = "wrong"
    assert_refused(build(), "edu_train_000002.bin", "has the hash")
    hub.always.clear()
    assert build().returncode == 0
    manifest = (tmp_path / "out" / "manifest.json").read_bytes()
    assert content(tmp_path / "out") == {**BINS, "manifest.json": manifest}
    assert json.loads(manifest)["documents"] == 1500 and json.loads(manifest)["complete"]
    assert hub.requests["GET", "edu_train_000001.bin"] == 1
    assert "every sha256 is correct" in build("--verify").stdout


@pytest.mark.parametrize(
    "files, words",
    [
        (["a/x_val_000000.bin", "a/x_train_000001.bin", "b/x_train_000001.bin"], ["a/x_train", "b/x_train", "--name"]),
        (["x_train_000001.bin", "x_train_000002.bin"], ["no *_val_*.bin", "x_train_000001.bin", "choose"]),
        (["x_val_000000.bin"], ["no *_train_*.bin", "x_val_000000.bin", "choose"]),
    ],
    ids=["equal names", "no val", "no train"],
)
def test_token_shards_that_make_no_data_set_are_refused_before_they_are_fetched(build, hub, tmp_path, files, words):
    hub.files = {file: bin_of([50256, 1, i]) for i, file in enumerate(files)}
    assert_refused(build(), *words)
    assert not (tmp_path / "out").exists() and not any(hub.requests["GET", file] for file in files)


def test_name_chooses_the_folder_of_token_shards(build, hub, tmp_path):
    hub.files = {f"{folder}/{name}": bin_of([50256, i]) for i, folder in enumerate("ab") for name in BINS}
    assert build("--name", "b").returncode == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in BINS} == dict.fromkeys(BINS, bin_of([50256, 1]))
    assert_refused(build("--name", "c", out="c"), "--name c")


def test_fetched_token_shards_are_on_the_disk_before_they_get_their_name(hub, environment, tmp_path):
    hub.files = BINS
    result = run("tests/probes/durable_renames.py", "--source", DATASET, "--out", tmp_path / "out", env=environment)
    assert result.returncode == 0, result.stdout


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
    "csv": (["train.csv"], None, [], "train.csv, which cannot be read here: it takes .parquet"),
    "nothing": (["model.safetensors"], None, [], "folders with files of text: none"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_datasets_chooses_the_files(layout, build, hub, tmp_path):
    paths, readme, flags, expected = LAYOUTS[layout]
    hub.files = {path: content_for(path) for path in paths} | ({} if readme is None else {"README.md": readme})
    result = build(*flags, shard_size=3, workers=1)
    fetched = [path for path in paths if hub.requests["GET", path]]
    if isinstance(expected, str):
        assert_refused(result, expected)
        assert not fetched and not (tmp_path / "out").exists()
        return
    assert result.returncode == 0, result.stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [file["file"] for file in manifest["files"]] == expected and sorted(fetched) == sorted(expected)
    assert manifest["documents"] == len(expected) and manifest["skipped_empty"] == 0
    size = sum(len(hub.files[path]) for path in expected)
    split = flags[flags.index("--split") + 1] if "--split" in flags else "train"
    assert f", split {split}, {len(expected)} files, {size:,} bytes" in result.stdout
    assert "card" not in result.stdout and "Warning" not in result.stdout


def test_a_copy_in_the_cache_is_no_answer(build, hub, environment, tmp_path):
    """Where `datasets` cannot list the files, it takes what it has loaded before, of any commit."""
    copy = tmp_path / "hf" / "datasets" / "someone___texts" / "default" / "0.0.0" / "abc"
    copy.mkdir(parents=True)
    (copy / "dataset_info.json").write_text(json.dumps({"config_name": "default", "dataset_name": "texts"}))
    hub.always["README.md"] = "500"
    assert_refused(build(), DATASET, "only an old copy", "start again")
    assert not (tmp_path / "out").exists()


def test_a_build_that_goes_on_keeps_the_files_that_it_began_with(build, hub, tmp_path):
    hub.always[SECOND] = "500"
    assert_refused(build(), SECOND)
    hub.always = {"tree": "500", "README.md": "500", "info": "500"}  # what the manifest says is enough
    assert build().returncode == 0
    assert [file["file"] for file in read_manifest(tmp_path / "out")["files"]] == list(TABLES)


def test_token_shards_come_in_the_order_of_their_numbers():
    assert choose_shards(["b_train_000001.bin", "a_train_000002.bin", "b_val_000000.bin", "x.bin", "._b_val.bin"]) == [
        "b_val_000000.bin", "b_train_000001.bin", "a_train_000002.bin",
    ]  # fmt: skip
    tables = ["sample/10BT/000_00000.parquet", "b_train_000001.bin"]
    assert not choose_shards(tables)


def test_the_loader_refuses_shards_that_the_manifest_does_not_list_and_misses_those_that_it_does(build, hub, tmp_path):
    assert build().returncode == 0
    shard = tmp_path / "out" / "texts_train_000001.npy"
    assert shard.name in find_shards(tmp_path / "out")[0]["train"]
    shard.rename(tmp_path / "out" / "foreign_train_000001.npy")
    with pytest.raises(UserError, match="foreign_train_000001.npy"):
        find_shards(tmp_path / "out")


def test_a_document_of_50_mb(build, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "one two three four " * 2_700_000}) + "\n\n")
    result = build(source=tmp_path / "long.jsonl", shard_size=5_000_000)
    assert "1 documents, 10,800,002 tokens in 3 shards; 1 empty" in result.stdout


def test_importing_takes_in_nothing_heavy():
    said = run("fineweb.py", "--help", env={"PYTHONPROFILEIMPORTTIME": "1"}).stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in said.splitlines() if "import time:" in line}
    assert "numpy" in imported and not {"datasets", "huggingface_hub", "pyarrow", "tqdm"} & imported
