"""
Imported first by each program: Ctrl-C while it imports torch ends it at once, without a traceback.

lib.console.run_as_command handles Ctrl-C from then on.
"""

import contextlib
import signal
import sys
from pathlib import Path


def is_program():
    """Whether the program of this process imports this module itself, as our scripts and their copies do; a program
    that imports one of them keeps its own Ctrl-C. "-m": python -m tools.NAME, while it looks for NAME."""
    name = (*sys.argv, "")[0]
    with contextlib.suppress(OSError, ValueError):
        return name == "-m" or "\nimport lib.start" in Path(name).read_text(encoding="utf-8")
    return False


IS_PROGRAM = is_program()  # decided once: python -m changes sys.argv


def die_of_interrupts():
    """Until Ctrl-C is handled, and after: the system's own way to end a program."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if IS_PROGRAM:
    die_of_interrupts()
