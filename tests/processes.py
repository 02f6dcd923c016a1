"""Copies of this process: whoever needs a process of its own with all that is imported here starts in a moment."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import pytest

needs_copies = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="needs processes that are copies of this one"
)


def in_a_copy(work: Callable[[], bool]) -> int:
    """Start a copy of this process that does some work and is gone: with 0 if it went well, else 1. Its number."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return child


def status_of(child: int) -> int:
    """How it ended, once it has: its exit status, or less than zero for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
