"""Failures of a command: one clear line, and signals that end it as Ctrl-C does."""

from __future__ import annotations

import functools
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from srd_lab.cli.printing import forgiving
from srd_lab.errors import SrdLabError, SrdLabWarning

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
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{line} ({type(error).__name__}; --debug shows where)"


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
