"""
The console, which may go away while a run goes on; errors for the user; how a program ends.
"""

import atexit
import contextlib
import os
import signal
import sys
import traceback


class UserError(ValueError):
    """Something that the user can put right. The message says what was found, what was expected and what to do."""


def say(message, stream=None):
    """Print a line at once. A console that is gone (a closed pipe, a full disk) becomes /dev/null: the run goes on."""
    stream = stream or sys.stdout
    if stream is None:  # python train_gpt2.py >&-
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"  # not every terminal can print what a model writes
    text = str(message).encode(encoding, "backslashreplace").decode(encoding)
    try:
        stream.write(text + "\n")  # one write: whole lines
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def report(error):
    """Say an error that ends the program, on stderr: a UserError as one line, any other with its traceback. Returns
    the exit code."""
    rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    known = isinstance(error, UserError)
    say(f"{rank}error: {error}" if known else rank + "".join(traceback.format_exception(error)), sys.stderr)
    return 2 if known else 1


def run_as_command(run, *args):
    """Call run(*args) as a program: a UserError becomes its message and exit code 2, without a traceback.

    A run that a signal ended exits with 128 + the signal's number, but with 0 under torchrun, which would restart it,
    unless one machine's torchrun was killed.
    """
    is_rank, result, code = "TORCHELASTIC_RUN_ID" in os.environ, None, 0
    try:
        result = run(*args)
    except Exception as error:
        if not is_rank and not isinstance(error, UserError):
            raise
        code = report(error)
    if isinstance(result, dict) and "signal" in result and (not is_rank or result["signal"] == signal.SIGKILL):
        code = 128 + result["signal"]
    if is_rank:
        exit_at_once(code)
    return sys.exit(code) if code else result


def exit_at_once(code):
    """End a rank without Python's own end, in which a thread of gloo that lives on can abort the process."""
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it is gone, closed, or None
        sys.stdout.flush()
    os._exit(code)
