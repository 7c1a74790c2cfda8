"""
Two hosts on one Linux machine, as root: what becomes of a run on both when a worker, an agent or the link dies.

    PYTHONPATH=. python tests/two_hosts.py                        # every case once
    PYTHONPATH=. python tests/two_hosts.py "worker 1" --times 5   # one case, again and again

A host is a network namespace with its own address; a switch, a third one, joins them. The link is cut by taking one of
them off the switch: both keep their carrier, as when a switch dies. Each host runs its own agent, which is torchrun,
with one worker. Host 0 has the store that they meet at. The losses must be those of one process that nobody disturbed,
up to the rounding of sums.

Measured on 2 cores of a busy server (torch 2.13.0, 2026-11-24, collective_timeout 20 s), from the event to the end:
--max-restarts=3: a killed worker 19 to 45 s (6 of 6 ended well); a link cut for 40 s 65 to 96 s (2 of 2); for 120 s
both agents gave up (1 of 1). In a loop until it ends well, without restarts: a killed worker 22 to 52 s (4 of 4), a
killed agent 14 to 96 s (4 of 4), a link cut for 40 s 62 to 94 s (2 of 2), for 120 s 170 s (1 of 1), for 300 s with 8
TCP retries 311 s (1 of 1). All that ended well had all losses right. A link cut for good, neither loop nor restarts:
both agents ended after 934 s, with 8 TCP retries after 113 s.
"""

import argparse
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from support import ROOT, TINY, environment, flags_of, losses, write_shards

from train_gpt2 import TrainConfig, main

STEPS, STOP = 120, 30  # a run's steps; the step at which something dies
UNTIL = ["bash", "-c", 'until "$@"; do sleep 1; done', "bash"]  # run a command until it ends well


def ip(*args):
    subprocess.run(["ip", *map(str, args)], check=True, capture_output=True, text=True)


def allowed():
    """Whether this process may make two hosts."""
    try:
        with TwoHosts(".", None):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


class TwoHosts:
    """`with TwoHosts(folder, config) as hosts:` is two hosts, numbers 0 and 1, of which 0 has the rendezvous. What is
    still running on them in the end is killed."""

    def __init__(self, folder, config):
        self.folder, self.config = Path(folder), config
        self.names, self.switch = [f"host{i}-{os.getpid()}" for i in range(2)], f"switch-{os.getpid()}"
        self.agents = [None, None]

    def __enter__(self):
        with contextlib.ExitStack() as undo:
            for name in (*self.names, self.switch):
                ip("netns", "add", name)
                undo.callback(ip, "netns", "del", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.switch, "link", "set", "bridge", "up")
            for i, name in enumerate(self.names):
                ip("link", "add", "eth", "netns", name, "type", "veth", "peer", f"port{i}", "netns", self.switch)
                ip("-n", self.switch, "link", "set", f"port{i}", "master", "bridge", "up")
                ip("-n", name, "link", "set", "eth", "up")
                ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth")
            self.undo = undo.pop_all()
        return self

    def __exit__(self, *_):
        for agent in filter(None, self.agents):
            for process in self.processes(agent):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            agent.wait()
        for name in self.names:  # workers whose agent was killed
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        self.undo.close()

    def start(self, i, restarts=0, again=False, retries=15):
        """Start host i's agent; `again`: over and over, until it ends well. retries: how often the host's TCP sends
        again before it gives a connection up; Linux's 15 take a quarter of an hour, 8 take 100 s."""
        if retries != 15:
            ip("netns", "exec", self.names[i], "sysctl", "-w", f"net.ipv4.tcp_retries2={retries}")
        # a host's name does not resolve to its address here, so each is told its address and whether it has the store
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=run",
            f"--max-restarts={restarts}", "--rdzv_backend=c10d", "--rdzv_endpoint=10.77.0.1:29500",
            f"--local_addr=10.77.0.{i + 1}", f"--rdzv_conf=is_host={1 - i}",
        ]  # fmt: skip
        flags = flags_of(self.config, init_from="resume" if again else self.config.init_from)
        command = [*(UNTIL if again else []), *torchrun, str(ROOT / "train_gpt2.py"), *flags]
        with open(self.console(i), "ab") as console:
            self.agents[i] = subprocess.Popen(
                ["ip", "netns", "exec", self.names[i], *command],
                env=environment(GLOO_SOCKET_IFNAME="eth"), stdout=console, stderr=console,
            )  # fmt: skip

    def cut(self):
        ip("-n", self.switch, "link", "set", "port1", "nomaster")

    def mend(self):
        ip("-n", self.switch, "link", "set", "port1", "master", "bridge")

    def console(self, i):
        return self.folder / f"console{i}.txt"

    def processes(self, agent):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(agent.pid)
            return [process, *process.children(recursive=True)]
        return []

    def kill(self, i, what):
        """SIGKILL host i's "worker" or "agent"."""
        found = [p for p in self.processes(self.agents[i]) if p.cmdline()[:1] == [sys.executable]]
        {"agent": found[0], "worker": found[1]}[what].kill()

    def wait_for(self, pattern, i=0, seconds=90):
        """Wait until the console of host i has a line that matches."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.console(i).read_text(errors="replace"), re.M):
            if time.monotonic() > end:
                raise AssertionError(f"no {pattern} in {seconds} s:\n" + self.console(i).read_text())
            time.sleep(0.02)

    def wait(self, seconds):
        """Wait for both agents to end; returns their exit codes, None for one that has not by then."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(agent.poll() is None for agent in self.agents):
            time.sleep(0.1)
        return [agent.poll() for agent in self.agents]


def settings(folder, **overrides):
    """The TrainConfig of a run that takes some seconds, in folder."""
    write_shards(folder / "data", [1500, 5000, 3001, 7003])
    fixed = dict(max_steps=STEPS, checkpoint_every=10, max_lr=1e-3, collective_timeout=20, val_every=0)
    folders = {"data_dir": str(folder / "data"), "log_dir": str(folder / "log")}
    return TrainConfig(**{**TINY, **folders, **fixed, **overrides})


def compare(config):
    """How many of the run's losses are missing or wrong, by those of one process that nobody disturbed."""
    folder = Path(config.log_dir).parent
    with contextlib.redirect_stdout(io.StringIO()):
        main(replace(config, log_dir=str(folder / "whole"), init_from="scratch"))
    whole, log = losses(folder / "whole", "train"), losses(folder / "log", "train")
    assert len(whole) == STEPS and log.keys() <= whole.keys()
    return sum(abs(value - log.get(step, 1e9)) > 1.1e-5 for step, value in whole.items())


# what dies at STOP, or for how many seconds the link is cut; and how the agents were started
RESTARTS, AGAIN = {"restarts": 3}, {"again": True}
CASES = {
    "nothing": ("", {}),
    "worker 0": ("worker 0", RESTARTS),
    "worker 1": ("worker 1", RESTARTS),
    "worker 0, again": ("worker 0", AGAIN),
    "worker 1, again": ("worker 1", AGAIN),
    "agent 0, again": ("agent 0", AGAIN),
    "agent 1, again": ("agent 1", AGAIN),
    "agent 1, both": ("agent 1", RESTARTS | AGAIN),
    "cut 40 s": ("cut 40", RESTARTS),
    "cut 40 s, again": ("cut 40", AGAIN),
    "cut 120 s": ("cut 120", RESTARTS),
    "cut 120 s, again": ("cut 120", AGAIN),
    "cut for good": ("cut 1800", {}),
    "cut for good, 8 retries": ("cut 1800", {"retries": 8}),
    "cut 300 s, again, 8 retries": ("cut 300", AGAIN | {"retries": 8}),
}


def run_case(what, options, limit=1800):
    """Returns (exit codes, None where an agent had to be killed; seconds from what happened to the end; how many losses
    differ)."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings(Path(folder))
        with TwoHosts(folder, config) as hosts:
            for i in range(2):
                hosts.start(i, **options)
            hosts.wait_for(rf"step +{STOP}/")
            start = time.monotonic()
            kind, _, number = what.partition(" ")
            if kind == "cut":
                hosts.cut()
                hosts.wait(int(number))
                hosts.mend()
            elif what:
                hosts.kill(int(number), kind)
            codes = hosts.wait(limit)
            seconds = time.monotonic() - start
        return codes, seconds, compare(config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--times", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for case in args.cases:
        for _ in range(args.times):
            codes, seconds, wrong = run_case(*CASES[case])
            print(f"{case:28} exit codes {codes}, {seconds:4.0f} s, losses that differ {wrong} of {STEPS}", flush=True)
