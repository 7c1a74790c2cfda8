"""
The progress of a build of shards.
"""

import sys
import time

from lib.console import say


class Progress:
    """A line that says how far a build has come: after 1, 2, 4 ... seconds, then every 30."""

    def __init__(self, total, done):
        self.total, self.first, self.done = total, done, done
        self.start = time.monotonic()
        self.next_line = 0

    def update(self, tokens, manifest, name):
        """Count new tokens of the file called `name`."""
        self.done += tokens
        seconds = time.monotonic() - self.start
        if seconds >= self.next_line:
            speed = (self.done - self.first) / seconds / 1e6
            done = f"{self.done / 1e6:,.1f}M of about {self.total / 1e6:,.1f}M tokens"
            say(f"{done}, {speed:.1f}M tokens/s, {manifest['documents']:,} documents, {name}", sys.stderr)
            self.next_line = max(1, min(2 * seconds, seconds + 30))
