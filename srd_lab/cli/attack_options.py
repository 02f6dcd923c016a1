"""Options of the attack commands, by subject; what is valid is decided here, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from srd_lab.cli.options import steps_option


class Size(click.ParamType):
    """A budget in units of 0..255: above 0, at most 255."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            size = float(value)
        except ValueError:
            self.fail(
                f"{value!r} is no number; expected a budget above 0, at most 255 (units of 0..255)",
                param,
                ctx,
            )
        if not 0 < size <= 255:
            self.fail(
                f"a budget of {value} makes no sense; expected one above 0, at most 255 (units of 0..255)",
                param,
                ctx,
            )
        return size


def positive(flag: str, default: float, meaning: str) -> Any:
    """An option that takes a number above 0."""
    kind = click.FloatRange(0, min_open=True)
    return click.option(flag, default=default, show_default=True, type=kind, help=meaning)


def count(flag: str, default: int, meaning: str) -> Any:
    """An option that takes a whole number, at least 1."""
    return click.option(flag, default=default, show_default=True, type=click.IntRange(1), help=meaning)


BUDGET_OPTIONS = (
    click.option(
        "--mode",
        type=click.Choice(["quick", "full"]),
        default="quick",
        show_default=True,
        help="quick: 40 iterations, other members checked on some images; full: 100, restarts, 5,000 queries, all count.",
    ),
    click.option(
        "--norm",
        type=click.Choice(["legacy", "l2", "linf"]),
        default="legacy",
        show_default=True,
        help="What the budget bounds; legacy is MSE 1e-3 (normalised) and 8/255, as the published attack has it.",
    ),
    click.option(
        "--budget",
        type=Size(),
        help="Its size: RMS (l2) or largest change (linf) in units of 0..255, a factor for legacy. [default: 2, 8, 1]",
    ),
    count("--seeds", 1, "Repeats with other random starts; scores are means over them."),
)

EQ10_DEFAULTS: dict[str, Any] = {
    "steps": 100,
    "lr": 1e-3,
    "output_term": "probabilities",
    "bound": 8.0,
    "stop_mse": 1e-3,
    "beta_start": 10.0,
    "beta_end": 100.0,
}
EQ10_OPTIONS = (
    steps_option,
    positive("--lr", EQ10_DEFAULTS["lr"], "eq10: step size in normalised units."),
    click.option(
        "--output-term",
        type=click.Choice(["probabilities", "logits"]),
        default=EQ10_DEFAULTS["output_term"],
        show_default=True,
        help="eq10: what shall stay: probabilities, or logits as Eq. 10 prints it.",
    ),
    click.option(
        "--bound",
        default=EQ10_DEFAULTS["bound"],
        show_default=True,
        type=Size(),
        help="eq10: largest change of a pixel, in units of 0..255.",
    ),
    positive(
        "--stop-mse",
        EQ10_DEFAULTS["stop_mse"],
        "eq10: stop an image at this mean squared change (normalised).",
    ),
    positive(
        "--beta-start", EQ10_DEFAULTS["beta_start"], "eq10: softplus beta of the surrogate at the first step."
    ),
    positive("--beta-end", EQ10_DEFAULTS["beta_end"], "eq10: ... and after the last."),
)


def with_options(options: Sequence[Any]) -> Callable[[Any], Any]:
    """A decorator that gives a command these options, in this order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


MANIPULATION_OPTIONS = (
    click.option(
        "--manipulate-model",
        type=click.Choice(["location", "top-k", "centre-of-mass", "active"]),
        help="Fine-tune a copy of the network until the method's maps say this (Heo et al. 2019); read others on it.",
    ),
    click.option(
        "--frame", type=click.IntRange(1), help="location: width of the frame, in pixels. [default: 1/8]"
    ),
    click.option(
        "--top-share",
        default=0.1,
        show_default=True,
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help="top-k: share of the pixels that the maps shall leave.",
    ),
    click.option(
        "--swap",
        nargs=2,
        default=(0, 1),
        show_default=True,
        type=click.IntRange(0),
        help="active: the two classes.",
    ),
    positive("--map-weight", 3.0, "--manipulate-model: weight of the maps against the accuracy."),
    click.option(
        "--keep",
        type=click.Choice(["labels", "outputs"]),
        default="labels",
        show_default=True,
        help="--manipulate-model: what shall hold meanwhile.",
    ),
    count("--train-images", 800, "... images to train on."),
    count("--train-batch", 16, "... at once."),
    count("--train-steps", 150, "... Adam steps."),
    positive("--train-lr", 1e-3, "... their size."),
)
