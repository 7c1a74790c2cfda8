"""Signals stop a run between two steps or batches, on all ranks together."""

import contextlib
import os
import signal
import threading
import time

import torch

from lib.console import UserError
from lib.distributed import group_device, sum_over_ranks

OTHERS = (  # cannot be caught, end no program, or are of faults in code
    "SIGKILL", "SIGSTOP", "SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGINFO",
    "SIGPIPE", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL",
)  # fmt: skip
RUNNING = threading.Lock()  # held by the run of this process


def stop_signals():
    """The signals that end a program unless it handles them, but for those of a fault in its code; none in a thread,
    where Python delivers no signals."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in signal.valid_signals() if getattr(number, "name", "") not in OTHERS]


@contextlib.contextmanager
def one_run():
    """Restore the handlers of the signals that stop a run on exit. Raises UserError if this process trains already:
    the two would draw from the same random states."""
    if not RUNNING.acquire(blocking=False):
        raise UserError("another run is in progress in this process: wait for it, or start a process for each")
    before = {number: signal.getsignal(number) for number in stop_signals()}
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.inference_mode(False), torch.enable_grad():  # a notebook may have switched gradients off
            yield
    finally:
        torch.set_default_dtype(dtype)
        for number, handler in before.items():
            if handler is not None:  # not one of a C library
                signal.signal(number, handler)
        RUNNING.release()


def catch_signals():
    """Handle the signals that would end the run. Returns caught(), the signal that stops it, the same on all ranks:
    None unless one of them got one.

    A second signal ends the process immediately, unless it comes within a second, under torchrun within ten: schedulers
    signal both torchrun and its workers, and torchrun passes the signal on. A signal that is ignored, as SIGHUP under
    nohup, stays ignored, and a handler of the user's own is kept. If a torchrun was killed, the workers of all machines
    stop as well, with SIGKILL as the signal.
    """
    signals = []
    parent = os.getppid()
    is_rank = "TORCHELASTIC_RUN_ID" in os.environ

    def on_signal(number, frame):
        if signals and time.monotonic() - signals[0][0] > (10 if is_rank else 1):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not signals and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # not print(), which may be at work
                os.write(2, b"stopping after this step; once more ends now, unsaved\n")
        signals.append((time.monotonic(), number))

    def caught():
        number = signals[0][1] if signals else 0
        if is_rank and os.getppid() != parent:
            number = signal.SIGKILL
        mine = [int(number == other) for other in range(1, signal.NSIG)]
        counts = sum_over_ranks(torch.tensor(mine, device=group_device())).tolist()  # of ranks that got each signal
        return max((other for other, count in enumerate(counts, start=1) if count), default=None)

    for number in stop_signals():
        free = signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
        if free or number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
    return caught
