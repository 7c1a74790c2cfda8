"""
What the scripts share: errors for the user, a console that may go away, files never half-written, the tokenizer.
"""

import atexit
import contextlib
import functools
import os
import re
import signal
import socket
import sys
import traceback
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

EOT = 50256  # <|endoftext|>, the one special token of GPT-2
OUR_TEMPORARY = re.compile(
    r"(model_\d{5,}\.pt|log\.txt|curve\.png|manifest\.json|[\w.-]+_(train|val)_\d{6}\.(npy|bin))\.\d+\.tmp"
)


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


@contextlib.contextmanager
def atomic_write(path):
    """Open path for writing bytes such that, whatever happens, it holds its old content or all of the new one."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the rename itself is durable only once the folder is
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def lock_folder(folder, purpose=""):
    """Make the folder and hold it for this process, by a lock of the operating system that goes when the process does.
    Yields what the holder before noted in it; this one notes its process id, host and `purpose`.

    Raises UserError, with that note, where another process holds it. Clears our own stale temporary files.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / "lock", "a+b", buffering=0))  # others can read it at once
            file.seek(0)
            before = file.read().decode(errors="replace")
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder}/ is being written by {before}: wait, or stop it with kill") from None
            except OSError as error:  # some network file systems have no locks
                say(f"warning: {folder}/ cannot be locked ({error}): see to it that nothing else writes it")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}{purpose}".encode())
            for path in folder.iterdir():
                if OUR_TEMPORARY.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise UserError(f"cannot write {folder}/: {error}. Mend that, or choose another folder") from None
        yield before


@functools.cache
def get_tokenizer():
    """The GPT-2 BPE as a tiktoken.Encoding, from assets/: tiktoken's own is a download, and clusters are offline."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=load_tiktoken_bpe(
            str(Path(__file__).parent.parent / "assets" / "gpt2.tiktoken"),
            expected_hash="306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        ),
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=50257,
    )
