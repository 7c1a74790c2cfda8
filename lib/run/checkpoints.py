"""
The checkpoints in a run's folder.
"""

import errno
import os
import shlex

from lib.checkpoint import list_checkpoints, load_checkpoint, step_of, write_checkpoint
from lib.console import UserError, say

GONE = "is gone, and with it the run: start again, or restore it and resume"


def path_of(log_dir, step):
    return log_dir / f"model_{step:05d}.pt"


def remove(path):
    try:
        path.unlink()
    except OSError as error:
        say(f"warning: {path} cannot be removed: {error}")


def save_checkpoint(log_dir, contents, keep, prune=True):
    """Write log_dir/model_{step:05d}.pt, then, with `prune`, remove all but the newest `keep` up to this step.

    If the disk is full and `prune` allows it, the oldest spare one is removed to make room. Returns False, with a
    warning, if it could not be written; the newest older one is then intact. Raises UserError if the folder is gone.
    """
    step = contents["step"]
    path = path_of(log_dir, step)
    for retry in (False, True):
        try:
            write_checkpoint(path, contents)
            break
        except (OSError, RuntimeError) as error:
            if not log_dir.is_dir():
                raise UserError(f"{log_dir}/ {GONE}") from None
            older = [other for other in list_checkpoints(log_dir) if step_of(other) < step]
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if retry or not full or not prune or len(older) < 2:
                say(f"WARNING: {path} COULD NOT BE SAVED, the older checkpoints are intact: {error}")
                return False
            say(f"warning: the disk is full: removing {older[0]} to make room for {path.name}")
            remove(older[0])
    if prune:
        for old in [other for other in list_checkpoints(log_dir) if step_of(other) <= step][:-keep]:
            remove(old)
    say(f"step {step:5d} | saved {path}")
    return True


def newest_whole_checkpoint(log_dir):
    """The path of the newest checkpoint that loads, None if there are none. Warns of those that do not load."""
    paths = list_checkpoints(log_dir)[::-1]
    for path in paths:
        try:
            load_checkpoint(path)
            return path
        except UserError as error:
            say(f"warning: {error}; falling back to the checkpoint before it")
    if paths:
        raise UserError(
            f"none of the {len(paths)} checkpoints in {log_dir}/ is complete and of this trainer: restore one from a "
            "backup. If another program wrote them, import the model: python -m tools.import_model "
            f"{shlex.quote(str(paths[0]))} FOLDER, then --init_from FOLDER with another --log_dir"
        )
    return None


def set_aside(log_dir, first_step):
    """Rename the checkpoints from first_step on, so that no resume uses them. Returns the newest remaining one."""
    paths = list_checkpoints(log_dir)
    for path in paths:
        if step_of(path) >= first_step:
            os.replace(path, path.with_suffix(".pt.not_finite"))
    return next((path for path in reversed(paths) if step_of(path) < first_step), None)
