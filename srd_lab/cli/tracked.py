"""What every command does around its work: make its study, run it under tracking, or go on with a stored run.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any, Protocol

import click

from srd_lab.errors import OtherWork
from srd_lab.runs.settings import (
    INFRASTRUCTURE,
    PACE,
    as_setting,
    given_settings,
    stored_settings,
)


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
    from srd_lab.runs import tracking
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
    from srd_lab.runs.environment import device_name, environment

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
