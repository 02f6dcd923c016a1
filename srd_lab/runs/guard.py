"""A command that ends when the process that asked for it does, also when that one is killed.

``python -m srd_lab.runs.guard PARENT COMMAND...`` runs the command in a process group of its own and ends the whole group
once the process PARENT is no longer this one's parent, or this one is told to end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

LOOKS_EVERY = 0.5  # seconds
PATIENCE = 10.0  # seconds between asking a group to end and ending it


def guarded(command: Sequence[str]) -> list[str]:
    """The command line that runs ``command`` for as long as this process lives; ``command`` itself where there are no
    process groups (Windows)."""
    if not hasattr(os, "killpg"):
        return list(command)
    return [sys.executable, "-m", "srd_lab.runs.guard", str(os.getpid()), *command]


def run(parent: int, command: Sequence[str]) -> int:
    """Run the command while ``parent`` is the parent of this process; its exit status, 0 where it was ended."""
    told = threading.Event()
    for end in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C comes from the terminal and from the parent
        signal.signal(end, lambda *_: told.set())
    process = subprocess.Popen(command, start_new_session=True)
    try:
        while process.poll() is None and os.getppid() == parent and not told.wait(LOOKS_EVERY):
            pass
        return process.returncode or 0
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it has started."""
    for end in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, end)
            process.wait(PATIENCE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), sys.argv[2:]))
