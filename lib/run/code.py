"""Which code a run is of."""

import hashlib
import os
import subprocess

from lib.files import ROOT


def code_version():
    """The commit of this code, with a hash of uncommitted changes and new files; without git, a hash of the files."""
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("lib/**/*.py")])
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:7]
    if not (ROOT / ".git").exists():
        return f"files.{digest}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*command):
        process = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, check=True, env=environment)
        return process.stdout.decode().strip()

    try:
        changed = git("status", "--porcelain", "--", "*.py")
        return git("rev-parse", "HEAD") + (f"+changes.{digest}" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git, no commit yet, or another user's repository
        return f"files.{digest}"


def short(version):
    """abc1234 for a commit; of one with changes, "abc1234 with uncommitted changes 0a1b2c3"."""
    commit, _, mark = str(version).partition("+changes.")
    commit = commit if commit.startswith("files.") else commit[:7]
    return commit + (f" with uncommitted changes {mark}" if mark else "")
