"""The options that commands share, their types, and the settings that a resumed run gives back.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from srd_lab.catalogue import BASELINES, METHODS, outer_parts
from srd_lab.types import SrdLabError

# how, not what: free to differ on resume
INFRASTRUCTURE = ("track", "tracking_uri", "out", "resume", "debug", "device", "workers")
PACE = "batch_size"  # so is this, but a resumed run goes on as it was told to first: to the same last digits
DEFAULT_MODEL = "vgg16"
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
    """Some of the names that are allowed, separated by commas, as a tuple without repetitions.

    wrapped : whether a wrapper such as ``smoothed(srd,0.1,64)`` is allowed too; what is inside is read later.
    """

    name = "list"

    def __init__(self, allowed: Sequence[str], wrapped: bool = False) -> None:
        self.allowed, self.wrapped = allowed, wrapped

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        names = value if isinstance(value, tuple) else tuple(outer_parts(value))
        if wrong := [n for n in names if n not in self.allowed and not (self.wrapped and "(" in n)]:
            self.fail(f"{wrong[0]!r} is not one of {', '.join(self.allowed)}", param, ctx)
        return tuple(dict.fromkeys(names))


class MethodName(click.ParamType):
    """The name of an explanation method, a wrapper around one such as ``smoothed(srd,0.1,64)``, or one of ``more``."""

    name = "name"

    def __init__(self, more: Sequence[str] = ()) -> None:
        self.more = more

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).strip()
        if "(" not in text and text not in (*METHODS, *self.more):
            self.fail(f"{text!r} is not one of {', '.join((*self.more, *METHODS))}", param, ctx)
        return text


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


model_option = click.option(
    "--model",
    default=DEFAULT_MODEL,
    show_default=True,
    help="A bundled network, or with ImageNet data any torchvision one.",
)
pairs_option = click.option(
    "--pairs",
    default=100,
    show_default=True,
    type=click.IntRange(1),
    help="Random pairs of images to attack.",
)
steps_option = click.option(
    "--steps", default=100, show_default=True, type=click.IntRange(1), help="eq10: Adam steps at most."
)
baseline_option = click.option(
    "--baseline",
    default="black",
    show_default=True,
    type=click.Choice(BASELINES),
    help="What fidelity sets pixels to: mean is the colour that normalisation maps to 0, minimum the smallest value "
    "of the normalised image.",
)
batch_size_option = click.option(
    "--batch-size", type=click.IntRange(1), help="Images or pairs at once. [default: by image size]"
)


def images_option(default: str) -> Callable[..., Any]:
    """``--images``, a number or ``all``."""
    return click.option(
        "--images",
        default=default,
        show_default=True,
        type=Count(),
        help="Random images, drawn by the seed: a number, or all.",
    )


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
