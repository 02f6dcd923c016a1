"""Options of the attack commands, by subject; what is valid is decided here, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from attacks.settings import ManipulationSettings, ModelManipulationSettings
from srd_lab.cli.options import Positive, steps_option, whole


class Size(click.ParamType):  # type: ignore[type-arg]
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


def positive(flag: str, default: float, meaning: str) -> Callable[[Any], Any]:
    """An option that takes a number above 0."""
    kind = Positive()
    return click.option(flag, default=default, show_default=True, type=kind, help=meaning)


def count(flag: str, default: int, meaning: str) -> Callable[[Any], Any]:
    """An option that takes a whole number, at least 1."""
    return click.option(flag, default=default, show_default=True, type=whole(1), help=meaning)


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

EQ10_OPTIONS = (
    steps_option,
    positive("--lr", ManipulationSettings.lr, "eq10: step size in normalised units."),
    click.option(
        "--output-term",
        type=click.Choice(["probabilities", "logits"]),
        default=ManipulationSettings.output_term,
        show_default=True,
        help="eq10: what shall stay: probabilities, or logits as Eq. 10 prints it.",
    ),
    click.option(
        "--bound",
        default=ManipulationSettings.bound,
        show_default=True,
        type=Size(),
        help="eq10: largest change of a pixel, in units of 0..255.",
    ),
    positive(
        "--stop-mse",
        ManipulationSettings.stop_mse,
        "eq10: stop an image at this mean squared change (normalised).",
    ),
    positive(
        "--beta-start",
        ManipulationSettings.beta_start,
        "eq10: softplus beta of the surrogate at the first step.",
    ),
    positive("--beta-end", ManipulationSettings.beta_end, "eq10: ... and after the last."),
)


MANIPULATION_OPTIONS = (
    click.option(
        "--manipulate-model",
        type=click.Choice(["location", "top-k", "centre-of-mass", "active"]),
        help="Fine-tune a copy of the network until the method's maps say this (Heo et al. 2019); read others on it.",
    ),
    click.option("--frame", type=whole(1), help="location: width of the frame, in pixels. [default: 1/8]"),
    click.option(
        "--top-share",
        default=ModelManipulationSettings.top_share,
        show_default=True,
        type=Positive(below=1),
        help="top-k: share of the pixels that the maps shall leave.",
    ),
    click.option(
        "--swap",
        nargs=2,
        default=ModelManipulationSettings.swap,
        show_default=True,
        type=whole(0),
        help="active: the two classes.",
    ),
    positive(
        "--map-weight",
        ModelManipulationSettings.map_weight,
        "--manipulate-model: weight of the maps against the accuracy.",
    ),
    click.option(
        "--keep",
        type=click.Choice(["labels", "outputs"]),
        default="labels",
        show_default=True,
        help="--manipulate-model: what shall hold meanwhile.",
    ),
    count("--train-images", ModelManipulationSettings.train_images, "... images to train on."),
    count("--train-batch", ModelManipulationSettings.train_batch, "... at once."),
    count("--train-steps", ModelManipulationSettings.train_steps, "... Adam steps."),
    positive("--train-lr", ModelManipulationSettings.train_lr, "... their size."),
)
