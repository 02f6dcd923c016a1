"""The options of a command as a TOML file, which every run writes and ``--config`` reads.

::

    command = "attack"

    [options]
    method = ["srd", "gradcam"]
    pairs = 100
    seed = 0
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from srd_lab.errors import BadValue

# where results go and how they are shown: no study knows these options
OUTSIDE = ("track", "tracking_uri", "out", "resume", "debug", "as_json")
_OF_THE_MACHINE = (
    *("device", "workers", "threads"),
    *("executor", "ray_address", "workers_per_gpu", "share"),
)


def config_text(ctx: click.Context, command: str) -> str:
    """All options of a command that decide a number, typed or not, as TOML."""
    lines = [f"command = {_toml(command)}", "", "[options]"]
    for option in options_of(ctx.command):
        value = as_given(ctx, option)
        if value not in (None, (), []):
            lines.append(f"{_spelled(option)} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def read_config(ctx: click.Context, param: click.Parameter, file: Path | None) -> None:
    """Make a file's options the defaults of the command; the callback of ``--config``.

    Raises BadValue for a file that is no TOML, is of another command, or has options that the command does not know.
    """
    if file is None:
        return
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{file} is no TOML file ({error})", ctx, param) from None
    options = found.get("options", {})
    command = ctx.command_path.partition(" ")[2]
    if not isinstance(options, dict) or set(found) - {"command", "options"}:
        raise click.BadParameter(
            f"{file} is no file of options: expected command and [options] alone", ctx, param
        )
    if (of := found.get("command", command)) != command:
        raise click.BadParameter(f"{file} is of srd-lab {of}, not of srd-lab {command}", ctx, param)
    known = {_spelled(option): option.name or "" for option in options_of(ctx.command)}
    if wrong := [name for name in options if name not in known]:
        raise click.BadParameter(f"{file}: srd-lab {command} has no option {wrong[0]!r}", ctx, param)
    ctx.default_map = {known[name]: value for name, value in options.items()}


def options_of(command: click.Command) -> Iterator[click.Option]:
    """The options of a command that decide a number."""
    for option in command.params:
        if (
            isinstance(option, click.Option)
            and option.expose_value
            and option.name not in (*OUTSIDE, *_OF_THE_MACHINE)
        ):
            yield option


def _spelled(option: click.Option) -> str:
    """The option's name without dashes; of several spellings the first long one."""
    return next(name for name in option.opts if name.startswith("--")).lstrip("-")


def as_given(ctx: click.Context, option: click.Option) -> Any:
    """The value as it would be typed: of a flag that stands for something else, whether it is set."""
    value = ctx.params[option.name or ""]
    if option.is_flag and not isinstance(value, bool):
        return bool(option.callback and option.callback(ctx, option, True) == value)
    return value


def _toml(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool | int | float):
        if isinstance(value, float) and value != value:
            raise BadValue("a setting is not a number")
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False)
