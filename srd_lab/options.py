"""What the commands share: options, settings that a resumed run gives back, progress, text tables.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import click

from srd_lab.catalogue import FIGURE_4
from srd_lab.types import SrdLabError

# how, not what: free to differ on resume
INFRASTRUCTURE = ("track", "tracking_uri", "out", "resume", "debug", "device", "workers")
DEFAULT_MODEL = "vgg16"
ATTACKED = FIGURE_4  # what "all" means to an attack
DATA = "scenes, or SOURCE:PATH with SOURCE imagenet, imagenet-s, imagefolder, cifar10, cifar100 or voc."


class WeightsFile(click.ParamType):
    """``FILE``, or ``NAME=FILE`` for the model of that name; stays as it was typed."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not _named_file(text)[1].is_file():
            self.fail(f"there is no file {_named_file(text)[1]}; expected FILE or NAME=FILE", param, ctx)
        return text


class Count(click.ParamType):
    """How many: a number from 1 on, or ``all``."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value)
        if text == "all":
            return text
        if not text.isdecimal() or int(text) < 1:
            self.fail(f"{text!r} is not how many; expected a number from 1 on, or all", param, ctx)
        return int(text)


class Names(click.ParamType):
    """Some of the names that are allowed, separated by commas, as a tuple without repetitions."""

    name = "list"

    def __init__(self, allowed: Sequence[str]) -> None:
        self.allowed = allowed

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        names = value if isinstance(value, tuple) else tuple(part.strip() for part in value.split(","))
        if wrong := [name for name in names if name not in self.allowed]:
            self.fail(f"{wrong[0]!r} is not one of {', '.join(self.allowed)}", param, ctx)
        return tuple(dict.fromkeys(names))


def _named_file(text: str) -> tuple[str, Path]:
    """The model's name ("" where none is said) and the file."""
    if "=" not in text or Path(text).is_file():
        return "", Path(text)
    name, _, file = text.partition("=")
    return name, Path(file)


def weights_of(given: Sequence[str], models: Sequence[str]) -> dict[str, Path | None]:
    """The weights file of every model, None where none was given (its default weights)."""
    files: dict[str, Path | None] = dict.fromkeys(models)
    for text in given:
        name, file = _named_file(text)
        if not name and len(models) > 1:
            raise SrdLabError(
                f"--weights {text} does not say which of {len(models)} models it is for; give NAME={text}"
            )
        if name and name not in files:
            raise SrdLabError(
                f"--weights {text} is for a model that is not asked for; the models are {', '.join(models)}"
            )
        if files[name or models[0]]:
            raise SrdLabError(f"two --weights files for {name or models[0]}; give one")
        files[name or models[0]] = file
    return files


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that runs a model over data and tracks the result."""
    options = (
        click.option("--data", default="scenes", show_default=True, help=DATA),
        click.option(
            "--weights",
            multiple=True,
            type=WeightsFile(),
            help="State dict (.pth, .safetensors, .npz): FILE, or NAME=FILE for one of several models; repeatable. "
            "[default: bundled for scenes, else torchvision's IMAGENET1K_V1]",
        ),
        click.option(
            "--non-rgb",
            type=click.Choice(["skip", "convert"]),
            default="skip",
            show_default=True,
            help="Images that are grey, CMYK or the like.",
        ),
        click.option(
            "--workers",
            type=click.IntRange(0),
            help="Processes that decode images; 0 = none. [default: by data and cores]",
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


def subject(settings: Mapping[str, Any], name: str, models: Sequence[str], device: Any) -> tuple[Any, Any]:
    """The network ``name``, one of ``models``, and the data at the size that it is made for, as the settings have them."""
    from srd_lab.data import load_data
    from srd_lab.models import check_classes, input_size, load_model

    data = settings["data"]
    weights = weights_of(settings["weights"], models)[name]
    size = input_size(name, data)
    dataset = load_data(data, seed=settings["seed"], size=size, non_rgb=settings["non_rgb"])
    model = load_model(name, data, weights, str(device))
    check_classes(model, dataset)
    return model, dataset


def given_settings(ctx: click.Context) -> dict[str, Any]:
    """The settings typed by the user (not defaults), those of INFRASTRUCTURE left out."""
    source = click.core.ParameterSource.COMMANDLINE
    return {
        name: as_setting(value)
        for name, value in ctx.params.items()
        if name not in INFRASTRUCTURE and ctx.get_parameter_source(name) is source
    }


def as_setting(value: Any) -> Any:
    """A setting as a run stores it; what is unset is the empty string."""
    if value is None:
        return ""
    if not isinstance(value, tuple):
        return value
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(value)  # quotes what holds a comma
    return line.getvalue()


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
            raw = next(csv.reader([text]), ())
        values[name] = option.type_cast_value(ctx, raw)
    return values


def finished_batches(run: Any, settings: Mapping[str, Any]) -> set[str]:
    """What an interrupted run left to go on from; never what another run left in the folder of ``--out``."""
    return set(run.list("batches")) if settings["resume"] else set()


class Study(Protocol):
    """What a command does: made from its settings (and so checked) before a run is opened for it."""

    settings: dict[str, Any]
    device: Any

    def run(self, run: Any) -> None: ...


def tracked(
    ctx: click.Context, command: str, subject: str, study_of: Callable[[dict[str, Any]], Study]
) -> None:
    """Make the study that the options describe, or that ``--resume`` names, and run it under tracking.

    Wrong settings leave no run behind. Stored with the run: every setting, the environment, the device and the
    weights file's hash.
    """
    from srd_lab import tracking
    from srd_lab.runtime import full_precision, keep_freed_memory

    keep_freed_memory()
    full_precision()
    resume = ctx.params["resume"]
    study = None if resume else study_of(dict(ctx.params))
    run = tracking.open_run(
        command,
        f"{command} {subject}",
        given_settings(ctx) if study is None else _record(ctx, study),
        track=ctx.params["track"],
        tracking_uri=ctx.params["tracking_uri"],
        out=ctx.params["out"],
        resume=resume,
    )
    try:
        with run:
            study = study or study_of(stored_settings(ctx, run.params))
            study.run(run)
    except KeyboardInterrupt:
        again = f"; go on with: srd-lab {command} --resume {run.id}" if run.id else ""
        raise SrdLabError(f"interrupted; what was finished is stored{again}") from None
    click.echo(f"\n{run.where}")


def _record(ctx: click.Context, study: Study) -> dict[str, Any]:
    from srd_lab.environment import device_name, environment

    settings = {name: as_setting(study.settings[name]) for name in ctx.params if name not in INFRASTRUCTURE}
    record = {**settings, **environment()}
    record |= {"device": study.device, "hardware": device_name(study.device)}
    if given := ctx.params["weights"]:
        files = {text: _named_file(text)[1] for text in given}
        sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files.values()]
        record["weights_sha256"] = ",".join(sums)
    return record


def command_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """One clear line and exit code 1 for a failure; the traceback with --debug.

    SIGTERM and SIGHUP end a run as Ctrl-C does.
    """

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

    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    try:
        before = {end: signal.signal(end, interrupt) for end in ends}
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)


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
