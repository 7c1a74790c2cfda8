"""
Never lose a run: checkpoints that are whole or absent and checked when read, a log without gaps.
"""

import hashlib
import os
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from lib.common import InputError, atomic_write

COMMENT_LENGTH = struct.pack("<H", 64)  # of a sha256 in hexadecimal, as the last field of a zip archive


class HashingWriter:
    """A file to write to that hashes with sha256 on a second core while the disk writes."""

    def __init__(self, file):
        self.file, self.flush = file, file.flush
        self.digest, self.thread = hashlib.sha256(), ThreadPoolExecutor(1)

    def write(self, data):
        hashed = self.thread.submit(self.digest.update, data)
        try:
            self.file.write(data)
        finally:
            hashed.result()  # torch may free the data after a failure
        return len(data)


def list_checkpoints(log_dir):
    """The checkpoints of a run by their steps, which have five digits or more."""
    return sorted(log_dir.glob("model_*.pt"), key=lambda path: (len(path.name), path.name))


def save_checkpoint(log_dir, keep, parts, facts):
    """Write log_dir/model_{step:05d}.pt, whole or not at all, then remove all but the newest `keep` of its kind.

    It holds the state_dict of each of `parts` and the plain data of `facts`, the step among them. At its end stands
    its sha256, as the comment of the zip archive that it is: torch.load checks nothing. Returns False, having said so,
    where it could not be written; the older ones are intact then.
    """
    path = log_dir / f"model_{facts['step']:05d}.pt"
    contents = {name: part.state_dict() for name, part in parts.items()}
    try:
        with open(log_dir / "log.txt", "ab") as log:
            os.fsync(log.fileno())  # the log is never behind a checkpoint
        with atomic_write(path) as file:
            hashing = HashingWriter(file)
            torch.save({**contents, **facts, "random_states": [torch.get_rng_state()]}, hashing)
            file.seek(-2, os.SEEK_CUR)  # torch wrote a comment length of 0
            file.write(COMMENT_LENGTH + hashing.digest.hexdigest().encode())
    except (OSError, RuntimeError) as error:  # torch wraps some of the former
        print(f"WARNING: {path} COULD NOT BE SAVED, the older checkpoints are intact: {error}", flush=True)
        return False
    for old in list_checkpoints(log_dir)[:-keep]:
        old.unlink()
    print(f"step {facts['step']:5d} | saved {path}", flush=True)
    return True


def load_checkpoint(path):
    """Read a checkpoint of save_checkpoint onto the CPU. Raises InputError where it is damaged or none."""
    try:
        with open(path, "rb") as file:
            size, digest = max(0, file.seek(0, os.SEEK_END) - 66), hashlib.sha256()
            file.seek(0)
            while chunk := file.read(min(1 << 20, size - file.tell())):
                digest.update(chunk)
            digest.update(bytes(2))  # the comment length that torch wrote
            if file.read() != COMMENT_LENGTH + digest.hexdigest().encode():
                raise InputError(f"{path} is damaged, or no checkpoint of train_gpt2.py: its sha256 does not match")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)  # other pickles could run anything
    except (OSError, pickle.UnpicklingError) as error:
        raise InputError(f"cannot load {path}: {error}") from None


def find_checkpoint(log_dir, rank):
    """The newest whole checkpoint of log_dir, on every rank the one that rank 0 found; None where there are none."""
    found = [None]
    if rank == 0:
        paths = list_checkpoints(log_dir)[::-1]
        for path in paths:
            try:
                load_checkpoint(path)
                found = [path]
                break
            except InputError as error:
                print(f"warning: {error}; falling back to the checkpoint before it", flush=True)
        if paths and not found[0]:
            raise InputError(f"none of the {len(paths)} checkpoints in {log_dir}/ is whole: restore one from a backup")
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return load_checkpoint(found[0]) if found[0] else None


def check_same_run(checkpoint, facts):
    """Raise InputError where the run could not be continued exactly. Returns what else was changed, as text."""
    before, now = ({**run["train_config"], **run["data"]} for run in (checkpoint, facts))
    fixed = ("n_layer", "n_head", "n_embd", "vocab_size", "sequence_length", "total_batch_size", "seed")
    for name in (*fixed, *sorted({*checkpoint["data"], *facts["data"]})):
        if before.get(name) != now.get(name):
            raise InputError(
                f"cannot resume: {name} was {before.get(name)} when the run began, it is {now.get(name)} now"
            )
    if now["max_steps"] < checkpoint["step"]:
        raise InputError(f"cannot resume: the run is at step {checkpoint['step']}, beyond max_steps {now['max_steps']}")
    free = ("max_steps", "warmup_steps", "max_lr", "min_lr_ratio", "weight_decay", "grad_clip", "dtype")
    return "".join(f", {name} {before[name]} -> {now[name]}" for name in free if before[name] != now[name])


def restore(checkpoint, parts, facts, state):
    """Load a checkpoint into parts, torch's random state and the dict state. Returns, or raises, what to say of it."""
    changes = check_same_run(checkpoint, facts)
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    torch.set_rng_state(checkpoint["random_states"][0])
    state.update((name, checkpoint[name]) for name in state)
    return f"resuming at step {state['step']}{changes}"


def cut_log(log_file, step):
    """Keep the whole records of the steps before `step`: the run writes the others again."""
    if log_file.exists():
        lines = log_file.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and int(line.split()[0]) < step]
        with atomic_write(log_file) as file:
            file.write("".join(kept).encode())
