"""The log_dir of a run: whose it is, its lock, and where it continues."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import torch

from lib.checkpoint import NAME, load_checkpoint, newest_whole_checkpoint
from lib.console import Stopped, UserError
from lib.distributed import from_rank_0, group_device, is_main_rank, sum_over_ranks
from lib.files import list_folder, lock_folder


class RunFolder:
    """`with RunFolder(...) as folder:` refuses a folder that holds another run, and releases it at the end. stack: what
    is closed on exit; on_stop: what saves the run if a signal stops it."""

    def __init__(self, path, resume):
        self.path = Path(path)
        self.resume = resume
        self.stack = contextlib.ExitStack()
        self.on_stop = None

    def __enter__(self):
        # a restart by torchrun --max-restarts resumes by itself, even on machines whose own count is still 0
        restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device=group_device())
        self.restarted = sum_over_ranks(restarts).item() > 0
        if not self.resume and not self.restarted:
            self.refuse_other_run()
        return self

    def __exit__(self, kind, error, trace):
        with self.stack:
            if isinstance(error, Stopped) and self.on_stop:
                self.on_stop()

    def refuse_other_run(self):
        if any(path.name == "log.txt" or NAME.fullmatch(path.name) for path in list_folder(self.path)):
            raise UserError(f"{self.path}/ holds a run: give --init_from resume, delete it, or give another --log_dir")

    def open(self, config, device):
        """Lock the folder for this run. Returns (config, its newest complete checkpoint or None); the config of a
        resumed run says what it was started from."""
        # with mmap the ranks of a machine share its memory until it is on their GPUs; kept on, it would hold the disk
        mmap = device.type == "cuda"
        if is_main_rank():
            self.lock()
            path, checkpoint = newest_whole_checkpoint(self.path, mmap)
            from_rank_0(path and str(path))
        else:
            path = from_rank_0(None)
            checkpoint = load_checkpoint(path, mmap) if path else None
        began = config.init_from
        if began == "resume":
            began = checkpoint["train_config"].get("init_from", "scratch") if checkpoint else from_rank_0(self.begun())
        return replace(config, init_from=began), checkpoint

    def lock(self):
        """Lock the folder. Raises UserError if it holds a run, unless this run resumes it or is a restart by the
        torchrun that began it, whose id is noted in the lock."""
        launch = f", torchrun {os.environ['TORCHELASTIC_RUN_ID']}" if "TORCHELASTIC_RUN_ID" in os.environ else ""
        if launch.endswith(" none"):  # which all launches with --master_port are called
            launch += f" {os.getppid()}"
        before = self.stack.enter_context(lock_folder(self.path, launch))
        if not self.resume and not (self.restarted and before.endswith(launch)):
            try:
                self.refuse_other_run()
            except UserError:  # otherwise a restart of this launch would mistake the run for its own
                (self.path / "lock").write_text(before)
                raise

    def begun(self):
        """What a run without a checkpoint was started from, by its config.json."""
        try:
            return json.loads((self.path / "config.json").read_bytes())["init_from"]
        except (OSError, ValueError, KeyError, TypeError):
            return "scratch"
