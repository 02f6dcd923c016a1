"""How far SRD reaches: relevance conserved and leaked on torchvision's classifiers, or the operation it refuses.

    python scripts/architectures.py                             # a network of every family, random weights, 64 px
    python scripts/architectures.py --model all --images 1      # all of them (the largest take 10 GiB)
    python scripts/architectures.py --model resnet50 --weights resnet50=FILE --data imagenet:DIR --size 224

Everything is computed in float64, from the start `ones`: 1 at every position of the encoder output, so that shares do
not hang on the sign of a class score that random weights make up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean
from typing import Any

import click
import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from srd_lab.cli.errors import command_errors
from srd_lab.cli.options import WeightsFile
from srd_lab.data import batch, load_data
from srd_lab.errors import SrdLabError
from srd_lab.methods.srd import LEAKS, SRD
from srd_lab.models import load_model
from srd_lab.runs.report import progress, text_table
from srd_lab.runs.settings import weights_of

FAMILIES = (
    *("alexnet", "vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"),
    *("squeezenet1_0", "squeezenet1_1", "densenet121", "googlenet", "inception_v3"),
    *("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet1_0", "shufflenet_v2_x1_0"),
    *("efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf"),
    *("convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t"),
)
# pixels, where 64 is not enough, or does not go into patches
SIZES = {"inception_v3": 80, "maxvit_t": 224, "vit_h_14": 56}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORMS = (*_BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)


class _Unfilled(TorchFunctionMode):
    """Parameters stay as they were allocated: what torch would draw for them is overwritten anyway."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def random_network(name: str, size: int = 64, classes: int = 10, seed: int = 0) -> nn.Module:
    """torchvision's network for (N, 3, size, size) with random weights: float64, frozen, in eval mode.

    Nothing is neutral: norms scale and shift, biases, class token, position embedding and layer scale are drawn, and
    batch norms hold the statistics of a batch of noise.
    """
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, "aux_logits": False}
    elif name.startswith("vit_"):
        options = {"image_size": size}
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with _Unfilled():
            network = torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(1_000_003, generator=generator, dtype=torch.float64)  # a prime: rows do not repeat
    pool = torch.cat((numbers, numbers))
    for module in network.modules():
        for key, parameter in module.named_parameters(recurse=False):
            offset = int(torch.randint(len(numbers), (), generator=generator))
            here = pool[offset : offset + len(numbers)]
            _fill(parameter.detach(), here, *_distribution(module, key, parameter))
    network.double().eval().requires_grad_(False)  # some buffers were made in float32 all the same
    _calibrate(network, torch.randn(4, 3, size, size, generator=generator, dtype=torch.float64))
    return network


def _distribution(module: nn.Module, key: str, parameter: Tensor) -> tuple[float, float]:
    """Mean and standard deviation."""
    if isinstance(module, _NORMS) and key == "weight":
        return 1.0, 0.1
    if key.endswith("bias"):
        return 0.0, 0.1
    if isinstance(module, nn.Conv2d | nn.Linear) or key == "in_proj_weight":
        return 0.0, sqrt(2 / parameter[0].numel())
    return 0.0, 0.3


def _fill(parameter: Tensor, pool: Tensor, mean: float, deviation: float) -> None:
    for part in parameter.view(-1).split(len(pool)):
        torch.mul(pool[: len(part)], deviation, out=part).add_(mean)


def _calibrate(network: nn.Module, x: Tensor) -> None:
    norms = [module for module in network.modules() if isinstance(module, _BATCH_NORMS)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = 1.0
    with torch.no_grad():
        network(x)
    for norm in norms:
        norm.eval().running_var.clamp_(min=0.1)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Reach:
    """What SRD does on one network: shares are means over the images.

    calls : activation calls of the encoder. conserved, leaks : shares of the relevance at the encoder output.
    spread : sum |R| / |sum R| of the input map, 1 where relevance has one sign.
    refusal : what SRD said, "" where it took the network.
    """

    name: str
    size: int
    calls: int = 0
    conserved: float = 0.0
    leaks: tuple[float, ...] = ()
    spread: float = 0.0
    refusal: str = ""


def reach(name: str, model: nn.Module, x: Tensor, method: SRD) -> Reach:
    """What ``method`` does on ``model`` and images ``x`` (N, 3, H, W)."""
    size = x.shape[-1]
    try:
        relevance = method.relevance(model, x)
        leaks = method.leaks(model, x)
        conserved = method.conserved(model, x)
    except SrdLabError as error:
        return Reach(name, size, refusal=str(error))
    map_ = relevance["input"].flatten(1)
    return Reach(
        name,
        size,
        len(relevance) - 1,
        float(conserved.mean()),
        tuple(float(leaks[cause].mean()) for cause in LEAKS),
        mean((map_.abs().sum(1) / map_.sum(1).abs()).tolist()),
    )


HEADER = ("architecture", "px", "activations", "conserved", *LEAKS, "|R| / R")


def rows(found: Sequence[Reach]) -> list[list[str]]:
    """The table's cells; what is only rounding is shown as 0."""

    def share(value: float) -> str:
        return f"{value:.4f}" if abs(value) > 1e-9 else "0"

    return [
        [r.name, str(r.size), f"refuses: {r.refusal}"]
        if r.refusal
        else [
            *(r.name, str(r.size), str(r.calls), share(r.conserved)),
            *map(share, r.leaks),
            f"{r.spread:.2f}",
        ]
        for r in found
    ]


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The same as a table in markdown."""
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


@click.command()
@click.option("--model", "models", multiple=True, help="Name, repeatable, or all. [default: every family]")
@click.option("--size", type=click.IntRange(32), help="Pixels. [default: 64 where the network can]")
@click.option("--images", default=2, show_default=True, type=click.IntRange(1), help="Images per network.")
@click.option("--start", default="ones", show_default=True, help="Relevance at the encoder output.")
@click.option("--weights", multiple=True, type=WeightsFile(), help="NAME=FILE of an ImageNet classifier.")
@click.option("--data", help="Where images come from, as srd-lab has it. [default: noise]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of weights and noise.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print a table in markdown too.")
@command_errors
def main(
    models: tuple[str, ...],
    size: int | None,
    images: int,
    start: str,
    weights: tuple[str, ...],
    data: str | None,
    seed: int,
    as_markdown: bool,
) -> None:
    """Print what SRD conserves on torchvision's classifiers, and where the rest goes."""
    names = [*models] or [*FAMILIES]
    if names == ["all"]:
        names = torchvision.models.list_models(module=torchvision.models)
    files = weights_of(weights, names)
    found = []
    with progress(len(names), "networks") as done:
        for name in names:
            side = size or SIZES.get(name, 64)
            noise = torch.Generator().manual_seed(seed + 1)
            if data is None:
                x = torch.randn(images, 3, side, side, generator=noise, dtype=torch.float64)
            else:
                pictures = load_data(data, size=side, limit=images)
                x = batch(pictures, range(len(pictures)))[0].double()
            if files[name] is None:
                network = random_network(name, side, seed=seed)
            else:
                network = load_model(name, "imagenet", files[name], device="cpu").double()
            found.append(reach(name, network, x, SRD(start=start)))
            done(1)
    cells = rows(found)
    full = [row + [""] * (len(HEADER) - len(row)) for row in cells]
    click.echo(text_table(HEADER, full))
    if as_markdown:
        click.echo("\n" + markdown(HEADER, full))


if __name__ == "__main__":
    main()
