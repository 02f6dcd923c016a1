"""``srd-lab runs``, ``compare``, ``report``, ``export`` and ``ui``: what has been stored, side by side, and to send."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from srd_lab.cli.errors import command_errors
from srd_lab.cli.options import figure_format_option, json_option, tracking_uri_option, whole
from srd_lab.cli.tracked import command_line
from srd_lab.errors import BadRun
from srd_lab.runs.label import HEADLINES
from srd_lab.runs.report import text_table

if TYPE_CHECKING:
    from srd_lab.runs.html_report import Joint
    from srd_lab.runs.reading import StoredRun

FORMATS = ("csv", "json", "latex", "markdown", "config")
out_option = click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write; none is overwritten."
)


def runs_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """One or more runs."""
    return click.argument("references", nargs=-1, required=True, metavar="RUN...")(command)


@click.command("runs")
@click.option(
    "--command", default="", help="Only those of this command, such as attack or 'reproduce table1'."
)
@click.option("--limit", default=20, show_default=True, type=whole(1), help="The newest so many.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, with all settings and metrics.")
@tracking_uri_option
@command_errors
def list_(command: str, limit: int, as_json: bool, tracking_uri: str | None) -> None:
    """List the runs that were stored, the newest first."""
    from srd_lab.runs.reading import list_runs

    found = list_runs(tracking_uri, command, limit)
    if as_json:
        click.echo(json.dumps([_row(run) for run in found], indent=1, ensure_ascii=False))
        return
    if not found:
        click.echo(f"no runs{f' of {command}' if command else ''} yet")
        return
    rows = [
        [
            *(run.short, run.command, run.name, f"{run.started:%Y-%m-%d %H:%M}" if run.started else "-"),
            *(run.status.lower(), _headline(run)),
        ]
        for run in found
    ]
    click.echo(text_table(["run", "command", "of", "made", "status", "score"], rows))


def _row(run: StoredRun) -> dict[str, Any]:
    return {
        "run": run.id,
        "command": run.command,
        "name": run.name,
        "made": run.started.isoformat() if run.started else None,
        "status": run.status,
        "settings": dict(run.params),
        "metrics": dict(run.metrics),
    }


def _headline(run: StoredRun) -> str:
    """The score that stands for a run: the one stored as such; of an older version that of the method asked for first."""
    if said := run.tags.get("headline"):
        return said
    asked = run.params.get("methods", "").split(",")
    for score in (*HEADLINES, *run.params.get("metrics", "").split(",")):
        if score in run.metrics:
            return f"{score} {run.metrics[score]:.3f}"
        own = [
            name.rpartition("/")[0]
            for name in run.metrics
            if name.endswith(f"/{score}") and "/over_" not in name
        ]
        if own:
            place = {
                name: k for name in own for k, method in enumerate(asked[::-1], 1) if name.startswith(method)
            }
            first, n = max(own, key=lambda name: place.get(name, 0)), len(own) - 1
            more = f" (and {n} other{'s' if n > 1 else ''})" if n else ""
            return f"{first} {score} {run.metrics[f'{first}/{score}']:.3f}{more}"
    return "-"


@click.command()
@runs_argument
@click.option(
    "--reference", default="", metavar="NAME", help="What the others are held against. [default: the first]"
)
@click.option(
    "--score",
    "scores",
    multiple=True,
    metavar="NAME",
    help="Only this one; repeatable. [default: all shared]",
)
@click.option("--seed", default=0, show_default=True, type=whole(0, 2**63 - 1), help="Of the bootstrap.")
@click.option("--track/--no-track", default=True, show_default=True, help="Log the comparison to MLflow.")
@tracking_uri_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for table and figure too. [default: none]",
)
@figure_format_option
@json_option
@command_errors
def compare(
    references: tuple[str, ...],
    reference: str,
    scores: tuple[str, ...],
    seed: int,
    track: bool,
    tracking_uri: str | None,
    out: Path | None,
    figure_formats: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compare runs, paired where the images are the same.

    With intervals and corrected tests. RUN is an id, the beginning of one, or the folder of a run without tracking. One
    run of several methods compares these.
    """
    from srd_lab.evaluation.comparing import Comparing
    from srd_lab.runs.reading import find_run
    from srd_lab.runs.settings import as_text
    from srd_lab.runs.tracking import open_run

    found = [find_run(name, tracking_uri) for name in references]
    comparing = Comparing(found, reference, scores, seed)
    settings = {
        "runs": as_text(tuple(run.id for run in found)),
        "reference": comparing.reference.name,
        "scores": as_text(tuple(comparing.scores)),
        "seed": seed,
    }
    with open_run(
        "compare", comparing.name, settings, track=track, tracking_uri=tracking_uri, out=out
    ) as run:
        run.save_text("command.txt", f"{command_line(click.get_current_context(), 'compare', references)}\n")
        run.store_figures_as(figure_formats)
        with contextlib.redirect_stdout(io.StringIO()) if as_json else contextlib.nullcontext():
            held = comparing.run(run)
    if as_json:
        click.echo(json.dumps({"run": run.id, "comparisons": [_finite(vars(one)) for one in held]}, indent=1))
        return
    click.echo(f"\n{run.where}")


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for JSON, which has no NaN."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}


@click.command()
@runs_argument
@out_option
@click.option("--title", default="", help="Of the page. [default: what the runs are of]")
@tracking_uri_option
@command_errors
def report(references: tuple[str, ...], out: Path | None, title: str, tracking_uri: str | None) -> None:
    """Write one HTML file to send and print.

    Tables, figures, settings, how to read it, what the words mean; of several runs first how they compare. Of a single run
    it is stored with the run as well, where the MLflow UI shows it (Artifacts, report.html).
    """
    from srd_lab.evaluation.outputs import first_free, refuse_taken, write_new
    from srd_lab.runs.html_report import html_report
    from srd_lab.runs.reading import find_run

    if out is not None:
        refuse_taken([out])
    found = [find_run(name, tracking_uri) for name in references]
    page = html_report(found, title, _joint(found)).encode()
    file = out or _html(
        first_free(f"report-{'-'.join(_file_name(run) for run in found)}"[:80], lambda p: [_html(p)])
    )
    write_new(file, page)
    if len(found) == 1:
        found[0].files.write("report.html", page)
    click.echo(f"written: {file}")


def _joint(runs: Sequence[StoredRun]) -> Joint | None:
    """How several runs compare; None of one, and where they cannot be compared, which is said."""
    from srd_lab.evaluation.comparing import Comparing
    from srd_lab.render import figure_bytes
    from srd_lab.runs.html_report import Joint

    if len(runs) < 2:
        return None
    try:
        comparing = Comparing(runs)
        return Joint(comparing.document(comparing.held()), figure_bytes(comparing.figure()))
    except BadRun as error:
        click.echo(f"Note: the runs are not compared: {error}", err=True)
        return None


def _html(place: Path) -> Path:
    return place.with_name(f"{place.name}.html")


def _file_name(run: StoredRun) -> str:
    return Path(run.short).name


@click.command()
@click.argument("reference", metavar="RUN")
@click.option(
    "--to",
    "kind",
    required=True,
    type=click.Choice(FORMATS),
    help="csv: the scores of every image; latex, markdown: the report; json: everything; config: its options, for --config.",
)
@out_option
@tracking_uri_option
@command_errors
def export(reference: str, kind: str, out: Path | None, tracking_uri: str | None) -> None:
    """Print what a RUN has found, for a program or a paper."""
    from srd_lab.evaluation.outputs import refuse_taken, write_new
    from srd_lab.runs.outcome import scores_text
    from srd_lab.runs.reading import as_json, find_run

    if out is not None:
        refuse_taken([out])
    run = find_run(reference, tracking_uri)
    if kind == "csv":
        text = scores_text(*run.scores())
    elif kind == "json":
        text = json.dumps(as_json(run), indent=1, ensure_ascii=False) + "\n"
    elif kind == "config":
        text = run.load_text("run.toml")
    else:
        text = (run.document().latex() if kind == "latex" else run.document().markdown()) + "\n"
    if out is None:
        click.echo(text, nl=False)
    else:
        write_new(out, text.encode())
        click.echo(f"written: {out}")


@click.command()
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option(
    "--open/--no-open",
    "browse",
    default=True,
    show_default=True,
    help="Open a browser, where there is a screen.",
)
@tracking_uri_option
@command_errors
def ui(port: int, host: str, browse: bool, tracking_uri: str | None) -> None:
    """Open MLflow's page on the runs made here.

    It shows the command that was run last, with scores and settings as columns of the list.
    """
    from srd_lab.runs.page import launch_ui

    launch_ui(tracking_uri, port, host, browse=browse)
