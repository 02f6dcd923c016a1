"""Does an explanation stay what it is? Its maps under small noise, and under a network whose weights are gone.

Noise is in normalised units. The explained class stays that of the image. Zero maps and maps that are not finite are not
scored.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srd_lab.catalogue import metric
from srd_lab.conditions import together
from srd_lab.errors import BadValue, Refused
from srd_lab.metrics.explained import Explained, check_counts, unscorable
from srd_lab.metrics.similarity import PCC, SSIM, float64
from srd_lab.runtime import derived_seed


@metric(
    "stability",
    title="Stability",
    paper="Alvarez Melis & Jaakkola 2018",
    better="lower",
    scores="robustness",
    tested="definition, quantus",
)
@dataclass(frozen=True)
class Stability:
    """Largest change of the map over the change of the image (Alvarez Melis & Jaakkola 2018; SRD, Eq. 27):
    ``max_k |map(x) - map(x + n_k)|_2 / |n_k|_2``, >= 0, lower is better.

    noise : standard deviation of the Gaussian n, in normalised units. draws : of n, >= 1.
    seed : decides the noise, together with each image's key.
    """

    noise: float = 0.1
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "draws")

    def of(self, explained: Explained) -> Tensor:
        """Scores (N,) float64, >= 0."""
        found = under_noise(explained, self.noise, self.draws, self.seed)
        change = torch.stack([_norm(map_ - explained.maps) / size for map_, size in found])
        return _scored(change.amax(0), explained)


@dataclass(frozen=True)
class _Kept:
    noise: float = 0.1
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "draws")

    def _mean(self, explained: Explained, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        before = explained.maps.abs()
        found = under_noise(explained, self.noise, self.draws, self.seed)
        return _scored(torch.stack([score(before, map_.abs()) for map_, _ in found]).mean(0), explained)


@metric(
    "ssim",
    title="SSIM under noise",
    paper="Wang et al. 2004",
    better="higher",
    scores="robustness",
    tested="scikit-image",
)
@dataclass(frozen=True)
class NoiseSSIM(_Kept):
    """Structural similarity of |map| before and after noise, the mean over its draws. In [-1, 1], higher is better.

    noise, draws, seed : see :class:`Stability`, whose noise is the same.
    """

    def of(self, explained: Explained) -> Tensor:
        """Scores (N,) float64 in [-1, 1]."""
        return self._mean(explained, SSIM().score)


@metric("pcc", title="PCC under noise", paper="Pearson", better="higher", scores="robustness", tested="scipy")
@dataclass(frozen=True)
class NoisePCC(_Kept):
    """Pearson correlation of |map| before and after noise, the mean over its draws. In [-1, 1], higher is better.

    noise, draws, seed : see :class:`Stability`, whose noise is the same.
    """

    def of(self, explained: Explained) -> Tensor:
        """Scores (N,) float64 in [-1, 1]."""
        return self._mean(explained, PCC().score)


@metric(
    "max_sensitivity",
    title="Max-sensitivity",
    paper="Yeh et al. 2019",
    better="lower",
    scores="robustness",
    tested="captum",
)
@dataclass(frozen=True)
class MaxSensitivity:
    """Largest relative change of the map within a small box around the image (Yeh et al. 2019):
    ``max_k |map(x) - map(x + n_k)|_2 / |map(x)|_2``, n uniform in [-radius, radius], >= 0, lower is better.

    radius : half the side of the box, in normalised units. draws : of n, >= 1.
    seed : decides the noise, together with each image's key.
    """

    radius: float = 0.02
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "draws")
        if not self.radius > 0:
            raise BadValue(f"max_sensitivity needs radius > 0, got {self.radius}")

    def of(self, explained: Explained) -> Tensor:
        """Scores (N,) float64, >= 0."""
        images, largest = explained.images, float64(explained.maps).new_zeros(len(explained.maps))
        with together():
            for k in range(self.draws):
                drawn = [
                    torch.rand(
                        images.x.shape[1:],
                        generator=images.generator(i, self.seed, "max_sensitivity", k),
                        dtype=torch.float32,
                    )
                    for i in range(len(images.x))
                ]
                noise = self.radius * (2 * torch.stack(drawn).to(images.x) - 1)
                largest = largest.maximum(
                    _norm(explained.again(images.x + noise / images.scale) - explained.maps)
                )
        return _scored(largest / _norm(explained.maps), explained)


@metric(
    "randomization",
    title="Randomization",
    paper="Adebayo et al. 2018",
    better="lower",
    scores="sanity",
    tested="definition",
)
@dataclass(frozen=True)
class Randomization:
    """Similarity of the map to that of a network without its weights (Adebayo et al. 2018): layers are initialised anew
    from the top downwards, in ``stages`` equal parts, and SSIM of |map| to the original is averaged over the stages. In
    [-1, 1], lower is better: a map that stays does not explain the weights.

    stages : >= 1; 1 = all layers at once; None = layer by layer. seed : decides the new weights.
    """

    stages: int | None = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "stages")

    def of(self, explained: Explained) -> Tensor:
        """Scores (N,) float64 in [-1, 1]. Raises Refused for a model of which no layer can be initialised anew."""
        return _scored(self.curve(explained).mean(1), explained)

    def curve(self, explained: Explained) -> Tensor:
        """SSIM (N, stages) float64 in [-1, 1] after each stage; errors as in :meth:`of`."""
        known, before = explained.images.of_model, explained.maps.abs()
        if self not in known:
            known[self] = randomised(explained.images.model, self.stages, self.seed)
        with together():
            found = [explained.again(explained.images.x, model) for model in known[self]]
        return torch.stack([SSIM().score(before, after.abs()) for after in found], 1)


def randomised(model: nn.Module, stages: int | None, seed: int) -> list[nn.Module]:
    """Copies of a model with its last 1/stages, 2/stages, ... of layers initialised anew; frozen, in eval mode.

    stages : None = one copy for each layer; never more than there are layers. seed : decides the new weights of every layer.

    Raises Refused for a model of which no layer can be initialised anew.
    """
    layers = [name for name, module in model.named_modules() if _new_weights(module) is not None]
    if not layers:
        raise Refused(
            "the model has no layer that can be initialised anew, so that randomization cannot be scored"
        )
    count = len(layers) if stages is None else min(stages, len(layers))
    done = [-(-len(layers) * (k + 1) // count) for k in range(count)]
    copies, current, reset = [], model, 0
    for until in done:
        current = copy.deepcopy(current)
        for name in list(reversed(layers))[reset:until]:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                # the CPU's alone: torch.manual_seed would seed those of other devices, for good
                torch.default_generator.manual_seed(derived_seed(seed, "randomization", name))
                _reset(current.get_submodule(name))
        reset = until
        copies.append(current.eval().requires_grad_(False))
    return copies


def _reset(module: nn.Module) -> None:
    """New weights, drawn on the CPU: the same on every device."""
    place = next((t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
    module.cpu()
    draw = _new_weights(module)
    assert draw is not None
    draw()
    module.to(place)


def _new_weights(module: nn.Module) -> Callable[[], None] | None:
    """What initialises a layer anew, where it has that."""
    name = "_reset_parameters" if isinstance(module, nn.MultiheadAttention) else "reset_parameters"
    return getattr(module, name, None)


def under_noise(explained: Explained, noise: float, draws: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Per draw, the prepared maps (N, H, W) of images with Gaussian noise, and the length (N,) float64 of that noise.

    explained : the images and their method.
    noise : standard deviation in normalised units, as the length is, > 0. draws : how many. seed : decides the noise.

    Raises BadValue for another ``noise``.
    """
    if not 0 < noise < math.inf:
        raise BadValue(f"noise of standard deviation {noise} makes no sense; expected a finite one > 0")

    def compute() -> list[tuple[Tensor, Tensor]]:
        images, found = explained.images, []
        with together():
            for k in range(draws):
                drawn = [
                    torch.randn(
                        images.x.shape[1:],
                        generator=images.generator(i, seed, "stability", k),
                        dtype=torch.float32,
                    )
                    for i in range(len(images.x))
                ]
                n = noise * torch.stack(drawn).to(images.x)
                size = float64(n).flatten(1).norm(dim=1)
                found.append((explained.again(images.x + n / images.scale), size))
        return found

    return explained.once(("noise", noise, draws, seed), compute)


def _norm(maps: Tensor) -> Tensor:
    return float64(maps).flatten(1).norm(dim=1)


def _scored(scores: Tensor, explained: Explained) -> Tensor:
    return scores.masked_fill(unscorable(explained.maps), torch.nan)
