"""Failures of a command: one clear line, and signals that end it as Ctrl-C does."""

from __future__ import annotations

import functools
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import click

from srd_lab.cli.printing import forgiving
from srd_lab.errors import SrdLabError, SrdLabWarning, first_line

_SAID_IN_A_LINE = (SrdLabError, KeyboardInterrupt, MemoryError, OSError, RuntimeError, ImportError)


def command_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """One clear line and exit code 1 for a failure; the traceback with --debug.

    SIGTERM and SIGHUP end a run as Ctrl-C does.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        debug = click.get_current_context().find_root().params.get("debug", False)
        with forgiving(), _terminated_like_interrupted(), _warnings_in_a_line():
            try:
                return function(*args, **kwargs)
            except _SAID_IN_A_LINE as error:
                if debug:
                    raise
                said = "; ".join([_in_a_line(error), *getattr(error, "__notes__", ())])
                raise click.ClickException(said) from None

    return wrapped


def _in_a_line(error: BaseException) -> str:
    if isinstance(error, SrdLabError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{first_line(error)} ({type(error).__name__}; --debug shows where)"


class Notes:
    """What the user is told beside the results, for the run to keep; a context manager that hears it while it is open.

    Example
    -------
    ::

        with Notes() as notes:
            study = ...  # what is said before there is a run is kept, too
            with open_run(...) as run:
                notes.keep_in(run)
    """

    FILE = "notes.txt"

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._run: Any = None

    def __enter__(self) -> Self:
        self._shown = warnings.showwarning
        warnings.showwarning = self._hear
        return self

    def __exit__(self, *error: object) -> None:
        warnings.showwarning = self._shown

    def keep_in(self, run: Any) -> None:
        """Write what was said so far, and from now on whatever is said, into ``notes.txt`` of ``run``."""
        if self.FILE in run.list():  # of an earlier session
            self._lines = run.load_text(self.FILE).splitlines() + self._lines
        self._run = run
        self._write()

    def say(self, line: str) -> None:
        """Print a line as a note, and keep it."""
        click.echo(f"Note: {line}", err=True)
        self._add(line)

    def _hear(self, message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        self._shown(message, category, *where, **more)
        if issubclass(category, SrdLabWarning):
            self._add(str(message))

    def _add(self, line: str) -> None:
        if line not in self._lines:
            self._lines.append(line)
            self._write()

    def _write(self) -> None:
        if self._run is not None and self._lines:
            with suppress(SrdLabError):  # a store in trouble says so at the next result
                self._run.save_text(self.FILE, "\n".join(self._lines) + "\n")


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """What the user should know is said once, as a note."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, SrdLabWarning):
            click.echo(f"Note: {message}", err=True)
        else:
            plain(message, category, *where, **more)

    with warnings.catch_warnings():
        plain = warnings.showwarning
        warnings.filterwarnings("once", category=SrdLabWarning)
        warnings.showwarning = show
        yield


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # What is ignored stays ignored (nohup); None is a handler that Python cannot put back.
    heard = [end for end in ends if signal.getsignal(end) not in (signal.SIG_IGN, None)]
    try:
        before = {end: signal.signal(end, interrupt) for end in heard}
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)
