import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import write_shards

from lib.common import InputError
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


def test_val_rows_come_in_order(tmp_path):
    write_shards(tmp_path, [100, 700])
    tokens = np.load(tmp_path / "tiny_val_000000.npy")
    x, y = DataLoaderLite(3, 10, 0, 1, "val", data_root=tmp_path).next_batch()
    assert x.flatten().tolist() == tokens[:30].tolist() and y.flatten().tolist() == tokens[1:31].tolist()


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
    assert len(DataLoaderLite(1, 10, 0, 1, "train", data_root=tmp_path).shards) == 1


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p.unlink(), "python fineweb.py"),
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), "not a whole token shard"),
        (lambda p: p.write_bytes(b""), "not a whole token shard"),
        (lambda p: np.save(p, np.zeros(700, np.int64)), "int64"),
        (lambda p: np.save(p, np.zeros((70, 10), np.uint16)), r"\(70, 10\)"),
        (lambda p: np.save(p, np.zeros(0, np.uint16)), r"\(0,\)"),
        (lambda p: np.save(p, np.array([None])), "not a whole token shard"),
        (lambda p: np.save(p, np.array([5] * 300 + [512, 5], np.uint16)), "token id 512 at offset 300"),
        (lambda p: np.save(p, np.zeros(10, np.uint16)), "too few"),
    ],
)
def test_damaged_shards_are_refused_by_name(tmp_path, damage, message):
    write_shards(tmp_path, [100, 700])
    path = tmp_path / "tiny_train_000001.npy"
    damage(path)
    with pytest.raises(InputError, match=message) as error:
        loader = DataLoaderLite(1, 10, 0, 1, "train", data_root=tmp_path, vocab_size=512)
        for _ in range(loader.num_sequences):
            loader.next_batch()
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("kwargs", [{"magic": 1}, {"version": 2}, {"count": 699}])
def test_damaged_bin_shards_are_refused(tmp_path, kwargs):
    path = tmp_path / "fineweb_train_000001.bin"
    write_bin(path, np.zeros(700), **kwargs)
    with pytest.raises(InputError, match=str(path)):
        DataLoaderLite(1, 10, 0, 1, "train", data_root=tmp_path)
    path.write_bytes(b"short")
    with pytest.raises(InputError, match=str(path)):
        DataLoaderLite(1, 10, 0, 1, "train", data_root=tmp_path)
