"""Fixes the thresholds below which a map counts as broken, from changes of the image that mean nothing.

    python scripts/fix_thresholds.py                    # prints, and writes attacks/thresholds.json
    python scripts/fix_thresholds.py --images 20 --dry  # a quick look, writes nothing

Every image is explained as it is and after three benign changes: JPEG compression of quality 90, a shift by one pixel to the
right (the left column is repeated), and uniform noise of one level of 8 bits. Images whose class changes are left out. Of
each image counts the change that moves its map most. tau is the lower quartile of these scores over all images, methods and
networks: three of four maps stay above it under any change that nobody would call an attack.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from attacks.budget import to_8_bits
from attacks.experiment import attack_explainer
from attacks.scores import SCORES, similarity
from attacks.thresholds import FILE
from srd_lab.data import load_data
from srd_lab.models import load_model
from srd_lab.runs.report import text_table
from srd_lab.runtime import generator
from srd_lab.types import Sample

NETWORKS = ("vgg16", "resnet18", "resnet50")  # a further one would move the thresholds
METHODS = (
    "srd",
    "lrp_zplus",
    "lrp_gamma",
    "guided_backprop",
    "grad_input",
    "gradient",
    "gradcam",
    "excitation_backprop",
)
QUALITY = 90


def jpeg(samples: list[Sample]) -> Tensor:
    """The images after JPEG compression."""
    found = []
    for sample in samples:
        levels = (sample.image * 255).round().byte().permute(1, 2, 0).numpy()
        stream = io.BytesIO()
        Image.fromarray(levels).save(stream, "JPEG", quality=QUALITY)
        found.append(torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1).float() / 255)
    return torch.stack(found)


def shifted(samples: list[Sample]) -> Tensor:
    """The images one pixel further to the right."""
    x = torch.stack([sample.image for sample in samples])
    return torch.cat([x[..., :1], x[..., :-1]], -1)


def noisy(samples: list[Sample]) -> Tensor:
    """The images with every value one level lower, higher or the same."""
    drawn = [
        torch.randint(-1, 2, s.image.shape, generator=generator(0, "benign", s.name)) / 255 for s in samples
    ]
    return to_8_bits((torch.stack([s.image for s in samples]) + torch.stack(drawn)).clamp(0, 1))


CHANGES: dict[str, Callable[[list[Sample]], Tensor]] = {"JPEG 90": jpeg, "shift": shifted, "noise": noisy}


def benign(model: nn.Module, samples: list[Sample], method: str) -> dict[str, dict[str, Tensor]]:
    """change -> score -> (N,), NaN where the class changes."""
    explainer = attack_explainer(method, "contrastive")
    x = torch.stack([sample.image for sample in samples])
    before, logits = explainer.explain_with_logits(model, x)
    target, found = logits.argmax(1), {}
    for name, change in CHANGES.items():
        raw, after = explainer.explain_with_logits(model, change(samples), target)
        lost = after.argmax(1) != target
        scores = similarity(raw, before, (x.shape[2], x.shape[3]))
        found[name] = {score: values.masked_fill(lost, torch.nan) for score, values in scores.items()}
    return found


@click.command()
@click.option(
    "--images", default=100, show_default=True, type=click.IntRange(1), help="Images of scenes per network."
)
@click.option("--dry", is_flag=True, help="Write nothing.")
def main(images: int, dry: bool) -> None:
    """Fix the thresholds on the bundled networks and images."""
    data = load_data()
    samples = [data[i] for i in range(images)]
    pooled: dict[str, list[Tensor]] = {score: [] for score in SCORES}
    rows = []
    for network in NETWORKS:
        model = load_model(network, device="cpu")
        for method in METHODS:
            parts = [benign(model, samples[i : i + 20], method) for i in range(0, images, 20)]
            cells = [network, method]
            for score in SCORES:
                each = torch.stack([torch.cat([part[change][score] for part in parts]) for change in CHANGES])
                worst = each.nan_to_num(torch.inf).amin(0)
                pooled[score].append(worst[worst.isfinite()])
                cells.append(" / ".join(f"{values.nanmean():.2f}" for values in each))
            rows.append(cells)
    click.echo(text_table(["network", "method", *(f"{s}: {' / '.join(CHANGES)}" for s in SCORES)], rows))
    at = torch.tensor([0.25, 0.5, 0.75]).double()
    quartiles = {score: torch.cat(values).quantile(at).tolist() for score, values in pooled.items()}
    tau = {score: round(values[0], 2) for score, values in quartiles.items()}
    click.echo(f"\ntau: {tau}; quartiles {quartiles}")
    if not dry:
        said = {
            "changes": list(CHANGES),
            "images": images,
            "networks": list(NETWORKS),
            "methods": METHODS,
        }
        content = {"tau": tau, "quartiles": quartiles, "made by": "python scripts/fix_thresholds.py", **said}
        FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
