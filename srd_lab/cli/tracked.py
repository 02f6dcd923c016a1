"""What every command does around its work: make its study, run it under tracking, or go on with a stored run.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click

from srd_lab.cli.config import OUTSIDE, as_given, config_text, options_of
from srd_lab.cli.errors import Notes
from srd_lab.errors import BadValue, OtherWork
from srd_lab.parts import code_in, code_of
from srd_lab.runs.addresses import shown
from srd_lab.runs.label import Drawn, Label, label_of
from srd_lab.runs.settings import PACE, S, Settings, as_text, read_stored

_NAMES = ("model", "models", "data", "methods", "metrics")  # settings that may name parts of the user's own
_OPTIONS = {"models": "model"}  # where an option is spelled in another way
_OF_ONE_SIZE = ("scenes", "cifar10", "cifar100")  # data of which nothing is resized
_RESIZED_BEFORE = (0.875, "bilinear")  # in runs that do not say
FREE = tuple(f.name for f in dataclasses.fields(Settings) if f.metadata)


@dataclass(frozen=True)
class Given:
    """Where a study's settings come from: the options of a command, and the stored run that it goes on with, if any."""

    options: Mapping[str, Any]
    stored: Mapping[str, str] | None = None

    def read(self, kind: type[S], **fixed: Any) -> S:
        """Settings of this kind: what is stored, else what the command fixes, else what the options say."""
        names = {f.name for f in dataclasses.fields(kind)}
        values = {name: value for name, value in {**self.options, **fixed}.items() if name in names}
        values["resumed"] = self.stored is not None
        if self.stored is None:
            return kind(**values)
        stored = dict(self.stored)
        values["share"] = _same_share(values.get("share"), stored.get("share"))
        if self.options.get(PACE):
            stored.pop(PACE, None)
        return read_stored(kind, stored, values)


def _same_share(asked: str | None, stored: str | None) -> str | None:
    if asked not in (None, stored):
        raise OtherWork(f"the stored run is {f'share {stored}' if stored else 'no share'}; leave --shard out")
    return stored


class Study(Protocol):
    """What a command does: made from its settings (and so checked) before a run is opened for it.

    weights_sha256 : ``NAME:SHA256`` of every network. drawn : the images that it uses.
    """

    @property
    def settings(self) -> Settings: ...

    weights_sha256: tuple[str, ...]
    device: Any
    drawn: Drawn

    def run(self, run: Any) -> None: ...


def tracked(ctx: click.Context, command: str, study_of: Callable[[Given], Study]) -> None:
    """Make the study that the options describe, or that ``--resume`` names, and run it under tracking.

    Wrong settings leave no run behind. Stored with the run: every setting, the environment and the device. An error
    is given a note that says what is left of the run.
    """
    from srd_lab.runs import tracking
    from srd_lab.runs.executors import connected
    from srd_lab.runtime import full_precision, keep_freed_memory

    _check_options(ctx.params)
    keep_freed_memory()
    full_precision()
    _set_threads(ctx.params["threads"], ctx.params["executor"])
    resume, as_json = ctx.params["resume"], ctx.params["as_json"]
    with Notes() as notes, connected(ctx.params["executor"], ctx.params["ray_address"]):
        study = None if resume else _divisible(study_of(Given(ctx.params)))
        name = command if study is None else _label(study).name
        record = (
            typed(ctx) if study is None else {**_decisive(study), **_surroundings(study), **_share(study)}
        )
        run = tracking.open_run(
            command,
            name,
            record,
            track=ctx.params["track"],
            tracking_uri=ctx.params["tracking_uri"],
            out=ctx.params["out"],
            resume=resume,
        )
        try:
            with run:
                if study is None:
                    _check_whole(run)
                    _check_named_again(run, record)
                    study = _divisible(study_of(Given(ctx.params, run.params)))
                    _check_same(run, study)
                    _note_what_changed(run, study, notes)
                else:
                    run.save_text("command.txt", f"{command_line(ctx, command)}\n")
                    run.save_text("run.toml", config_text(ctx, command))
                notes.keep_in(run)
                if labels := study.settings.labels:
                    run.save_bytes(f"labels{Path(labels).suffix}", Path(labels).expanduser().read_bytes())
                run.describe(_label(study))
                run.store_figures_as(study.settings.figure_formats)
                with contextlib.redirect_stdout(io.StringIO()) if as_json else contextlib.nullcontext():
                    _work(study, run)
                found = _found(run) if as_json else ""
        except OtherWork:
            raise
        except (Exception, KeyboardInterrupt) as error:
            error.add_note(_what_is_left(ctx, command, run))
            raise
    click.echo(found if as_json else "\n".join(["", run.where, *_entries(ctx, run)]))


def _entries(ctx: click.Context, run: Any) -> list[str]:
    """Where the entries of a run are, and what takes them; nothing where it has none."""
    if not run.id or run.params.get("entries") != "True":
        return []
    uri, out = ctx.params["tracking_uri"], ctx.params["out"]
    place = shlex.quote(str(out)) if out else run.id[:8] if ctx.params["track"] else shlex.quote(run.id)
    store = f" --tracking-uri {shlex.quote(shown(uri))}" if uri and not out else ""
    files = (
        f"{place}/*/entry.json" if out or not ctx.params["track"] else "--out DIR puts their files into DIR"
    )
    own = " --run-code" if any(code_in(run.params.get(name, "")) for name in _NAMES) else ""
    return [
        f"its entries: `srd-lab verify {place}{own}{store}` recomputes them, "
        f"`srd-lab leaderboard {place}{store}` makes a table of them ({files})"
    ]


def _set_threads(count: int | None, executor: str) -> None:
    """Threads of PyTorch in this process; beside a cluster those of its workers, so that all sums are rounded alike."""
    import torch

    if count or executor == "ray":
        torch.set_num_threads(count or 1)


def _divisible(study: Study) -> Study:
    """The study. Raises BadValue where a share of it is asked for, and its work is not done in batches."""
    if study.settings.share and not hasattr(study, "stages"):
        raise BadValue(
            f"--shard {study.settings.share} does a share of the batches, and this work has none; leave --shard out"
        )
    return study


def _work(study: Any, run: Any) -> None:
    """Do what the study does, or the share of it that was asked for."""
    share = study.settings.share
    if not share:
        study.run(run)
        return
    from srd_lab.runs.shares import do_share

    count = do_share(study, run)
    click.echo(
        f"share {share}: {count} batches, and no report; srd-lab merge DIR... takes the folders of all shares"
    )


def _found(run: Any) -> str:
    """What a run has found, as JSON."""
    from srd_lab.runs.outcome import content

    about = {"run": run.id, "settings": dict(run.params)}
    return json.dumps(about | content(run.list(), run.load_text), indent=1, ensure_ascii=False)


def command_line(ctx: click.Context, command: str, arguments: Sequence[str] = ()) -> str:
    """The command to be run again: what was typed, or stands in a file of options and is no default.

    arguments : that stand before the options.
    """
    parts = ["srd-lab", *command.split(), *arguments]
    for option in options_of(ctx.command):
        value, source = as_given(ctx, option), ctx.get_parameter_source(option.name or "")
        in_file = source is click.core.ParameterSource.DEFAULT_MAP and _differs(value, option.default)
        if source is not click.core.ParameterSource.COMMANDLINE and not in_file:
            continue
        if isinstance(value, bool):
            parts += (option.opts if value else option.secondary_opts)[:1]
        elif option.multiple:
            parts += [part for one in value for part in (option.opts[0], str(one))]
        elif option.nargs > 1:
            parts += [option.opts[0], *map(str, value)]
        else:
            parts += [option.opts[0], ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(parts)


def _differs(value: Any, default: Any) -> bool:
    return bool(value != (tuple(default) if isinstance(default, list) else default))


def _label(study: Study) -> Label:
    label = label_of(study.settings, study.device, study.drawn)
    weights = {
        "weights_sha256": as_text(study.weights_sha256)
    }  # the device, which may change on resume, is a tag
    return dataclasses.replace(label, settings=label.settings | weights)


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that contradict each other, or that an empty variable of a script has made."""
    for name in ("resume", "tracking_uri"):
        if options[name] is not None and not options[name].strip():
            raise BadValue(f"--{name.replace('_', '-')} is empty; leave it out, or say which")
    if options["tracking_uri"] and not options["track"]:
        raise BadValue("--tracking-uri says where to track and --no-track not to; leave one of them out")
    if options["share"] and (options["track"] or not (options["out"] or options["resume"])):
        raise BadValue(
            f"--shard {options['share']} is stored in a folder of its own; add --no-track --out DIR"
        )
    if options["share"] and options["as_json"]:
        raise BadValue("--json prints what was found, and a share makes no report; leave --json out")


def typed(ctx: click.Context) -> dict[str, str]:
    """The settings typed by the user (not defaults), less those that are free to differ on resume."""
    source = click.core.ParameterSource.COMMANDLINE
    return {
        name: as_text(value)
        for name, value in ctx.params.items()
        if name not in (*OUTSIDE, *FREE, PACE) and ctx.get_parameter_source(name) is source
    }


def _decisive(study: Study) -> dict[str, str]:
    from srd_lab.runs.inputs import preprocessing_for

    networks = [entry.rpartition(":")[0] for entry in study.weights_sha256]
    wants = tuple(f"{name}: {preprocessing_for(study.settings, name)}" for name in networks)
    labels = study.settings.labels
    names = Path(labels).expanduser().read_bytes() if labels else b""
    return study.settings.stored() | {
        "weights_sha256": as_text(study.weights_sha256),
        "preprocessing": as_text(wants),
        **({"labels_sha256": hashlib.sha256(names).hexdigest()} if labels else {}),
    }


def _surroundings(study: Study) -> dict[str, Any]:
    """What decides no setting and may yet decide a digit."""
    from srd_lab.runs.environment import device_name, environment

    names = " ".join(study.settings.stored().get(name, "") for name in _NAMES)
    code = {"own_code": ", ".join(f"{place} {digits[:12]}" for place, digits in code_of(names).items())}
    surroundings = {**environment(), "device": study.device, "hardware": device_name(study.device)}
    return surroundings | {name: value for name, value in code.items() if value}


def _share(study: Study) -> dict[str, str]:
    return {"share": study.settings.share} if study.settings.share else {}


def code_named(params: Mapping[str, str]) -> dict[str, str]:
    """Option -> text, of the stored settings of a run that name code, which is to be named again before it is run."""
    return {f"--{_OPTIONS.get(name, name)}": params[name] for name in _NAMES if code_in(params.get(name, ""))}


def _check_same(run: Any, study: Study) -> None:
    """Refuse to go on where settings that nobody typed (fixed ones, defaults) or weights have changed since."""
    then = next(csv.reader([run.params.get("weights_sha256", "")]), [])
    if changed := [entry.rpartition(":")[0] for entry in study.weights_sha256 if entry not in then]:
        raise OtherWork(
            f"the weights of {', '.join(changed)} are not those that run {run.id} was made with; "
            "put the file back as it was, or start a new run"
        )
    if "preprocessing" not in run.params:
        _check_resized_as_before(run, study)
    decisive = _decisive(study)
    names = "labels_sha256"
    if run.params.get(names) != decisive.get(names):
        raise OtherWork(
            f"the names in {study.settings.labels} are not those that run {run.id} was made with; "
            "put the file back as it was, or start a new run"
        )
    run.add_params({name: value for name, value in decisive.items() if name != PACE})


def _check_resized_as_before(run: Any, study: Study) -> None:
    """Refuse a run that was made when every file was cropped and resized alike, for a network that takes them otherwise."""
    from srd_lab.runs.inputs import preprocessing_for

    if study.settings.source in _OF_ONE_SIZE:
        return
    for entry in study.weights_sha256:
        name = entry.rpartition(":")[0]
        wants = preprocessing_for(study.settings, name)
        if (round(wants.crop, 6), wants.interpolation) != _RESIZED_BEFORE:
            raise OtherWork(
                f"run {run.id} was made before networks had a crop and an interpolation of their own: 0.875, bilinear; "
                f"{name} now takes {wants.crop:.4g} and {wants.interpolation}; start a new run"
            )


def _check_whole(run: Any) -> None:
    """Refuse a run that a kill has left without its settings: the options' defaults would take their place."""
    if "weights_sha256" not in run.params:
        raise OtherWork(f"run {run.id} was interrupted before its settings were stored; start a new run")


def _check_named_again(run: Any, named: Mapping[str, str]) -> None:
    """Refuse to run code because a stored run names it: the run may be a stranger's."""
    for name in _NAMES:
        if name not in named and (code := code_in(run.params.get(name, ""))):
            raise OtherWork(
                f"run {run.id} names code, {', '.join(code)}, which is not run for a stored run's sake; name it again: "
                f"--{_OPTIONS.get(name, name)} {shlex.quote(run.params[name])}"
            )


def _note_what_changed(run: Any, study: Study, notes: Notes) -> None:
    """Other code, libraries or hardware than the run began with may go on; the user is told."""
    none = "(none)"
    now = {"git_commit": none} | {name: str(value) for name, value in _surroundings(study).items()}
    then = {name: run.params.get(name, none) for name in now}
    if changed := [f"{name} {then[name]} -> {now[name]}" for name in now if now[name] != then[name]]:
        said = ", ".join(changed)
        notes.say(f"resumed with {said}: what was stored before is of the former, the rest of the latter")


def _what_is_left(ctx: click.Context, command: str, run: Any) -> str:
    if not run.id:
        return str(run.where)
    uri = ctx.params["tracking_uri"]
    place = f" --tracking-uri {shlex.quote(shown(uri))}" if uri else ""
    untracked = "" if ctx.params["track"] else " --no-track"
    named = {name: text for name, text in typed(ctx).items() if name in _NAMES and code_in(text)}
    code = "".join(f" --{_OPTIONS.get(name, name)} {shlex.quote(text)}" for name, text in named.items())
    again = f"srd-lab {command}{untracked} --resume {shlex.quote(run.id)}{place}{code}"
    return f"what was finished is stored; go on with: {again}"
