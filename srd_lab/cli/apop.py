"""``srd-lab apop``: how well does a network predict when it keeps nothing of an image but the activation pattern?"""

from __future__ import annotations

from typing import Any

import click

from apop.settings import SurveySettings
from srd_lab.cli.errors import command_errors
from srd_lab.cli.options import (
    DEFAULT_MODEL,
    OWN_MODEL,
    Names,
    batch_size_option,
    common_options,
    images_option,
)
from srd_lab.cli.tracked import tracked

INPUTS = SurveySettings.inputs


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    default=[DEFAULT_MODEL],
    show_default=True,
    help=f"A bundled network, with ImageNet data any torchvision one, or {OWN_MODEL}; repeatable.",
)
@images_option("500")
@click.option(
    "--inputs",
    type=Names(lambda: INPUTS),
    default=",".join(INPUTS),
    show_default=True,
    help="What is put in the place of the image, comma-separated, in normalised space.",
)
@click.option(
    "--binarize/--no-binarize",
    default=True,
    show_default=True,
    help="Binarise each activation call in turn (one forward pass each).",
)
@click.option("--save-patterns", is_flag=True, help="Store the activation patterns with the run.")
@batch_size_option
@common_options
@click.pass_context
@command_errors
def apop(ctx: click.Context, /, **_: Any) -> None:
    """Predict from activation patterns alone (APOP).

    The network sees an image; then it sees zeros, ones or noise instead, with the on/off pattern of its ReLUs and
    the winners of its max pools frozen: APOP. "& relu" applies ReLU after each frozen mask as well. Then each
    activation call in turn gives 1 where it is positive and 0 elsewhere, on the image itself.
    """
    from apop.study import Survey

    tracked(ctx, "apop", lambda given: Survey(given.read(SurveySettings)))
