"""
What happens beside a run, in processes of their own, that it need not wait for.
"""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

PATIENCE = 10  # seconds that the end of a run waits for them


def start_beside(*command, **streams):
    """Start a Python program that leaves the CPU to the run, and the signals that end it."""
    nice = ["nice", "-n", "19"] if shutil.which("nice") else []
    root = Path(__file__).parent.parent
    return subprocess.Popen([*nice, sys.executable, *command], cwd=root, start_new_session=True, **streams)


def wait_for(process):
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process and process.wait(PATIENCE)
