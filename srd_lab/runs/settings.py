"""Settings of a run, as the command line gives them, as a run stores them, and back."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from srd_lab.errors import SrdLabError

# how, not what: free to differ on resume
INFRASTRUCTURE = ("track", "tracking_uri", "out", "resume", "debug", "device", "workers")


PACE = "batch_size"  # so is this, but a resumed run goes on as it was told to first: to the same last digits


def named_file(text: str) -> tuple[str, Path]:
    """The model's name ("" where none is said) and the file."""
    if "=" not in text or Path(text).is_file():
        return "", Path(text)
    name, _, file = text.partition("=")
    return name, Path(file)


def weights_of(given: Sequence[str], models: Sequence[str]) -> dict[str, Path | None]:
    """The weights file of every model, None where none was given (its default weights)."""
    files: dict[str, Path | None] = dict.fromkeys(models)
    for text in given:
        name, file = named_file(text)
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


def given_settings(ctx: click.Context) -> dict[str, Any]:
    """The settings typed by the user (not defaults), those of INFRASTRUCTURE left out."""
    source = click.core.ParameterSource.COMMANDLINE
    return {
        name: as_setting(value)
        for name, value in ctx.params.items()
        if name not in (*INFRASTRUCTURE, PACE) and ctx.get_parameter_source(name) is source
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
        if name in INFRASTRUCTURE or name not in stored or (name == PACE and values[name]):
            continue
        text = stored[name]
        raw: Any = None if text == "" else text
        if getattr(option, "multiple", False) or option.nargs > 1:
            raw = next(csv.reader([text]), ())
        values[name] = option.type_cast_value(ctx, raw)
    return values


def options_of(explainer: Any) -> dict[str, Any]:
    """An explainer's hyper-parameters as a run stores them."""
    return {name: as_setting(value) for name, value in dataclasses.asdict(explainer).items()}
