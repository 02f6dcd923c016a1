"""``srd-lab attack``: how far does a targeted manipulation move the explanations of a method?"""

from __future__ import annotations

from typing import Any

import click

from srd_lab.catalogue import ATTACKABLE
from srd_lab.command import command_errors, tracked
from srd_lab.options import batch_size_option, common_options, model_option, pairs_option, steps_option


@click.command()
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice([*ATTACKABLE, "all"]),
    default=["srd"],
    show_default=True,
    metavar="NAME",
    help="Explanation method (`srd-lab methods` lists them), or all = the six of Fig. 4; repeatable.",
)
@pairs_option
@model_option
@steps_option
@click.option(
    "--lr",
    default=1e-3,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Step size in normalised units.",
)
@batch_size_option
@click.option(
    "--output-term",
    type=click.Choice(["probabilities", "logits"]),
    default="probabilities",
    show_default=True,
    help="What shall stay: probabilities, or logits as Eq. 10 prints it.",
)
@click.option(
    "--bound",
    default=8.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Largest change of a pixel, in units of 0..255.",
)
@click.option(
    "--stop-mse",
    default=1e-3,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Stop an image at this mean squared change (normalised).",
)
@click.option(
    "--beta-start",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Softplus beta of the surrogate at the first step.",
)
@click.option(
    "--beta-end",
    default=100.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="... and after the last.",
)
@click.option(
    "--start",
    "starts",
    multiple=True,
    type=click.Choice(["ones", "contrastive", "gradcam"]),
    default=["ones"],
    show_default=True,
    help="Where SRD starts; the paper attacks 'ones', which is class-agnostic. Repeatable.",
)
@common_options
@click.pass_context
@command_errors
def attack(ctx: click.Context, /, **_: Any) -> None:
    """Attack the explanations of random image pairs and score how far they moved.

    Scores: SSIM and PCC of the map before and after (high = robust), of the map after and the map aimed at
    (high = the attack succeeded), and before and after random noise of equal MSE (the control).
    """
    from attacks.study import Robustness

    tracked(ctx, "attack", ctx.params["model"], Robustness)
