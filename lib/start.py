"""
Imported first by each program: Ctrl-C while it imports torch ends it at once, without a traceback.

lib.console.run_as_command handles Ctrl-C from then on.
"""

import signal
import sys
from pathlib import Path

# whether this process is one of our programs, not another one that imports it; -m: python -m tools.NAME, at its start
IS_PROGRAM = Path((*sys.argv, "")[0]).name in ("-m", "train_gpt2.py", "fineweb.py", "hellaswag.py")


def die_of_interrupts():
    """Until Ctrl-C is handled, and after: the system's own way to end a program."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if IS_PROGRAM:
    die_of_interrupts()
