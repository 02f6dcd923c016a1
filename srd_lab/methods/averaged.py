"""Gradients averaged over many points: Integrated Gradients along a path, SmoothGrad in a cloud of noise.

- Integrated Gradients: ``x * mean_k d y_c / d (x k / m)``, from a zero baseline (Sundararajan et al. 2017).
- SmoothGrad: ``|mean_k d y_c / d (x + noise_k)|``, Gaussian noise of standard deviation ``noise * (max x - min x)``
  (Smilkov et al. 2017).

Both attribute to the normalised input where the model begins with a normalisation layer; zero is the mean colour
there. When the points take several passes, a differentiable map recomputes each of them backwards.

Example
-------
>>> IntegratedGradients(steps=5).explain(model, x, target=3).shape    # (N, H, W), signed
torch.Size([2, 64, 64])
>>> SmoothGrad(samples=5).explain(model, x).shape                     # (N, H, W), >= 0
torch.Size([2, 64, 64])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srd_lab import maps
from srd_lab.catalogue import method
from srd_lab.engine.attribution import attribution, slope_of
from srd_lab.engine.interceptor import Watch
from srd_lab.engine.recompute import recomputed
from srd_lab.errors import BadValue
from srd_lab.logits import check_target
from srd_lab.runtime import generator
from srd_lab.types import Explainer

Points = Callable[
    [Tensor, range], Tensor
]  # the points of these numbers around x (N, C, H, W): (points, N, C, H, W)


@method(
    "integrated_gradients",
    title="InteGrad",
    paper="Sundararajan et al. 2017",
    resolution="input",
    passes="91",
    tested="captum",
)
@dataclass(frozen=True)
class IntegratedGradients(Explainer):
    """``x * mean over k = 1..steps of the gradient at x k / steps``; the baseline is zero (normalised).

    steps : points of the path, > 0.
    channels : how the colour channels become one number, see :data:`srd_lab.maps.CHANNELS`.
    images_at_once : images per forward pass; None keeps a pass near 30 images of 224 x 224.
    """

    steps: int = 30
    channels: str = "sum"
    images_at_once: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BadValue(f"integrated gradients needs steps >= 1, got {self.steps}")

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Share of every pixel in the logit's rise from the baseline (N, H, W); the model's output."""

        def on_the_path(given: Tensor, some: range) -> Tensor:
            fractions = (
                torch.arange(some.start + 1, some.stop + 1, dtype=x.dtype, device=x.device) / self.steps
            )
            return fractions[:, None, None, None, None] * given

        given, slope, logits = _mean_slope(model, x, target, on_the_path, self.steps, self.images_at_once)
        return maps.reduce_channels(given * slope, self.channels), logits


@method(
    "smoothgrad",
    title="SmoothGrad",
    paper="Smilkov et al. 2017",
    resolution="input",
    passes="76",
    tested="captum",
)
@dataclass(frozen=True)
class SmoothGrad(Explainer):
    """Gradient averaged over noisy copies of the image; ``channels="abs_sum"``, so the map is >= 0.

    samples : copies, > 0; noise : standard deviation in parts of the (normalised) image's range.
    channels : how the colour channels become one number, see :data:`srd_lab.maps.CHANNELS`.
    seed : decides the noise, which is the same for every image, whatever batch it is in.
    images_at_once : see :class:`IntegratedGradients`.
    """

    samples: int = 25
    noise: float = 0.15
    channels: str = "abs_sum"
    seed: int = 0
    images_at_once: int | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.noise < 0:
            raise BadValue(
                f"smoothgrad needs samples >= 1 and noise >= 0, got {self.samples} and {self.noise}"
            )

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Smoothed sensitivity per pixel (N, H, W); the model's output."""

        def around(given: Tensor, some: range) -> Tensor:
            size = self.noise * (given.amax((1, 2, 3), True) - given.amin((1, 2, 3), True))
            drawn = [
                torch.randn(
                    given.shape[1:], generator=generator(self.seed, "smoothgrad", k), dtype=torch.float32
                )
                for k in some
            ]
            return given + size * torch.stack(drawn).to(given)[:, None]

        _, slope, logits = _mean_slope(model, x, target, around, self.samples, self.images_at_once)
        return maps.reduce_channels(slope, self.channels), logits


def _mean_slope(
    model: nn.Module, x: Tensor, target: Tensor | int | None, points: Points, count: int, at_once: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The (normalised) input, the mean gradient of the target logits at ``count`` points around it, and the logits."""
    with attribution(model, x) as run, torch.set_grad_enabled(run.differentiable):
        n, _, h, w = x.shape
        together = max(1, (at_once or max(1, 30 * 224 * 224 // (h * w))) // n)
        chunks = [range(first, min(count, first + together)) for first in range(0, count, together)]
        logits = Watch(run.network).run(run.normalise(x.clone()))
        classes = check_target(target, logits)

        def part(some: range) -> Callable[[Tensor], Tensor]:
            return lambda base: _slopes(run.network, points(base, some), classes)

        if len(chunks) == 1 or not run.differentiable:
            parts = [part(some)(run.given) for some in chunks]
        else:
            parts = [recomputed(part(some), run.given) for some in chunks]
        slope = torch.stack(parts).sum(0) / count
        return run.finish(run.given), slope, logits


def _slopes(network: nn.Module, points: Tensor, classes: Tensor) -> Tensor:
    """Sum over points (points, N, C, H, W) of the gradients of the target logits there, (N, C, H, W)."""
    differentiable = torch.is_grad_enabled() and points.requires_grad
    count = len(points)
    with torch.enable_grad():
        flat = points.flatten(0, 1)
        flat = flat if differentiable else flat.detach().requires_grad_()
        logits = Watch(network).run(flat.clone())  # a network may change its input in place
        score = logits.gather(1, classes.repeat(count)[:, None]).sum()
        slope = slope_of(score, flat, differentiable=differentiable)
    return slope.unflatten(0, (count, -1)).sum(0)
