"""Controls: maps that know nothing of the network. A method that does not beat them explains nothing.

- Random: uniform noise, seeded by the image itself.
- Sobel: the strength of edges (Sobel & Feldman 1968; as a control, Adebayo et al. 2018).

Example
-------
>>> Random(seed=1).explain(model, x).shape          # (N, H, W), in [0, 1)
torch.Size([2, 64, 64])
>>> Sobel().explain(model, torch.ones_like(x)).max()    # (N, H, W), >= 0: no edges
tensor(0.)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab.catalogue import method
from srd_lab.engine.attribution import plain_logits
from srd_lab.engine.preconditions import check_input
from srd_lab.errors import NoGradient
from srd_lab.logits import check_target
from srd_lab.runtime import generator
from srd_lab.types import Explainer


@method(
    "random",
    title="Random",
    paper="control",
    resolution="input",
    attackable=False,
    passes="1",
    tested="its moments",
)
@dataclass(frozen=True)
class Random(Explainer):
    """Uniform noise; the same for the same image, in whatever batch it is, and another for another.

    seed : decides the noise, together with the image's pixels.
    """

    seed: int = 0

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Noise in [0, 1), (N, H, W); not differentiable in x, which is refused; the model's output."""
        check_input(x, model)
        if x.requires_grad and torch.is_grad_enabled():
            raise NoGradient("random maps have no derivative; x must not ask for a gradient")
        logits = _logits(model, x, target)
        drawn = [
            torch.rand(
                x.shape[2:], generator=generator(self.seed, "random", _digest(image)), dtype=torch.float32
            )
            for image in x
        ]
        return torch.stack(drawn).to(x), logits


@method("sobel", title="Sobel edges", paper="control", resolution="input", passes="1", tested="scikit-image")
@dataclass(frozen=True)
class Sobel(Explainer):
    """Length of the brightness gradient, by Sobel's filters; edges of the image are repeated outwards."""

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Strength of edges (N, H, W), >= 0; the model's output."""
        logits = _logits(model, x, target)
        across = x.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
        filters = torch.stack([across, across.T])[:, None]
        square = F.conv2d(F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), "replicate"), filters).square().sum(1)
        flat = square == 0  # where the root has no derivative
        return square.masked_fill(flat, 1).sqrt().masked_fill(flat, 0), logits


def _logits(model: nn.Module, x: Tensor, target: Tensor | int | None) -> Tensor:
    logits = plain_logits(model, x)
    check_target(target, logits)
    return logits


def _digest(image: Tensor) -> str:
    return hashlib.sha256(image.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
