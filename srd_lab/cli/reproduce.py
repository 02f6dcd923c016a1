"""``srd-lab reproduce NAME``: an experiment of the paper, its numbers beside those measured here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from apop.settings import SurveySettings
from attacks.settings import ManipulationSettings
from srd_lab.catalogue import FIGURE_4, TABLE_2, TABLE_4
from srd_lab.cli.errors import command_errors
from srd_lab.cli.options import (
    baseline_option,
    batch_size_option,
    common_options,
    images_option,
    methods_option,
    model_option,
    pairs_option,
    steps_option,
)
from srd_lab.cli.tracked import tracked
from srd_lab.reproduce.settings import AblationSettings, TableSettings

BUNDLED = ("vgg16", "resnet18", "resnet50")
TABLE_3 = ("vgg13", "vgg16", "vgg19", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@click.group()
def reproduce() -> None:
    """Redo an experiment of the SRD paper.

    Prints the paper's value, the measured one with its 95 % interval, the number of images, whether the first lies
    inside the second, and every deviation from the paper's setting.
    """


def models_option(*paper: str) -> Callable[..., Any]:
    """``--model``, by default the networks of the paper (of them the bundled ones, on scenes)."""
    return click.option(
        "--model",
        "models",
        multiple=True,
        help=f"Network; repeatable. [default: the paper's: {', '.join(paper)}; on scenes the bundled ones]",
        callback=lambda ctx, option, given: given or _default(ctx, paper),
        is_eager=False,
    )


def _default(ctx: click.Context, paper: tuple[str, ...]) -> tuple[str, ...]:
    if ctx.params.get("resume"):
        return ()
    return tuple(n for n in paper if n in BUNDLED) if ctx.params["data"] == "scenes" else paper


def table_methods(paper: tuple[str, ...]) -> Callable[..., Any]:
    """``--methods``, by default those of the paper's table."""
    return methods_option(["all"], "Explanation method of the table.", only=paper)


@reproduce.command()
@common_options
@models_option(*TABLE_3)
@images_option("all")
@batch_size_option
@click.pass_context
@command_errors
def table1(ctx: click.Context, /, **_: Any) -> None:
    """Prediction from activation patterns alone (zeros)."""
    from srd_lab.reproduce.patterns import Table1

    tracked(ctx, "reproduce table1", lambda given: Table1(given.read(SurveySettings)))


@reproduce.command()
@common_options
@models_option(*TABLE_3)
@images_option("all")
@batch_size_option
@click.pass_context
@command_errors
def table3(ctx: click.Context, /, **_: Any) -> None:
    """The same from zeros, ones and noise, & relu."""
    from srd_lab.reproduce.patterns import Table3

    tracked(ctx, "reproduce table3", lambda given: Table3(given.read(SurveySettings)))


@reproduce.command()
@common_options
@models_option("vgg16", "resnet18", "resnet50")
@images_option("all")
@batch_size_option
@click.pass_context
@command_errors
def fig6(ctx: click.Context, /, **_: Any) -> None:
    """One activation call binarised, each in turn."""
    from srd_lab.reproduce.patterns import Figure6

    tracked(ctx, "reproduce fig6", lambda given: Figure6(given.read(SurveySettings)))


@reproduce.command()
@common_options
@model_option
@pairs_option
@table_methods(FIGURE_4)
@steps_option
@batch_size_option
@click.pass_context
@command_errors
def fig4(ctx: click.Context, /, **_: Any) -> None:
    """All methods attacked on the same pairs; in the paper on VGG16.

    Box plots, the control by noise of equal MSE, SRD from both starts, and scores at equal perturbation.
    """
    from srd_lab.reproduce.manipulation import Figure4

    tracked(ctx, "reproduce fig4", lambda given: Figure4(given.read(ManipulationSettings)))


@reproduce.command()
@common_options
@models_option("resnet50", "vgg16")
@images_option("200")
@batch_size_option
@click.pass_context
@command_errors
def fig7(ctx: click.Context, /, **_: Any) -> None:
    """SRD by neuron, by post-activation vector, as it is.

    Pictures side by side, and the sparseness and roughness of the maps.
    """
    from srd_lab.reproduce.ablation import Figure7

    tracked(ctx, "reproduce fig7", lambda given: Figure7(given.read(AblationSettings)))


@reproduce.command()
@common_options
@models_option("vgg16", "resnet50")
@table_methods(TABLE_2)
@images_option("752")
@baseline_option
@batch_size_option
@click.pass_context
@command_errors
def table2(ctx: click.Context, /, **_: Any) -> None:
    """Seventeen methods by five metrics."""
    from srd_lab.reproduce.evaluation import Table2

    tracked(ctx, "reproduce table2", lambda given: Table2(given.read(TableSettings)))


@reproduce.command()
@common_options
@models_option(
    *(f"resnet50_3x3{suffix}" for suffix in ("", "_elu", "_leaky_relu", "_silu", "_gelu", "_tanh"))
)
@table_methods(TABLE_4)
@images_option("1000")
@baseline_option
@batch_size_option
@click.pass_context
@command_errors
def table4(ctx: click.Context, /, **_: Any) -> None:
    """Fidelity under six activations, on CIFAR.

    The networks are your own: scripts/train_cifar.py trains them, --weights NAME=FILE brings each.
    """
    from srd_lab.reproduce.evaluation import Table4

    tracked(ctx, "reproduce table4", lambda given: Table4(given.read(TableSettings)))
