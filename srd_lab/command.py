"""What every command does around its work: load what the settings name, track the run, say errors in one line, print.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import click

from srd_lab.options import INFRASTRUCTURE, PACE, as_setting, given_settings, stored_settings, weights_of
from srd_lab.types import OtherWork, SrdLabError


def data_for(settings: Mapping[str, Any], name: str) -> Any:
    """The data as the settings have it, at the size that the network ``name`` is made for."""
    from srd_lab.data import load_data
    from srd_lab.models import input_size

    size = input_size(name, settings["data"])
    return load_data(settings["data"], seed=settings["seed"], size=size, non_rgb=settings["non_rgb"])


def network_for(
    settings: Mapping[str, Any], name: str, models: Sequence[str], device: Any, dataset: Any
) -> Any:
    """The network ``name``, one of ``models``, with the weights that the settings have for it, fit for ``dataset``."""
    from srd_lab.models import check_classes, load_model

    model = load_model(name, settings["data"], weights_of(settings["weights"], models)[name], str(device))
    check_classes(model, dataset)
    return model


def checked_networks(
    settings: dict[str, Any], models: Sequence[str], fits: Callable[[str, Any], object] | None = None
) -> Any:
    """The data at the first network's size, after every network was loaded, tried and let go again.

    So what is wrong with the last one shows before the work on the first. ``fits`` may refuse one by an error. The
    settings get ``weights_sha256``.
    """
    dataset = data_for(settings, models[0])
    for name in models:
        model = network_for(settings, name, models, "cpu", dataset)
        if fits:
            fits(name, model)
    settings["weights_sha256"] = weights_sums(settings, models)
    return dataset


def weights_sums(settings: Mapping[str, Any], models: Sequence[str]) -> tuple[str, ...]:
    """``NAME:SHA256`` of every network's weights file, bundled and downloaded ones too."""
    from srd_lab.models import weights_file

    sums = []
    for name, given in weights_of(settings["weights"], models).items():
        with weights_file(name, settings["data"], given).open("rb") as file:
            sums.append(f"{name}:{hashlib.file_digest(file, 'sha256').hexdigest()}")
    return tuple(sums)


class Study(Protocol):
    """What a command does: made from its settings (and so checked) before a run is opened for it.

    settings : the command's, and what else decides the numbers: all that a resumed run has to have in common.
    """

    settings: dict[str, Any]
    device: Any

    def run(self, run: Any) -> None: ...


def tracked(
    ctx: click.Context, command: str, subject: str, study_of: Callable[[dict[str, Any]], Study]
) -> None:
    """Make the study that the options describe, or that ``--resume`` names, and run it under tracking.

    Wrong settings leave no run behind. Stored with the run: every setting, the environment and the device. An error
    is given a note that says what is left of the run.
    """
    from srd_lab import tracking
    from srd_lab.runtime import full_precision, keep_freed_memory

    keep_freed_memory()
    full_precision()
    resume = ctx.params["resume"]
    study = None if resume else study_of(dict(ctx.params))
    if study is None:
        record = given_settings(ctx)
    else:
        record = {**_settings(study), **_surroundings(study)}
    run = tracking.open_run(
        command,
        f"{command} {subject}",
        record,
        track=ctx.params["track"],
        tracking_uri=ctx.params["tracking_uri"],
        out=ctx.params["out"],
        resume=resume,
    )
    try:
        with run:
            if study is None:
                study = study_of(stored_settings(ctx, run.params))
                _check_same(run, study)
                _note_what_changed(run, study)
            study.run(run)
    except OtherWork:
        raise
    except (Exception, KeyboardInterrupt) as error:
        error.add_note(_what_is_left(ctx, command, run))
        raise
    click.echo(f"\n{run.where}")


def _settings(study: Study) -> dict[str, Any]:
    return {name: as_setting(value) for name, value in study.settings.items() if name not in INFRASTRUCTURE}


def _surroundings(study: Study) -> dict[str, Any]:
    """What decides no setting and may yet decide a digit."""
    from srd_lab.environment import device_name, environment

    return {**environment(), "device": study.device, "hardware": device_name(study.device)}


def _check_same(run: Any, study: Study) -> None:
    """Refuse to go on where settings that nobody typed (fixed ones, defaults) or weights have changed since."""
    now, then = study.settings["weights_sha256"], run.params.get("weights_sha256", "").split(",")
    if changed := [entry.partition(":")[0] for entry in now if entry not in then]:
        raise OtherWork(
            f"the weights of {', '.join(changed)} are not those that run {run.id} was made with; "
            "put the file back as it was, or start a new run"
        )
    run.add_params({name: value for name, value in _settings(study).items() if name != PACE})


def _note_what_changed(run: Any, study: Study) -> None:
    """Other code, libraries or hardware than the run began with may go on; the user is told, and the run says so."""
    none = "(none)"
    now = {"git_commit": none} | {name: str(value) for name, value in _surroundings(study).items()}
    then = {name: run.params.get(name, none) for name in now}
    if changed := [f"{name} {then[name]} -> {now[name]}" for name in now if now[name] != then[name]]:
        line = f"resumed with {', '.join(changed)}: what was stored before is of the former, the rest of the latter"
        click.echo(f"Note: {line}.", err=True)
        earlier = run.load_text("resumed.txt") if "resumed.txt" in run.list() else ""
        run.save_text("resumed.txt", f"{earlier}{line}\n")


def _what_is_left(ctx: click.Context, command: str, run: Any) -> str:
    if not run.id:
        return str(run.where)
    uri = ctx.params["tracking_uri"]
    place = f" --tracking-uri {shlex.quote(uri)}" if uri else ""
    return f"what was finished is stored; go on with: srd-lab {command} --resume {run.id}{place}"


_SAID_IN_A_LINE = (SrdLabError, KeyboardInterrupt, MemoryError, OSError, RuntimeError, ImportError)


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


def publish(run: Any, text: str, seconds: float) -> None:
    """Print a study's summary; store it, and the ``seconds`` that its batches took in all sessions."""
    run.save_text("summary.txt", text + "\n")
    run.log_metrics({"seconds": seconds})
    click.echo(text)
