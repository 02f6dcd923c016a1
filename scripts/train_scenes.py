"""Trains one of the small networks that come with srd-lab, on ``scenes``, in ten minutes on one CPU core.

    python scripts/train_scenes.py vgg16 --epochs 14 --seed 0 --out srd_lab/weights

AdamW with a one-cycle learning rate; flips, quarter turns, shifts and noise. The epoch that is best on
``val`` is kept. resnet50 starts with blocks that do nothing. VGGs train with batch normalisation behind
each convolution, which is folded into weight and bias when saved. What is saved is rounded to 16 bits, and
the accuracies on the card are those of the saved file read by ``load_model``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from srd_lab.data.scenes import Scenes
from srd_lab.models import SCENES_NETWORKS, SCENES_PREPROCESSING, Classifier, load_model, scenes_network
from srd_lab.runtime import generator

SHIFT = 4


def stack(split: str, length: int | None = None) -> tuple[Tensor, Tensor]:
    """The split as pixels (N, 3, 64, 64) uint8 and labels (N,)."""
    scenes = Scenes(split, length=length)
    pixels = np.stack([scenes.render(k)[0] for k in range(len(scenes))])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), scenes.labels


def augment(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Pixels (N, 3, H, W) uint8 to [0, 1], turned, mirrored, shifted by up to ``SHIFT`` pixels, with noise.

    All images of a batch take the same turn: with batches of 100 that is variety enough, and cheap.
    """
    turns, mirror, top, left = (
        int(torch.randint(n, (), generator=rng)) for n in (4, 2, 2 * SHIFT + 1, 2 * SHIFT + 1)
    )
    x = torch.rot90(pixels, turns, (2, 3)).float() / 255
    x = x.flip(3) if mirror else x
    height, width = x.shape[2:]
    x = nn.functional.pad(x, (SHIFT,) * 4, mode="replicate")[:, :, top : top + height, left : left + width]
    strength = 0.04 * torch.rand((len(x), 1, 1, 1), generator=rng)
    return (x + strength * torch.randn(x.shape, generator=rng)).clamp_(0, 1)


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Share of the images that ``model``, in eval mode, puts in their class."""
    model.eval()
    hits = sum(
        int((model(x.float() / 255).argmax(1) == y).sum())
        for x, y in zip(pixels.split(250), labels.split(250), strict=True)
    )
    return hits / len(labels)


def train_epoch(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    rng: torch.Generator,
    batch: int,
) -> float:
    """One pass in random order; returns the mean loss."""
    model.train()
    losses = []
    for indices in torch.randperm(len(data[1]), generator=rng).split(batch):
        x = augment(data[0][indices], rng).contiguous(memory_format=torch.channels_last)
        loss = nn.functional.cross_entropy(model(x), data[1][indices])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def start_as_identity(network: nn.Module) -> None:
    """Zeroes the last scale of each three-layer block: resnet50 learns sooner from blocks that do nothing."""
    for module in network.modules():
        last = getattr(module, "bn3", None)
        if isinstance(last, nn.BatchNorm2d):
            nn.init.zeros_(last.weight)


def train(name: str, epochs: int, seed: int, length: int | None, rate: float, batch: int = 100) -> nn.Module:
    """The network after the epoch that did best on ``val``."""
    torch.manual_seed(seed)  # for the initial weights and dropout; all else draws from the generator
    rng = generator(seed, "train", name)
    network = scenes_network(name, batch_norm=True)
    start_as_identity(network)
    model = Classifier(network, SCENES_PREPROCESSING.mean, SCENES_PREPROCESSING.std).to(
        memory_format=torch.channels_last
    )
    data, val = stack("train", length), stack("val")
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    steps = epochs * -(-len(data[1]) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.25)
    best, kept = -1.0, network.state_dict()
    for epoch in range(epochs):
        start = time.perf_counter()
        loss = train_epoch(model, data, optimiser, schedule, rng, batch)
        score = accuracy(model, *val)
        click.echo(
            f"{name} epoch {epoch + 1} loss {loss:.3f} val {score:.4f} {time.perf_counter() - start:.0f} s"
        )
        if score >= best:
            best, kept = score, {key: value.clone() for key, value in network.state_dict().items()}
    network.load_state_dict(kept)
    return network.eval()


def fold(features: nn.Sequential) -> dict[str, Tensor]:
    """State of ``features`` with each batch norm folded into the convolution before it, and numbered so.

    gamma (w x + b - mean) / sqrt(var + eps) + beta = (s w) x + (s (b - mean) + beta), s = gamma / sqrt(var +
    eps).
    """
    state, place = {}, 0
    layers = list(features)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.BatchNorm2d):
            continue
        if isinstance(layer, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
            conv = {key: value.double() for key, value in layer.state_dict().items()}
            norm = {key: value.double() for key, value in following.state_dict().items()}
            scale = norm["weight"] / (norm["running_var"] + following.eps).sqrt()
            state[f"features.{place}.weight"] = (conv["weight"] * scale[:, None, None, None]).float()
            bias = (conv["bias"] - norm["running_mean"]) * scale + norm["bias"]
            state[f"features.{place}.bias"] = bias.float()
        place += 1
    return state


def rounded(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The state in 16 bits, integers as they are; refuses overflow, and variances that would vanish."""
    arrays = {}
    for key, value in state.items():
        array = value.detach().contiguous().numpy()
        if array.dtype.kind == "f":
            with np.errstate(over="ignore"):  # an error of its own follows
                array = array.astype(np.float16)
            if not np.isfinite(array).all() or (key.endswith("running_var") and array.min() < 1e-4):
                raise click.ClickException(f"{key} does not fit into 16 bits")
        arrays[key] = array
    return arrays


def save(name: str, network: nn.Module, out: Path) -> Path:
    state = network.state_dict()
    if name.startswith("vgg"):
        rest = {key: value for key, value in state.items() if not key.startswith("features.")}
        state = {**fold(network.get_submodule("features")), **rest}  # type: ignore[arg-type]
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{name}_scenes.npz"
    np.savez_compressed(file, **rounded(state))  # type: ignore[arg-type]
    return file


def update_cards(out: Path, card: dict[str, Any]) -> None:
    """Puts ``card`` in the place of the one of the same name."""
    file = out / "cards.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    others = [other for other in known if other["name"] != card["name"]]
    ordered = sorted([*others, card], key=lambda one: SCENES_NETWORKS.index(one["name"]))
    file.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


@click.command()
@click.argument("name", type=click.Choice(SCENES_NETWORKS))
@click.option("--epochs", default=14, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--rate", default=0.004, show_default=True, type=float, help="Highest learning rate.")
@click.option(
    "--length", default=None, type=click.IntRange(10), help="Train on the first so many images only."
)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option(
    "--out", default="srd_lab/weights", show_default=True, type=click.Path(file_okay=False, path_type=Path)
)
def main(name: str, epochs: int, seed: int, rate: float, length: int | None, threads: int, out: Path) -> None:
    """Train the scenes network NAME; writes NAME_scenes.npz and its entry in cards.json."""
    torch.set_num_threads(threads)
    network = train(name, epochs, seed, length, rate)
    file = save(name, network, out)
    model = load_model(name, weights=file, device="cpu")
    scores = {split: round(accuracy(model, *stack(split)), 4) for split in ("val", "test")}
    command = f"python scripts/train_scenes.py {name} --epochs {epochs} --seed {seed} --rate {rate:g}"
    card = {
        "name": name,
        "file": file.name,
        "width": "1/8" if name.startswith("vgg") else "1/4",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data": "scenes, 20,000 training images of 64 x 64" if length is None else f"scenes, first {length}",
        "test_accuracy": scores["test"],
        "val_accuracy": scores["val"],
        "seed": seed,
        "epochs": epochs,
        "command": command + (f" --length {length}" if length else ""),
    }
    update_cards(out, card)
    click.echo(
        f"{file}: {file.stat().st_size / 1e6:.2f} MB, val {scores['val']:.2%}, test {scores['test']:.2%}"
    )


if __name__ == "__main__":
    main()
