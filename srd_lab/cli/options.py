"""The options that commands share, their types, and the settings that a resumed run gives back.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from srd_lab.catalogue import BASELINES, METHODS, outer_parts
from srd_lab.cli.config import read_config
from srd_lab.errors import meant
from srd_lab.parts import FOLDERS, is_own
from srd_lab.runs.settings import named_file

DEFAULT_MODEL = "vgg16"
# the bundled network whose encoder ends in enough positions for a coarse map to mean something
FINE_MODEL = "vgg16_8x8"

_ABOUT = {  # of the sources whose names do not say it
    "pictures": " (without labels)",
    "table": " (CSV: path, label, box)",
    "hf-dataset": " (a name or folder)",
    "wds": " (tar shards)",
}
DATA = (
    f"scenes, or SOURCE:PATH with SOURCE cifar10, cifar100, {', '.join(name + _ABOUT.get(name, '') for name in FOLDERS)}; "
    "or package.module:factory or path/file.py:factory."
)


MOST = 1_000_000_000  # of anything that is counted; nobody waits for more


def whole(least: int, most: int = MOST) -> click.IntRange:
    """The type of an option that takes a whole number within these limits."""
    return click.IntRange(least, most)


class Positive(click.FloatRange):
    """A number above 0, and below 1 or another limit: no infinity, and nothing near the largest numbers there are."""

    def __init__(self, below: float = 1e9) -> None:
        super().__init__(0, below, min_open=True, max_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("nan is not a number", param, ctx)
        return float(number)


class WeightsFile(click.ParamType):  # type: ignore[type-arg]
    """``FILE``, or ``NAME=FILE`` for the model of that name; stays as it was typed."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not named_file(text)[1].is_file():
            self.fail(f"there is no file {named_file(text)[1]}; expected FILE or NAME=FILE", param, ctx)
        return text


class Colours(click.ParamType):  # type: ignore[type-arg]
    """Three numbers, one per channel, separated by commas; or one for all three."""

    name = "r,g,b"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple | list):
            return tuple(value)
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if len(numbers) not in (1, 3) or not all(math.isfinite(n) and abs(n) < 1e6 for n in numbers):
            self.fail(f"{value!r} is not three numbers, such as 0.485,0.456,0.406", param, ctx)
        return numbers * (3 // len(numbers))


class Count(click.ParamType):  # type: ignore[type-arg]
    """How many: a number from 1 on, or ``all``."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value)
        if text == "all":
            return text
        if not text.isdecimal() or len(text) > 10 or not 1 <= int(text) <= MOST:
            self.fail(f"{text!r} is not how many; expected a number from 1 on, or all", param, ctx)
        return int(text)


class Name(click.ParamType):  # type: ignore[type-arg]
    """One of the names that are allowed.

    allowed : gives the names when one is to be read.
    free : whether names with options (``srd?level=high``) and parts from elsewhere (``mine.py:Method``) are allowed too,
        which are read later; wrapped : whether wrappers are (``smoothed(srd,0.1,64)``).
    """

    name = "name"

    def __init__(
        self, allowed: Callable[[], Sequence[str]], *, free: bool = False, wrapped: bool = False
    ) -> None:
        self.allowed, self.free, self.wrapped = allowed, free, wrapped

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = str(value).strip()
        if ctx is not None and ctx.resilient_parsing:  # completion; PyTorch, to know the names, takes seconds
            return text
        allowed = self.allowed()
        if text not in allowed and not self._read_later(text, allowed):
            self.fail(f"{text!r} is not one of {', '.join(allowed)}{meant(text, allowed)}", param, ctx)
        return text

    def _read_later(self, name: str, allowed: Sequence[str]) -> bool:
        if "(" in name:
            return self.wrapped
        return self.free and (is_own(name) or ("?" in name and name.partition("?")[0] in allowed))


class Names(Name):
    """Several of them, separated by commas, as a tuple without repetitions; arguments as for :class:`Name`."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        names = value if isinstance(value, tuple | list) else outer_parts(value)
        return tuple(dict.fromkeys(super(Names, self).convert(name, param, ctx) for name in names))


def names_option(
    *spellings: str,
    allowed: Callable[[], Sequence[str]],
    default: Sequence[str],
    help: str,
    free: bool = True,
    wrapped: bool = False,
) -> Callable[..., Any]:
    """An option that takes names: repeated, or several separated by commas.

    spellings : of the option, and the name of its value. allowed, free, wrapped : see :class:`Name`.
    """

    def flat(ctx: click.Context, param: click.Parameter, given: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for names in given for name in names))

    return click.option(
        *spellings,
        multiple=True,
        type=Names(allowed, free=free, wrapped=wrapped),
        default=list(default),
        show_default=True,
        metavar="NAME",
        help=f"{help} Repeatable, or separated by commas.",
        callback=flat,
    )


def methods_option(
    default: Sequence[str], help: str, *, more: Sequence[str] = ("all",), only: Sequence[str] = ()
) -> Callable[..., Any]:
    """``--method`` or ``--methods``.

    more : words that stand for several. only : the methods to choose from; () = every one, also of the user's own.
    """
    return names_option(
        *("--method", "--methods", "methods"),
        allowed=lambda: (*more, *(only or METHODS)),
        default=default,
        help=help,
        free=not only,
        wrapped=not only,
    )


OWN_MODEL = "timm:NAME, hf:NAME, hub:REPO:NAME, FILE.pt2, package.module:factory or path/file.py:factory"
model_option = click.option(
    "--model",
    default=DEFAULT_MODEL,
    show_default=True,
    help=f"A bundled network, with ImageNet data any torchvision one, or {OWN_MODEL}.",
)

fine_model_option = click.option(
    "--model",
    help=f"A bundled network, with ImageNet data any torchvision one, or {OWN_MODEL}. [default: {FINE_MODEL} with scenes, "
    f"else {DEFAULT_MODEL}]",
)

pairs_option = click.option(
    "--pairs",
    default=100,
    show_default=True,
    type=whole(1),
    help="Random pairs of images to attack.",
)

steps_option = click.option(
    "--steps", default=100, show_default=True, type=whole(1), help="eq10: Adam steps at most."
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
    "--batch-size", type=whole(1), help="Images or pairs at once. [default: by image size]"
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


def with_options(options: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """The decorator that gives a command these options, in their order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


preprocessing_options = (
    click.option(
        "--size", type=whole(1, 10_000), help="Side of the images in pixels. [default: the network's own]"
    ),
    click.option(
        "--mean",
        type=Colours(),
        default=(),
        help="Per channel, of pixels in [0, 1]: R,G,B. [default: the network's own]",
    ),
    click.option(
        "--std",
        type=Colours(),
        default=(),
        help="Standard deviation that goes with it. [default: the network's own]",
    ),
    click.option(
        "--labels",
        type=click.Path(exists=True, dir_okay=False),
        help="Names of the classes: one a line, or JSON (a list, or index to name). [default: the data's]",
    ),
)


data_options = (
    click.option("--data", default="scenes", show_default=True, help=DATA),
    click.option(
        "--weights",
        multiple=True,
        type=WeightsFile(),
        help="State dict (.pth, .safetensors, .npz): FILE, or NAME=FILE for one of several models; repeatable. "
        "[default: bundled for scenes, else torchvision's IMAGENET1K_V1]",
    ),
    *preprocessing_options,
    click.option(
        "--non-rgb",
        type=click.Choice(["skip", "convert"]),
        default="skip",
        show_default=True,
        help="Images that are grey, CMYK or the like.",
    ),
    click.option(
        "--workers",
        type=whole(0),
        help="Processes that decode images; 0 = none. [default: by data and cores]",
    ),
    click.option(
        "--seed",
        default=0,
        show_default=True,
        type=whole(0, 2**63 - 1),
        help="Decides everything that is drawn.",
    ),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="cpu, cuda, cuda:1, mps; auto takes the first it finds.",
    ),
)


class Share(click.ParamType):  # type: ignore[type-arg]
    """``I/N``, the I-th of N shares; stays as it was typed."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        number, _, count = text.partition("/")
        fits = all(part.isdecimal() and len(part) < 10 for part in (number, count))
        if not fits or not 1 <= int(number) <= int(count):
            self.fail(f"{text!r} is no share; expected I/N, such as 2/8 for the second of eight", param, ctx)
        return f"{int(number)}/{int(count)}"


executor_options = (
    click.option(
        "--threads",
        type=whole(1, 10_000),
        help="Threads of PyTorch in each process; they round sums. [default: PyTorch's choice; 1 with ray]",
    ),
    click.option(
        "--executor",
        default="local",
        show_default=True,
        type=click.Choice(["local", "ray"]),
        help="Who does the work: this process, or a Ray cluster.",
    ),
    click.option(
        "--ray-address",
        metavar="HOST:PORT",
        help="Of the Ray cluster, or auto for that of this machine. [default: $RAY_ADDRESS, else one is started here]",
    ),
    click.option(
        "--workers-per-gpu",
        default=1,
        show_default=True,
        type=whole(1, 1000),
        help="ray: batches that share an accelerator.",
    ),
    click.option(
        "--shard",
        "share",
        type=Share(),
        help="Do the I-th of N shares of the batches alone, into --out with --no-track; srd-lab merge joins them.",
    ),
)

figure_format_option = click.option(
    "--figure-format",
    "figure_formats",
    multiple=True,
    type=click.Choice(["png", "pdf", "svg"]),
    default=["png"],
    show_default=True,
    help="Of the figures; repeatable. PNG, which pages show, is always among them; pdf and svg hold text as text.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")

tracking_uri_option = click.option(
    "--tracking-uri", help="MLflow store. [default: $MLFLOW_TRACKING_URI, else ./mlflow.db]"
)

run_options = (
    figure_format_option,
    click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=read_config,
        help="Options from a TOML file, such as the run.toml of a run; what is typed beside it goes first.",
    ),
    click.option(
        "--json", "as_json", is_flag=True, help="Print everything that was found as JSON, and no table."
    ),
    click.option("--track/--no-track", default=True, show_default=True, help="Log to MLflow."),
    tracking_uri_option,
    click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for tables and figures, besides those of the run. [default: none]",
    ),
    click.option(
        "--resume",
        metavar="RUN",
        help="Go on with a run that was interrupted, by its id (without tracking, by its folder); its settings apply.",
    ),
)


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that runs a model over data and tracks the result."""
    return with_options((*data_options, *executor_options, *run_options))(command)
