"""Console output that survives a closed pipe, user errors, and exit codes."""

from lib.start import IS_PROGRAM, die_of_interrupts

import contextlib
import os
import signal
import sys
import traceback


class UserError(ValueError):
    """An error that the user can fix. The message says what was found, what was expected and what to do."""


class Stopped(SystemExit):
    """A signal stopped the run on all ranks, after it was saved; `number` is the signal."""

    def __init__(self, number):
        super().__init__(128 + number)
        self.number = number


class Interrupted(Stopped, KeyboardInterrupt):
    """The same for Ctrl-C, for which Python has its own exception."""


lost = []  # why lines could not be printed on standard output


def say(message, stream=None):
    """Print a line and flush. If the console is gone (a closed pipe, a full disk), output goes to /dev/null."""
    stream = stream or sys.stdout
    if stream is None:  # python train_gpt2.py >&-
        lost.append("it is closed")
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"  # not every terminal can print what a model writes
    text = str(message).encode(encoding, "backslashreplace").decode(encoding)
    try:
        stream.write(text + "\n")  # in one write: lines of several processes do not mix
        stream.flush()
    except OSError as error:
        if stream is sys.stdout:
            lost.append(error)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def print0(message):
    """Print a line on rank 0 only."""
    if os.environ.get("RANK", "0") in ("0", ""):
        say(message)


def report(error):
    """Print an error that ends the program to stderr: a UserError as one line, any other with its traceback, Ctrl-C not
    at all. Returns the exit code."""
    rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    known = isinstance(error, UserError)
    say(f"{rank}error: {error}" if known else rank + "".join(traceback.format_exception(error)), sys.stderr)
    if known and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        say(f"{rank}torchrun may start again, as --max-restarts asks: if that cannot help, press Ctrl-C", sys.stderr)
    return 2 if known else 1


def run_as_command(run, *args, interrupted="", must_print=False):
    """Call run(*args) as a program: a UserError becomes its message and exit code 2, without a traceback. interrupted:
    the message after Ctrl-C. must_print: a line that cannot be printed is an error, too.

    A program stopped by a signal dies of that signal, or a shell loop would start the next run. Under torchrun it exits
    with 0, or torchrun would restart it; if a machine's torchrun was killed, with 137.
    """
    is_rank = "TORCHELASTIC_RUN_ID" in os.environ
    code = number = 0
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = run(*args)
        if IS_PROGRAM:
            die_of_interrupts()  # Python's own shutdown would swallow one
        if must_print and lost:
            raise UserError(f"cannot write to standard output: {lost[0]}")
    except Stopped as error:
        number = error.number
    except KeyboardInterrupt:
        say(interrupted, sys.stderr)
        number = signal.SIGINT
    except Exception as error:
        if not is_rank and not isinstance(error, UserError):
            raise
        code = report(error)
    if is_rank:
        exit_at_once(128 + number if number == signal.SIGKILL else code)
    if number:
        die_of(number)
    return sys.exit(code) if code else result


def die_of(number):
    """End the program by the signal, as if it had not been caught."""
    flush_output()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    exit_at_once(128 + number)  # if the signal is blocked


def exit_at_once(code):
    """Exit without Python's own shutdown, during which a surviving gloo thread can abort the process."""
    flush_output()
    os._exit(code)


def flush_output():
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it is gone, closed, or None
        sys.stdout.flush()
