"""Trains a network on CIFAR, for Table 4 of the SRD paper: the same network with six activations.

    python scripts/train_cifar.py resnet8_elu --data cifar10:PATH --epochs 5 --out weights
    python scripts/train_cifar.py resnet50_3x3_gelu --data cifar100:PATH --epochs 200 --device cuda --out weights

SGD with Nesterov momentum and a one-cycle learning rate, cross-entropy; random crops of the image padded by 4 pixels,
and flips. Writes NAME.safetensors with the weights of the last epoch, and NAME.json, which says what was done. The paper
does not give its recipe; the second command's is the usual one for ResNet50.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from srd_lab.data import load_batches, load_data
from srd_lab.errors import SrdLabError
from srd_lab.models import Classifier, load_model
from srd_lab.models.cifar import CIFAR_NETWORKS, CIFAR_PREPROCESSING, cifar_network
from srd_lab.runtime import full_precision, generator, pick_device

PADDING = 4
BATCH = 128
DECAY = 5e-4


def stack(data: str, split: str) -> tuple[Tensor, Tensor, int]:
    """The split as pixels (N, 3, 32, 32) uint8 and labels (N,), and the number of classes."""
    dataset = load_data(data, split)
    (loaded,) = load_batches(dataset, [range(len(dataset))], workers=0)
    pixels = torch.stack([(255 * sample.image).round().to(torch.uint8) for sample in loaded.samples])
    labels = torch.tensor([sample.label for sample in loaded.samples])
    return pixels, labels, len(dataset.classes)


def augment(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Pixels (N, 3, 32, 32) uint8 to [0, 1]: every image cut anew out of its padded self, and half of them mirrored."""
    n, _, height, width = pixels.shape
    padded = nn.functional.pad(pixels, (PADDING,) * 4)
    top, left = torch.randint(2 * PADDING + 1, (2, n), generator=rng)
    rows, columns = torch.arange(height) + top[:, None], torch.arange(width) + left[:, None]
    mirrored = torch.rand(n, generator=rng) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    index = torch.arange(n)[:, None, None]
    cut = padded[index, :, rows[:, :, None], columns[:, None, :]]  # (N, H, W, 3)
    return cut.permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor, device: torch.device) -> float:
    """Share of the images that ``model``, in eval mode, puts in their class."""
    model.eval()
    parts = zip(pixels.split(500), labels.split(500), strict=True)
    return sum(int((model(x.to(device).float() / 255).argmax(1).cpu() == y).sum()) for x, y in parts) / len(
        labels
    )


def train(name: str, data: str, epochs: int, rate: float, seed: int, device: torch.device) -> nn.Module:
    """The network after its last epoch."""
    pixels, labels, classes = stack(data, "train")
    torch.manual_seed(seed)  # for the initial weights; all else draws from the generator
    rng = generator(seed, "train", name)
    network = cifar_network(name, classes)
    model = Classifier(network, CIFAR_PREPROCESSING.mean, CIFAR_PREPROCESSING.std).to(
        device, memory_format=torch.channels_last
    )
    decayed = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.25)
    for epoch in range(epochs):
        start, losses = time.perf_counter(), []
        model.train()
        for some in torch.randperm(len(labels), generator=rng).split(BATCH):
            if len(some) < BATCH:
                continue
            x = augment(pixels[some], rng).to(device).contiguous(memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(model(x), labels[some].to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.detach())
        mean = float(torch.stack(losses).mean())
        click.echo(f"{name} epoch {epoch + 1} loss {mean:.3f} {time.perf_counter() - start:.0f} s")
    return network.cpu().eval()


@click.command()
@click.argument("name", type=click.Choice(CIFAR_NETWORKS), metavar="NAME")
@click.option("--data", required=True, help="cifar10:PATH or cifar100:PATH.")
@click.option(
    "--test", help="The same for the test images, where they are in another file. [default: --data]"
)
@click.option("--epochs", default=200, show_default=True, type=click.IntRange(1))
@click.option("--rate", default=0.1, show_default=True, type=float, help="Highest learning rate.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--device", default="auto", show_default=True)
@click.option("--out", default="weights", show_default=True, type=click.Path(file_okay=False, path_type=Path))
def main(
    name: str, data: str, test: str | None, epochs: int, rate: float, seed: int, device: str, out: Path
) -> None:
    """Train the CIFAR network NAME, such as resnet20, resnet8_elu or resnet50_3x3_gelu."""
    full_precision()
    try:
        place = pick_device(device)
        pixels, labels, _ = stack(test or data, "test")  # whether it is there, before the work
        network = train(name, data, epochs, rate, seed, place)
        out.mkdir(parents=True, exist_ok=True)
        file = out / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, file)
        model = load_model(name, data, file, str(place))
        score = accuracy(model, pixels, labels, place)
    except SrdLabError as error:
        raise click.ClickException(str(error)) from None
    source = data.partition(":")[0]
    card = {
        "name": name,
        "data": source,
        "epochs": epochs,
        "rate": rate,
        "seed": seed,
        "test_accuracy": score,
    }
    (out / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    click.echo(f"{file}: test accuracy {score:.2%}")


if __name__ == "__main__":
    main()
