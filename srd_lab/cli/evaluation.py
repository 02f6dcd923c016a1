"""``srd-lab evaluate`` and ``srd-lab explain``: maps of many images, scored, and of a few, to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from srd_lab.catalogue import METHODS, METRICS
from srd_lab.cli.errors import command_errors
from srd_lab.cli.options import (
    DEFAULT_MODEL,
    FINE_MODEL,
    Name,
    Positive,
    WeightsFile,
    baseline_option,
    batch_size_option,
    common_options,
    figure_format_option,
    fine_model_option,
    images_option,
    methods_option,
    names_option,
    preprocessing_options,
    with_options,
)
from srd_lab.cli.tracked import tracked
from srd_lab.evaluation.settings import EvaluationSettings, ExplainSettings


@click.command()
@fine_model_option
@methods_option(["all"], "Explanation method; `srd-lab methods` lists them.")
@names_option(
    *("--metric", "--metrics", "metrics"),
    allowed=lambda: ("all", *METRICS),
    default=["all"],
    help="Metric; `srd-lab methods` lists them too.",
)
@images_option("200")
@click.option(
    "--target",
    type=click.Choice(["label", "predicted"]),
    default="label",
    show_default=True,
    help="The class that is explained.",
)
@click.option(
    "--reference",
    type=Name(lambda: tuple(METHODS), free=True, wrapped=True),
    default="srd",
    show_default=True,
    metavar="NAME",
    help="The method that every other is compared with.",
)
@baseline_option
@batch_size_option
@common_options
@click.pass_context
@command_errors
def evaluate(ctx: click.Context, /, **_: Any) -> None:
    """Score explanation methods on the same images and rank them.

    Localisation, complexity, faithfulness and robustness of every method, with intervals, and each compared with SRD.
    """
    from srd_lab.evaluation.study import Evaluation

    if ctx.params["model"] is None:
        ctx.params["model"] = FINE_MODEL if ctx.params["data"] == "scenes" else DEFAULT_MODEL
    tracked(ctx, "evaluate", lambda given: Evaluation(given.read(EvaluationSettings)))


@click.command()
@click.argument(
    "images", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@fine_model_option
@click.option(
    "--data",
    default="",
    help="What the network was made for, which names its classes: scenes, imagenet, cifar10, ... "
    "[default: scenes for bundled networks, else classes have numbers]",
)
@click.option(
    "--weights",
    multiple=True,
    type=WeightsFile(),
    help="State dict (.pth, .safetensors, .npz). [default: bundled for scenes, else torchvision's IMAGENET1K_V1]",
)
@with_options(preprocessing_options)
@methods_option(["srd"], "Explanation method; `srd-lab methods` lists them.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Class to explain: index, name or WordNet number; repeatable. [default: the predicted]",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, mps; auto takes the first it finds.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for what is made; no file there is overwritten. [default: explanations, else explanations-2, ...]",
)
@click.option(
    "--overlay",
    type=click.Choice(["heat", "contour"]),
    default="heat",
    show_default=True,
    help="The map over the picture: colour by its strength, or lines around the strongest pixels.",
)
@click.option(
    "--share",
    type=Positive(below=1),
    default=0.5,
    show_default=True,
    help="contour: of the relevance that the lines enclose, above 0 and below 1.",
)
@figure_format_option
@command_errors
def explain(images: tuple[Path, ...], **settings: Any) -> None:
    """Explain IMAGES: overlays, raw maps, a contact sheet.

    Prints the likeliest classes. For every picture OUT/NAME/METHOD.png shows the map over it, red for the class and
    blue against it (from yellow to red for a map without a sign), and METHOD.npy is the raw map at its own resolution.
    With several --target there is a METHOD-CLASS.png and .npy for each, side by side in the contact sheet.
    """
    from srd_lab.evaluation.explaining import Explaining

    if settings["model"] is None:
        settings["model"] = FINE_MODEL if settings["data"] in ("", "scenes") else DEFAULT_MODEL
    Explaining(ExplainSettings(**settings)).run(images)
