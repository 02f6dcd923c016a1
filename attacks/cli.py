"""``srd-lab attack``, ``robustness``, ``verify`` and ``leaderboard``: how far do attacks move the explanations of a
method?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from srd_lab.command import command_errors, tracked
from srd_lab.options import (
    MethodName,
    batch_size_option,
    common_options,
    model_option,
    pairs_option,
    steps_option,
)

MEMBERS = ("dissimilarity", "combined", "top_k", "target", "mass_centre", "polish", "black_box", "transfer")
ATTACKS = ("standard", *MEMBERS, "eq10")
DEFAULT_ATTACKS = ("combined", "polish", "eq10")


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


BUDGET_OPTIONS = (
    click.option(
        "--mode",
        type=click.Choice(["quick", "full"]),
        default="quick",
        show_default=True,
        help="quick: 40 iterations, other members checked on 16 images; full: 100, restarts, 5,000 queries, all count.",
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
    click.option(
        "--seeds",
        default=1,
        show_default=True,
        type=click.IntRange(1),
        help="Repeats with other random starts; scores are means over them.",
    ),
)

EQ10_OPTIONS = (
    steps_option,
    click.option(
        "--lr",
        default=1e-3,
        show_default=True,
        type=click.FloatRange(0, min_open=True),
        help="eq10: step size in normalised units.",
    ),
    click.option(
        "--output-term",
        type=click.Choice(["probabilities", "logits"]),
        default="probabilities",
        show_default=True,
        help="eq10: what shall stay: probabilities, or logits as Eq. 10 prints it.",
    ),
    click.option(
        "--bound",
        default=8.0,
        show_default=True,
        type=Size(),
        help="eq10: largest change of a pixel, in units of 0..255.",
    ),
    click.option(
        "--stop-mse",
        default=1e-3,
        show_default=True,
        type=click.FloatRange(0, min_open=True),
        help="eq10: stop an image at this mean squared change (normalised).",
    ),
    click.option(
        "--beta-start",
        default=10.0,
        show_default=True,
        type=click.FloatRange(0, min_open=True),
        help="eq10: softplus beta of the surrogate at the first step.",
    ),
    click.option(
        "--beta-end",
        default=100.0,
        show_default=True,
        type=click.FloatRange(0, min_open=True),
        help="eq10: ... and after the last.",
    ),
)


EQ10_DEFAULTS = {
    "steps": 100,
    "lr": 1e-3,
    "output_term": "probabilities",
    "bound": 8.0,
    "stop_mse": 1e-3,
    "beta_start": 10.0,
    "beta_end": 100.0,
}


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
    click.option(
        "--map-weight",
        default=3.0,
        show_default=True,
        type=click.FloatRange(0, min_open=True),
        help="--manipulate-model: weight of the maps against the accuracy.",
    ),
    click.option(
        "--keep",
        type=click.Choice(["labels", "outputs"]),
        default="labels",
        show_default=True,
        help="--manipulate-model: what shall hold meanwhile.",
    ),
    click.option(
        "--train-images",
        default=800,
        show_default=True,
        type=click.IntRange(1),
        help="... images to train on.",
    ),
    click.option("--train-batch", default=16, show_default=True, type=click.IntRange(1), help="... at once."),
    click.option(
        "--train-steps", default=150, show_default=True, type=click.IntRange(1), help="... Adam steps."
    ),
    click.option(
        "--train-lr",
        default=1e-3,
        show_default=True,
        type=click.FloatRange(0, min_open=True),
        help="... their size.",
    ),
)


@click.command()
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=MethodName(("all",)),
    default=["srd"],
    show_default=True,
    metavar="NAME",
    help="Explanation method (`srd-lab methods` lists them), or all = the six of Fig. 4; repeatable.",
)
@click.option(
    "--attack",
    "attacks",
    multiple=True,
    type=click.Choice(ATTACKS),
    default=DEFAULT_ATTACKS,
    show_default=True,
    metavar="NAME",
    help=f"{', '.join(ATTACKS)}; repeatable. standard = all of the evaluation; eq10 alone prints its own table.",
)
@pairs_option
@model_option
@with_options(BUDGET_OPTIONS)
@with_options(EQ10_OPTIONS)
@batch_size_option
@click.option(
    "--start",
    "starts",
    multiple=True,
    type=click.Choice(["ones", "contrastive", "gradcam"]),
    default=["ones"],
    show_default=True,
    help="Where SRD starts; the paper attacks 'ones', which is class-agnostic. Repeatable.",
)
@with_options(MANIPULATION_OPTIONS)
@common_options
@click.pass_context
@command_errors
def attack(ctx: click.Context, /, **_: Any) -> None:
    """Attack the explanations of random images and score what is left of them.

    The worst case per image over several attacks, on images of 8 bits within the budget whose predicted class holds; beside
    it, not counted, random noise of the same norm and the published attack (Eq. 10). With --manipulate-model the network
    is changed instead of the images.
    """

    def study(settings: dict[str, Any]) -> Any:
        from attacks.manipulation_study import ManipulationStudy
        from attacks.model_study import OTHERS, ModelStudy
        from attacks.robustness_study import RobustnessStudy

        if settings["manipulate_model"]:
            training = {
                "steps": settings["train_steps"],
                "lr": settings["train_lr"],
                "images": settings["pairs"],
            }
            return ModelStudy({**settings, **training, "others": OTHERS})
        if tuple(settings["attacks"]) == ("eq10",):
            return ManipulationStudy(settings)
        return RobustnessStudy({**settings, "gates": False, "curve": False, "entries": False, "certify": 0})

    tracked(ctx, "attack", ctx.params["model"], study)


@click.command()
@click.option(
    "--method",
    "--methods",
    "methods",
    multiple=True,
    type=MethodName(("all", "attackable")),
    default=["srd", "lrp_zplus", "guided_backprop", "gradcam", "sobel"],
    show_default=True,
    metavar="NAME",
    help="Explanation method; all = the six of Fig. 4, attackable = every one with a gradient; repeatable.",
)
@pairs_option
@model_option
@with_options(BUDGET_OPTIONS)
@click.option(
    "--curve/--no-curve", default=True, show_default=True, help="Also a quarter, half and twice the budget."
)
@click.option(
    "--certify",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Draws of a certificate of the smoothed maps (Levine et al. 2019), on four images; 1000 makes sense, 0 = none.",
)
@click.option(
    "--sigma",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Standard deviation of these draws, pixels in [0, 1].",
)
@click.option(
    "--eq10/--no-eq10",
    "beside",
    default=True,
    show_default=True,
    help="Also the published attack, not counted.",
)
@batch_size_option
@common_options
@click.pass_context
@command_errors
def robustness(ctx: click.Context, /, **_: Any) -> None:
    """The standard evaluation: methods under the whole ensemble, with gates, flags, ranking and entries.

    SRD is ranked from its class-specific start; the class-agnostic one, which the paper attacks, stands beside it.
    docs/robustness.md explains the protocol.
    """

    def study(settings: dict[str, Any]) -> Any:
        from attacks.robustness_study import RobustnessStudy

        attacks = ("standard", *(("eq10",) if settings["beside"] else ()))
        defaults = {"attacks": attacks, "starts": ("contrastive", "ones"), "gates": True, "entries": True}
        return RobustnessStudy({**EQ10_DEFAULTS, **settings, **defaults})

    tracked(ctx, "robustness", ctx.params["model"], study)


@click.command()
@click.argument("entry", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The network's weights file.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, mps; auto takes the first it finds.",
)
@command_errors
def verify(entry: Path, weights: Path | None, device: str) -> None:
    """Recompute bounds, classes, maps and scores of ENTRY (an entry.json) from its images alone."""
    from attacks.verification import verify as check
    from srd_lab.types import SrdLabError

    problems = check(entry, weights, device)
    for problem in problems:
        click.echo(f"disagrees: {problem}")
    if problems:
        raise SrdLabError(f"{entry} does not verify; see above")
    click.echo(f"{entry} verifies: hashes, bounds, classes, maps and scores agree")


@click.command()
@click.argument(
    "entries", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option(
    "--out",
    default="leaderboard",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where to write OUT.md and OUT.html.",
)
@command_errors
def leaderboard(entries: tuple[Path, ...], out: Path) -> None:
    """One table of ENTRIES (entry.json files) that measured the same thing."""
    from attacks.leaderboard import leaderboard as table

    found = table(entries)
    for suffix, text in ((".md", found.markdown), (".html", found.html)):
        out.with_name(out.name + suffix).write_text(text, encoding="utf-8")
    click.echo(found.markdown)
    click.echo(f"written: {out}.md and {out}.html")
