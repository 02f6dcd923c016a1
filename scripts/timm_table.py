"""Which methods explain which of timm's networks: a map, or the reason why there is none.

    python scripts/timm_table.py --markdown --jobs 2    # 52 networks of random weights, no download; half an hour
    python scripts/timm_table.py --network resnet18 --network vit_tiny_patch16_224 --method srd

A map counts where it is finite, the same for an image alone, and the same for trainable and frozen weights (Score-CAM: where
it is finite, on one image); one that is not is marked WRONG.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn

from srd_lab.cli.errors import command_errors
from srd_lab.errors import SrdLabError
from srd_lab.methods.cam_by_passes import ScoreCAM
from srd_lab.registry import make_explainer
from srd_lab.runs.report import progress, text_table
from srd_lab.types import Explainer

METHODS = ("srd", "srd_high", "gradcam", "lrp_epsilon", "integrated_gradients", "scorecam")


class Network(NamedTuple):
    """How a network is made small: its side in pixels, and the options of ``timm.create_model``."""

    side: int = 64
    options: Mapping[str, Any] = {}


_64, _SHORT = {"img_size": 64}, {"img_size": 64, "depth": 2}
NETWORKS: dict[str, Network] = {
    **dict.fromkeys(
        (
            *(
                "resnet18",
                "resnet26d",
                "resnext26ts",
                "seresnet18",
                "ecaresnet26t",
                "skresnet18",
                "resnest14d",
            ),
            *("res2net50_26w_4s", "gcresnext26ts", "regnetx_002", "regnety_002", "nf_regnet_b0", "nfnet_l0"),
            *("densenet121", "dla46_c", "dpn48b", "ese_vovnet19b_slim", "hrnet_w18_small", "hgnetv2_b0"),
            *(
                "repvgg_a0",
                "efficientnet_b0",
                "efficientnet_lite0",
                "mobilenetv2_050",
                "mobilenetv3_small_050",
            ),
            *("mobilenetv4_conv_small_050", "mixnet_s", "ghostnet_050", "rexnet_100", "lcnet_050"),
            *("convnext_atto", "convnextv2_atto", "starnet_s1", "mobilevit_xxs", "efficientvit_b0"),
            "poolformer_s12",
        ),
        Network(),
    ),
    "inception_v3": Network(80),
    **dict.fromkeys(
        ("botnet26t_256", "lambda_resnet26t", "mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224", "coat_tiny"),
        Network(options=_64),
    ),
    **dict.fromkeys(
        ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "cait_xxs24_224", "xcit_nano_12_p16_224"),
        Network(options=_SHORT),
    ),
    **dict.fromkeys(
        ("tnt_s_legacy_patch16_224", "tnt_s_patch16_224"), Network(32, {"img_size": 32, "depth": 2})
    ),
    "levit_128s": Network(96, {"img_size": 96}),
    "swin_tiny_patch4_window7_224": Network(options={"img_size": 64, "depths": (2, 1, 1, 1)}),
    "hiera_tiny_224": Network(options={"img_size": 64, "stages": (1, 1, 1, 1)}),
    "sequencer2d_s": Network(options={"layers": (1, 1, 1, 1)}),
}


def random_network(name: str) -> nn.Module:
    """timm's network of 10 classes with random weights in which nothing is neutral: float64, in eval mode."""
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **NETWORKS[name].options)
    chance = torch.Generator().manual_seed(1)

    def small(t: Tensor) -> Tensor:
        return 0.2 * torch.rand(t.shape, generator=chance) - 0.1

    for parameter in model.parameters():
        if parameter.dim() < 2 or not parameter.any():
            parameter.data += small(parameter)
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.running_mean.copy_(small(norm.running_mean))  # type: ignore[union-attr, arg-type]
    return model.double().eval()


def images_for(name: str) -> Tensor:
    """Two images of noise, (2, 3, side, side) float64 in [0, 1]."""
    side = NETWORKS[name].side
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(3)).double()


def verdict(explainer: Explainer, model: nn.Module, x: Tensor) -> str:
    """ "" for a map that is right as far as it can be told, else the refusal, or "WRONG: ..."."""
    try:
        if isinstance(explainer, ScoreCAM):  # thousands of passes per image
            found = alone = explainer.explain(model, x[1:], 1)
        else:
            found = explainer.explain(model.requires_grad_(True), x, 1)
            alone = explainer.explain(model.requires_grad_(False), x[1:], 1)
    except SrdLabError as error:
        return str(error)
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"
    if found.dim() != 3 or not found.isfinite().all():
        return f"WRONG: shape {tuple(found.shape)}, or not finite"
    if (alone[0] - found[-1]).abs().max() > 1e-6 * found[-1].abs().max():
        return "WRONG: another map for the image alone"
    return ""


def verdicts(name: str, methods: Sequence[str]) -> list[str]:
    """:func:`verdict` of each method on a network."""
    warnings.simplefilter("ignore")  # that no map has exactly 1/8 of the image's size, once per network
    model, x = random_network(name), images_for(name)
    return [verdict(make_explainer(method), model, x) for method in methods]


@click.command()
@click.option("--network", "names", multiple=True, type=click.Choice(list(NETWORKS)), help="[default: all]")
@click.option("--method", "methods", multiple=True, default=METHODS, show_default=True)
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes, of one thread each."
)
@click.option("--markdown", "as_markdown", is_flag=True, help="As a table in Markdown, reasons below.")
@command_errors
def main(names: Sequence[str], methods: Sequence[str], jobs: int, as_markdown: bool) -> None:
    """Print which methods explain which networks, and why others do not."""
    names = names or list(NETWORKS)
    cells, reasons = [], {}
    with (
        progress(len(names), "networks") as done,
        ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as processes,
    ):
        for name, said in zip(names, processes.map(verdicts, names, repeat(methods)), strict=True):
            for text in filter(None, said):
                reasons.setdefault((name, text), len(reasons) + 1)
            cells.append([name, *(f"[{reasons[name, text]}]" if text else "map" for text in said)])
            done(1)
    header = ("network", *methods)
    if as_markdown:
        lines = [header, ["---"] * len(header), *cells]
        click.echo("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    else:
        click.echo(text_table(header, cells) + "\n")
    for (name, text), number in reasons.items():
        click.echo(f"{number}. `{name}`: {text}" if as_markdown else f"[{number}] {name}: {text}")


if __name__ == "__main__":
    main()
