"""
Train, with 80 MB for each rehearsal on rank 1 beyond what it has then: larger allocations really fail. A micro-batch of
256 needs 200 to 250 MB, one of 32 needs 50.
"""

import os
import re
import resource
from pathlib import Path

import train_gpt2
from lib.model import rehearsal

try_step, (soft, hard) = rehearsal.try_step, resource.getrlimit(resource.RLIMIT_AS)


def limited(*args):
    now = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_AS, (now + (80 << 20), hard))
    try:
        try_step(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


rehearsal.try_step = limited
train_gpt2.run_as_command(train_gpt2.main, train_gpt2.parse_args())
