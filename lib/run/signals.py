"""
Signals that end a run between two steps, on all ranks together.
"""

import contextlib
import os
import signal
import threading
import time

import torch

from lib.distributed import sum_over_ranks

DISK_SPEED = 5e8  # bytes/s, of a slow one


def numbers():
    """The signals that stop a run: none where it is in a thread, to which Python brings no signals."""
    names = ("SIGTERM", "SIGINT", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


class StopRun(Exception):
    """Ends the run between two steps or batches, on all ranks; `number` is the signal's, on the rank that got it."""

    def __init__(self, number):
        super().__init__("stopped by a signal")
        self.number = number


def short_shutdown(step_seconds, checkpoint_bytes):
    """What to say where torchrun, which kills its workers some time after it was told to stop, may not wait for the
    step and its checkpoint; else None."""
    limit = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))  # seconds; torchrun's default
    need = step_seconds + checkpoint_bytes / DISK_SPEED
    if "TORCHELASTIC_RUN_ID" in os.environ and need > limit:
        return (
            f"warning: after a signal, torchrun waits {limit:.0f} s by default; a step of {step_seconds:.0f} s and its "
            f"checkpoint of {checkpoint_bytes / 1e9:.1f} GB may take longer: give it --shutdown-timeout={2 * need:.0f}"
        )


@contextlib.contextmanager
def handlers_restored():
    """The handlers of the signals that stop a run are afterwards what they were before."""
    before = {number: signal.getsignal(number) for number in numbers()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_on_signals(device):
    """Return check_stop(), which raises StopRun on all ranks together once one of them got SIGTERM, SIGINT or SIGHUP.

    A second signal ends the process at once; one within a second is still the first, under torchrun within ten, since
    schedulers signal torchrun and its workers, and torchrun passes it on. A SIGHUP that nohup made ignored stays so.
    Where a torchrun was killed, the workers of all machines stop, too, with SIGKILL as the signal's number: their exit
    code, which is not 0 then, tells the other torchruns.
    """
    caught, parent, is_rank = [], os.getppid(), "TORCHELASTIC_RUN_ID" in os.environ

    def on_signal(number, frame):
        if caught and time.monotonic() - caught[0][0] > (10 if is_rank else 1):
            os._exit(128 + number)
        caught.append((time.monotonic(), number))

    def check_stop():
        orphaned = is_rank and os.getppid() != parent
        signalled, orphans = sum_over_ranks(torch.tensor([bool(caught), orphaned], dtype=int, device=device)).tolist()
        if signalled or orphans:
            raise StopRun(signal.SIGKILL if orphans else caught[0][1] if caught else signal.SIGTERM)

    for number in numbers():
        if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, on_signal)
    return check_stop
