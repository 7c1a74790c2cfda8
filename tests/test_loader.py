import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import command_of, environment, flags_of, read_log, write_shards

from lib.console import UserError
from lib.data.folder import ShardFolder
from lib.data.order import shuffle
from train_gpt2 import DataLoaderLite


def loaders(folder, B, T, world_size, split="train", **kwargs):
    return [DataLoaderLite(B, T, rank, world_size, split, data_root=folder, **kwargs) for rank in range(world_size)]


def read_rows(folder, B, T, world_size, count):
    """The first `count` rows of the run, each as its T+1 tokens, in the order of the run."""
    ranks = loaders(folder, B, T, world_size)
    rows = []
    while len(rows) < count:
        for loader in ranks:
            x, y = loader.next_batch()
            assert x.shape == y.shape == (B, T) and x.dtype == y.dtype == torch.int64
            assert torch.equal(x[:, 1:], y[:, :-1])
            rows += torch.cat([x, y[:, -1:]], dim=1).tolist()
    return rows[:count]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5).filter(lambda n: sum(n) > 60),
    T=st.integers(1, 50), B=st.integers(1, 5), world_size=st.integers(1, 4), epochs=st.integers(1, 3),
)  # fmt: skip
def test_every_row_of_an_epoch_once_and_in_one_order(lengths, T, B, world_size, epochs):
    with tempfile.TemporaryDirectory() as folder:
        stream = write_shards(Path(folder), [100, *lengths])
        num_sequences = (len(stream) - 1) // T
        expected = sorted(stream[i * T : i * T + T + 1].tolist() for i in range(num_sequences))
        rows = read_rows(folder, B, T, world_size, epochs * num_sequences)
        for epoch in range(epochs):
            assert sorted(rows[epoch * num_sequences : (epoch + 1) * num_sequences]) == expected
        assert rows == read_rows(folder, 1, T, 1, epochs * num_sequences)


def test_epochs_differ_in_order_and_seeds_do(tmp_path):
    write_shards(tmp_path, [100, 5000])
    rows = read_rows(tmp_path, 1, 10, 1, 998)
    assert rows[:499] != rows[499:] and sorted(rows[:499]) == sorted(rows[499:])
    other = DataLoaderLite(1, 10, 0, 1, "train", data_root=tmp_path, seed=1)
    assert other.next_batch()[0].tolist() != rows[0][:-1]


def test_a_batch_that_is_prepared_is_the_one_that_comes(tmp_path):
    write_shards(tmp_path, [100, 700, 800])
    plain, prepared = (DataLoaderLite(1, 16, 0, 1, "train", data_root=tmp_path) for _ in range(2))
    for step in range(10):
        if step == 5:
            plain.seek(50), prepared.seek(50)
        (x, y), (px, py) = plain.next_batch(), prepared.next_batch()
        assert torch.equal(x, px) and torch.equal(y, py) and x.stride() == y.stride() == (16, 1)
        assert prepared.position == plain.position  # of what was handed out
        prepared.prepare()


def test_reset_replays_and_seek_continues(tmp_path):
    write_shards(tmp_path, [100, 700, 800])
    loader = DataLoaderLite(4, 16, 1, 2, "train", data_root=tmp_path)
    batches = [loader.next_batch() for _ in range(30)]  # past the end of the epoch
    loader.reset()
    for x, y in batches[:5]:
        again = loader.next_batch()
        assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    loader.seek(25 * 8)
    assert torch.equal(loader.next_batch()[0], batches[25][0])


def test_validation_samples_the_whole_split(tmp_path):
    """Its first rows lie all over the split, the same for every batch and number of ranks; all are the whole split."""
    write_shards(tmp_path, [100, 700])
    for index in range(4):  # each token is its own place in the split
        np.save(tmp_path / f"tiny_val_{index:06d}.npy", np.arange(1600 * index, 1600 * (index + 1), dtype=np.uint16))

    def starts(B, world_size):
        ranks = loaders(tmp_path, B, 64, world_size, "val")
        batches = [loader.next_batch()[0] for _ in range(96 // B // world_size) for loader in ranks]
        return torch.cat(batches)[:, 0].tolist()

    order = starts(1, 1)
    assert order == starts(8, 1) == starts(4, 3)
    assert all(2 <= sum(start // 1600 == shard for start in order[:20]) <= 8 for shard in range(4))
    whole = DataLoaderLite(99, 64, 0, 1, "val", data_root=tmp_path).next_batch()[0]
    assert sorted(whole[:, 0].tolist()) == list(range(0, 99 * 64, 64))


def write_bin(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def test_bin_shards_of_llm_c_read_like_npy(tmp_path):
    stream = write_shards(tmp_path / "npy", [100, 700])
    (tmp_path / "bin").mkdir()
    write_bin(tmp_path / "bin" / "fineweb_train_000001.bin", stream)
    assert read_rows(tmp_path / "bin", 2, 10, 1, 60) == read_rows(tmp_path / "npy", 2, 10, 1, 60)


def test_files_with_other_names_are_no_shards(tmp_path):
    write_shards(tmp_path, [100, 700])
    for name in ("tiny_train_1.npy", "tiny_train_000002.npy.tmp", "train_x.npy", "tiny_train_000003.npz"):
        (tmp_path / name).write_bytes(b"no shard")
    assert len(DataLoaderLite(1, 10, 0, 1, "train", data_root=tmp_path).tokens.shards) == 1


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p.unlink(), "python fineweb.py"),
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), "not a complete token shard"),
        (lambda p: p.write_bytes(b""), "not a complete token shard"),
        (lambda p: np.save(p, np.zeros(700, np.int64)), "int64"),
        (lambda p: np.save(p, np.zeros((70, 10), np.uint16)), r"\(70, 10\)"),
        (lambda p: np.save(p, np.zeros(0, np.uint16)), "0 tokens"),
        (lambda p: np.save(p, np.array([None])), "not a complete token shard"),
        (lambda p: np.save(p, np.array([5] * 300 + [512, 5], np.uint16)), "token id 512 at offset 300"),
        (lambda p: np.save(p, np.zeros(10, np.uint16)), "too few"),
    ],
)
def test_damaged_shards_are_refused_by_name(tmp_path, damage, message):
    write_shards(tmp_path, [100, 700])
    path = tmp_path / "tiny_train_000001.npy"
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        loader = DataLoaderLite(1, 10, 0, 1, "train", data_root=tmp_path, vocab_size=512)
        for _ in range(loader.num_sequences):
            loader.next_batch()
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("kwargs", [{"magic": 1}, {"version": 2}, {"count": 699}])
def test_damaged_bin_shards_are_refused(tmp_path, kwargs):
    path = tmp_path / "fineweb_train_000001.bin"
    write_bin(path, np.zeros(700), **kwargs)
    with pytest.raises(UserError, match=str(path)):
        DataLoaderLite(1, 10, 0, 1, "train", data_root=tmp_path)
    path.write_bytes(b"short")
    with pytest.raises(UserError, match=str(path)):
        DataLoaderLite(1, 10, 0, 1, "train", data_root=tmp_path)


def test_shards_as_llm_c_names_them_are_read_as_they_are(tmp_path):
    stream = write_shards(tmp_path / "npy", [100, 700])
    (tmp_path / "bin").mkdir()
    write_bin(tmp_path / "bin" / "TinyStories_train.bin", stream)
    write_bin(tmp_path / "bin" / "TinyStories_val.bin", np.load(tmp_path / "npy" / "tiny_val_000000.npy"))
    (tmp_path / "bin" / "train.bin").write_bytes(b"of nanoGPT, which has no header")
    assert read_rows(tmp_path / "bin", 2, 10, 1, 60) == read_rows(tmp_path / "npy", 2, 10, 1, 60)
    assert set(ShardFolder(tmp_path / "bin").facts) == {"TinyStories_train.bin", "TinyStories_val.bin"}


def test_hidden_files_beside_shards_are_left_out_and_counted(tmp_path, capsys):
    write_shards(tmp_path, [100, 700])
    before = ShardFolder(tmp_path).facts
    assert "hidden" not in capsys.readouterr().out
    for name in ("._tiny_train_000001.npy", "._tiny_val_000000.npy", ".tiny_train_000002.npy"):
        (tmp_path / name).write_bytes(b"of macOS")
    assert ShardFolder(tmp_path).facts == before and "3 hidden files" in capsys.readouterr().out


@pytest.mark.parametrize("path, words", [("file", "Not a directory"), ("x" * 300, "too long"), ("no", "nor .bin")])
def test_a_data_dir_that_the_system_refuses_is_said_in_its_words(path, words, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=words):
        DataLoaderLite(1, 10, 0, 1, "train", data_root=tmp_path / path)


@pytest.mark.skipif(os.name != "posix", reason="limits of the operating system")
def test_hundreds_of_shards_need_few_open_files(tiny, tmp_path):
    write_shards(tmp_path / "data", [1500] + [40] * 400)
    config = tiny(max_steps=8, sequence_length=16)
    limited = ["sh", "-c", 'ulimit -n 200 && exec "$@"', "sh", *command_of("train_gpt2.py", *flags_of(config))]
    result = subprocess.run(limited, env=environment(), capture_output=True, text=True, timeout=150)
    assert result.returncode == 0 and "8 val" in read_log(config.log_dir), result.stdout + result.stderr


ORDER_OF_20 = [3, 17, 19, 16, 15, 1, 13, 10, 2, 18, 0, 11, 14, 9, 7, 5, 6, 12, 8, 4]
ORDER_OF_10_BILLION = [3008452373, 3540753649, 675504089]


def order(n, seed=0, epoch=0):
    return shuffle(np.arange(n), n, seed, np.full(n, epoch))


@pytest.mark.parametrize("kind, message", [("dead link", "No such file"), ("folder", "Is a directory")])
def test_a_shard_that_cannot_be_read_is_named(tmp_path, kind, message):
    write_shards(tmp_path, [100, 300])
    path = tmp_path / "tiny_train_000002.npy"
    path.symlink_to("nowhere") if kind == "dead link" else path.mkdir()
    with pytest.raises(UserError, match=rf"{path.name}.*{message}.*build it again"):
        DataLoaderLite(4, 16, 0, 1, "train", data_root=tmp_path)


def test_the_loaders_of_a_run_share_one_folder(tmp_path):
    write_shards(tmp_path, [100, 300, 200])
    folder = ShardFolder(tmp_path)
    for split in ("train", "val"):
        shared, alone = (DataLoaderLite(4, 16, 0, 1, split, root) for root in (folder, tmp_path))
        assert shared.tokens.shards is folder.shards[split]
        assert all(torch.equal(a, b) for a, b in zip(shared.next_batch(), alone.next_batch(), strict=True))


@pytest.mark.parametrize("token", [0, 150, 299])
def test_other_content_of_the_same_length_has_another_fingerprint(tmp_path, token):
    write_shards(tmp_path, [100, 300])
    before = ShardFolder(tmp_path).facts
    path = tmp_path / "tiny_train_000001.npy"
    tokens = np.load(path)
    tokens[token] += 1
    np.save(path, tokens)
    after = ShardFolder(tmp_path).facts
    assert [name for name in before if before[name] != after[name]] == [path.name]


def test_the_order_is_a_permutation_of_every_length():
    for n in [*range(1, 300), 4096, 4097, 65_536, 65_537, 99_991]:
        assert np.array_equal(np.sort(order(n)), np.arange(n)), n


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 10**12), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6), at=st.data())
def test_the_order_of_any_amount_of_data_repeats_nothing(n, seed, epoch, at):
    start = at.draw(st.integers(0, max(0, n - 1000)))
    index = np.arange(start, min(n, start + 1000))
    found = shuffle(index, n, seed, np.full(len(index), epoch))
    assert found.min() >= 0 and found.max() < n and len(np.unique(found)) == len(index)
    one_by_one = [shuffle(index[i : i + 1], n, seed, np.array([epoch]))[0] for i in range(0, len(index), 97)]
    assert one_by_one == found[::97].tolist()


def test_the_order_is_the_same_everywhere():
    """On every platform and version of numpy: computed once, and with Python's own integers."""
    assert order(20, seed=1337, epoch=3).tolist() == ORDER_OF_20
    assert shuffle(np.array([0, 1, 10**10]), 10**10 + 1, 7, np.array([0, 0, 5])).tolist() == ORDER_OF_10_BILLION


def test_the_order_is_as_random_as_numpys():
    """Serial correlation, the distribution of gaps, and how evenly batches take from shards, against a permutation."""
    n, batch, shards = 100_000, 500, 100
    for seed in range(5):
        ours, theirs = order(n, seed), np.random.RandomState(seed).permutation(n)
        for lag in (1, 2, 64):
            limit = 4 / n**0.5  # four standard deviations
            assert abs(np.corrcoef(ours[:-lag], ours[lag:])[0, 1]) < limit
        gaps = [np.histogram(np.abs(np.diff(x)), bins=50, range=(0, n))[0] for x in (ours, theirs)]
        chi2 = ((gaps[0] - gaps[1]) ** 2 / (gaps[0] + gaps[1])).sum()
        assert chi2 < 50 + 5 * 100**0.5
        counts = np.stack([np.bincount(b * shards // n, minlength=shards) for b in ours.reshape(-1, batch)])
        expected = batch / shards * (1 - 1 / shards) * (1 - (batch - 1) / (n - 1))  # variance without replacement
        assert counts.var() == pytest.approx(expected, rel=0.05)
    assert (order(n, 0) == order(n, 1)).mean() < 1e-3 and (order(n, 0, 0) == order(n, 0, 1)).mean() < 1e-3
