"""``srd-lab merge``: a run of the shares that ``--shard I/N`` did apart."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from srd_lab.cli.errors import command_errors
from srd_lab.cli.tracked import code_named
from srd_lab.errors import BadRun, BadValue

_REST = "srd_lab.cli.shares.rest"


class _HandsOn(click.Command):
    """A command that keeps what is typed behind ``--`` for another."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Of what is typed in front of it; see :class:`click.Command`."""
        end = args.index("--") if "--" in args else len(args)
        ctx.meta[_REST] = args[end + 1 :]
        return super().parse_args(ctx, args[:end])


@click.command(cls=_HandsOn)
@click.argument(
    "folders", nargs=-1, required=True, metavar="DIR...", type=click.Path(file_okay=False, path_type=Path)
)
@click.option("--track/--no-track", default=True, show_default=True, help="Log to MLflow.")
@click.option("--tracking-uri", help="MLflow store. [default: $MLFLOW_TRACKING_URI, else ./mlflow.db]")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for tables and figures; without tracking, of the run.",
)
@click.pass_context
@command_errors
def merge(
    ctx: click.Context, folders: tuple[Path, ...], track: bool, tracking_uri: str | None, out: Path | None
) -> None:
    """Make one run of the shares DIR... that --shard did.

    Every share must be there once, finished, and of the same command and settings. The run has all their batches and is
    ended by the command itself, so that its tables are those of one run. Options behind -- are handed on to that command:
    code of your own that the shares name is named again there (-- --model mine.py:net).
    """
    from srd_lab.runs.shares import join, read_shares
    from srd_lab.runs.tracking import open_run

    if not track and (out is None or tracking_uri):
        raise BadValue("--no-track makes the run in a folder; add --out DIR, and no --tracking-uri")
    shares, rest = read_shares(folders), ctx.meta[_REST]
    first = shares[0]
    for option, text in code_named(first.params).items():
        if option not in rest:
            raise BadRun(
                f"the shares name code, {text}, which is not run for a stored run's sake; name it again at the end: "
                f"-- {option} {shlex.quote(text)}"
            )
    params = {name: text for name, text in first.params.items() if name != "share"}
    command, name = first.about["command"], first.about["name"]
    run = open_run(command, name, params, track=track, tracking_uri=tracking_uri, out=out)
    with run:
        join(shares, run)
        run.interrupt()
    where = ["--no-track"] if not track else [*_given("--tracking-uri", tracking_uri), *_given("--out", out)]
    _go_on(ctx, command, ["--resume", run.id, *where, *rest])


def _given(option: str, value: object) -> list[str]:
    return [] if value is None else [option, str(value)]


def _go_on(ctx: click.Context, command: str, arguments: list[str]) -> None:
    """Call another command of the same program with these arguments."""
    parent: Any = ctx.find_root()
    *groups, last = command.split()
    for word in groups:
        parent = click.Context(parent.command.get_command(parent, word), info_name=word, parent=parent)
    found = parent.command.get_command(parent, last)
    with found.make_context(last, arguments, parent=parent) as own:
        found.invoke(own)
