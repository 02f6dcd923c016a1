"""What the commands share: options, settings that a resumed run gives back, progress, text tables.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import csv
import functools
import io
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from srd_lab.types import SrdLabError

INFRASTRUCTURE = (
    "track",
    "tracking_uri",
    "out",
    "resume",
    "debug",
    "device",
)  # how, not what: free to differ on resume
DEFAULT_MODEL = "vgg16"


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that runs a model over data and tracks the result."""
    options = (
        click.option(
            "--data", default="scenes", show_default=True, help="scenes, or imagenet:DIR (folders by wnid)."
        ),
        click.option(
            "--weights",
            type=click.Path(exists=True, dir_okay=False),
            help="State dict, .pth or .npz. [default: bundled for scenes, else torchvision's]",
        ),
        click.option(
            "--seed",
            default=0,
            show_default=True,
            type=click.IntRange(0),
            help="Decides everything that is drawn.",
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            help="cpu, cuda, cuda:1, mps; auto takes the first it finds.",
        ),
        click.option("--track/--no-track", default=True, show_default=True, help="Log to MLflow."),
        click.option(
            "--tracking-uri", help="MLflow store. [default: $MLFLOW_TRACKING_URI, else ./mlflow.db]"
        ),
        click.option(
            "--out",
            type=click.Path(file_okay=False, path_type=Path),
            help="With --no-track: folder for tables and figures.",
        ),
        click.option(
            "--resume", metavar="RUN_ID", help="Go on with a run that was interrupted; its settings apply."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def given_settings(ctx: click.Context) -> dict[str, Any]:
    """The settings typed by the user (not defaults), those of INFRASTRUCTURE left out."""
    source = click.core.ParameterSource.COMMANDLINE
    return {
        name: as_setting(value)
        for name, value in ctx.params.items()
        if name not in INFRASTRUCTURE and ctx.get_parameter_source(name) is source
    }


def all_settings(ctx: click.Context) -> dict[str, Any]:
    """Every setting, as it is stored with the run; what is unset is the empty string."""
    return {name: as_setting(value) for name, value in ctx.params.items() if name not in INFRASTRUCTURE}


def as_setting(value: Any) -> Any:
    """A setting as a run stores it."""
    if value is None:
        return ""
    return ",".join(str(v) for v in value) if isinstance(value, tuple) else value


def stored_settings(ctx: click.Context, stored: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a stored run, in the types of the command's options."""
    values = dict(ctx.params)
    for option in ctx.command.params:
        name = option.name or ""
        if name in INFRASTRUCTURE or name not in stored:
            continue
        text = stored[name]
        raw: Any = None if text == "" else text
        if getattr(option, "multiple", False):
            raw = text.split(",") if text else ()
        values[name] = option.type_cast_value(ctx, raw)
    return values


def command_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """One clear line and exit code 1 for a failure; the traceback with --debug. SIGTERM ends a run as Ctrl-C does."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        debug = click.get_current_context().find_root().params.get("debug", False)
        with _terminated_like_interrupted():
            try:
                return function(*args, **kwargs)
            except SrdLabError as error:
                if debug:
                    raise
                raise click.ClickException(str(error)) from None
            except KeyboardInterrupt:
                if debug:
                    raise
                raise click.ClickException("interrupted") from None
            except (MemoryError, OSError, RuntimeError, ImportError) as error:
                if debug:
                    raise
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise click.ClickException(f"{line} ({type(error).__name__}; --debug shows where)") from None

    return wrapped


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, silent where that is not a terminal; yields ``advance(n)``."""
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
        yield bar.update


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of left-aligned first and right-aligned other columns."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start
