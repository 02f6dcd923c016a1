"""Printing that cannot spoil finished work: what a pipe, a disk or an encoding does not take is stored all the same."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Forgiving:
    """A stream that goes on where the one behind it fails; the first failure is told to ``complain``."""

    def __init__(self, stream: Any, complain: Any) -> None:
        self._stream, self._complain, self._broken = stream, complain, False

    def write(self, text: str) -> int:
        if not self._broken:
            try:
                self._stream.write(text)
                self._stream.flush()
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                return self.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError) as error:  # a closed stream is a ValueError
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        if not self._broken:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        with contextlib.suppress(OSError, ValueError):  # else Python fails once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        if not isinstance(error, BrokenPipeError):  # whoever closed the pipe has seen enough
            self._complain(
                f"cannot print ({getattr(error, 'strerror', None) or error}); what is left is stored only"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def forgiving() -> Iterator[None]:
    """Within: printing to stdout and stderr never fails."""
    before = sys.stdout, sys.stderr
    errors = _Forgiving(sys.stderr, lambda said: None)
    sys.stderr = errors
    sys.stdout = _Forgiving(sys.stdout, lambda said: errors.write(f"Note: {said}.\n"))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
