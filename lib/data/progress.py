"""
The progress of a build of shards.
"""

import os
import sys
import time

from lib.console import say


class Progress:
    """A progress bar that counts tokens; without a terminal, a line every 30 seconds."""

    def __init__(self, total, done):
        from tqdm import tqdm

        self.on_screen = sys.stderr is not None and sys.stderr.isatty()
        self.screen = sys.stderr if self.on_screen else open(os.devnull, "w")  # noqa: SIM115
        unit = dict(unit=" tokens", unit_scale=True)
        self.bar = tqdm(total=total or None, initial=done, file=self.screen, mininterval=0.5, **unit)
        self.next_line = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        if not self.on_screen:
            self.screen.close()

    def update(self, tokens, manifest, where):
        """Count new tokens of the file called `where`, whose name may not be printable."""
        where = where.encode("ascii", "backslashreplace").decode()
        shard = f"shard {len(manifest['shards']):06d}"
        self.bar.set_postfix_str(f"{manifest['documents']:,} documents, {where}, {shard}", False)
        self.bar.update(tokens)
        if not self.on_screen and time.monotonic() >= self.next_line:
            say(self.bar, sys.stderr)
            self.next_line = time.monotonic() + 30
