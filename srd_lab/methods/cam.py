"""Class activation maps: a layer's channels, weighted by what the class logit owes them.

All are ``relu(sum_k w_k A_k)`` over the channels A_k of one layer, g = d y_c / d A, Z = h w positions:

- Grad-CAM (Selvaraju et al. 2017): w_k = mean_ij g_k.
- Grad-CAM++ (Chattopadhyay et al. 2018): w_k = sum_ij a relu(g_k), a = g_k^2 / (2 g_k^2 + g_k^3 sum_ij A_k).
- XGrad-CAM (Fu et al. 2020): w_k = sum_ij g_k A_k / sum_ij A_k.
- LayerCAM (Jiang et al. 2021): w_k = relu(g_k), a weight for every position.

The layer is the encoder output (``level="low"``, 7 x 7 of 224 x 224), the last activation at 1/8 of the image
("high", 28 x 28), or any activation by name. Those that need forward passes only are in
:mod:`srd_lab.methods.cam_by_passes`.

Tokens are laid on the grid of their patches; class and register tokens are dropped. The last layer of a vision transformer,
for "low" and "high" alike, is the last one through which all passes that the logit owes to patches
(:mod:`srd_lab.engine.last_tokens`): where the head reads a class token, what the last attention reads.

Example
-------
>>> GradCAM().explain(model, x).shape                    # the encoder output; (N, 7, 7) of 224 x 224
torch.Size([2, 2, 2])
>>> LayerCAM(level="high").explain(model, x, 3).shape    # (N, 28, 28) of 224 x 224
torch.Size([2, 8, 8])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srd_lab.catalogue import method
from srd_lab.engine import rules
from srd_lab.engine.alignment import Alignment
from srd_lab.engine.attribution import Attribution, attribution, no_gradient, slope_of
from srd_lab.engine.last_tokens import last_tokens
from srd_lab.engine.layer_trace import LayerTrace
from srd_lab.engine.layers import check_rows, distance_to_high
from srd_lab.engine.token_grid import TokenGrid
from srd_lab.errors import Refused
from srd_lab.logits import check_logits, class_logit
from srd_lab.types import Explainer


@dataclass(frozen=True)
class Layer:
    """A layer of a running model.

    run : the attribution that it is a part of.
    output : in the graph, with its channels along dimension ``channels``: a map, or tokens.
    event : which torch function of the model made it.
    grid : where the tokens lie over the image; None for a map.
    logits : (N, classes).
    """

    run: Attribution
    output: Tensor
    channels: int
    event: int
    grid: TokenGrid | None
    logits: Tensor

    @property
    def activation(self) -> Tensor:
        """The output as a map with its channels along dimension 1, (N, K, h, w)."""
        return self.laid(self.output)

    def slope(self, score: Tensor) -> Tensor:
        """The derivative of ``score`` by the activation, (N, K, h, w)."""
        return self.laid(slope_of(score, self.output, differentiable=self.run.differentiable))

    def without(self, made: Tensor, channels: Tensor) -> Tensor:
        """What the layer put out, ``made``, with zeros in channel ``channels[j]`` (n,) of row j, wherever that is a part of
        the activation: class and register tokens stay."""
        copies = made.movedim(self.channels, 1)
        mask = torch.zeros(copies.shape[:2], dtype=torch.bool, device=copies.device)
        mask[torch.arange(len(channels), device=copies.device), channels] = True
        mask = mask.view(*mask.shape, *[1] * (copies.dim() - 2))
        if self.grid is not None:
            mask = mask & self.grid.lies(copies.shape[2])
        return copies.masked_fill(mask, 0).movedim(1, self.channels)

    def laid(self, t: Tensor) -> Tensor:
        """``t``, laid out as the layer's output is, as a map with its channels along dimension 1, (N, K, h, w)."""
        return t.movedim(self.channels, 1) if self.grid is None else self.grid.lay(t, self.channels)


@contextmanager
def layer_of(
    model: nn.Module, x: Tensor, level: str | int, encoder: str | None, *, slopes: bool = True
) -> Iterator[Layer]:
    """Within: the layer at ``level`` of a forward pass, with its graph; level and encoder as in :class:`GradCAM`, slopes as
    in :func:`srd_lab.engine.attribution.attribution`.

    Raises SrdLabError for a layer that is not there or puts out neither a map nor tokens over the image.
    """
    with attribution(model, x, split=False, slopes=slopes) as run:
        trace = run.recording(LayerTrace(model, encoder))
        trace.keeps_maps = level == "high"
        logits = trace.trace(run.given)
        alignment, what = run.alignment(trace), f"level {level!r}"
        output, channels, event = _at(trace, alignment, level, logits)
        if output.dim() not in (3, 4):
            raise Refused(
                f"{what} puts out shape {tuple(output.shape)}, which is no map (N, K, h, w); "
                "name a layer that has one with level="
            )
        check_rows(what, output.shape, len(x))
        grid = None
        if output.dim() == 3:
            grid = alignment.check_tokens(event, channels, what)
        else:
            alignment.check(event, channels, what)
        yield Layer(run, output, channels, event, grid, logits)


def _at(trace: LayerTrace, alignment: Alignment, level: str | int, logits: Tensor) -> tuple[Tensor, int, int]:
    """Output, axis of the channels and event of the layer at ``level``."""
    if level == "low":
        return _low(trace, alignment, logits)
    if level == "high":
        return _high(trace, alignment, check_logits(logits))
    i = trace.call_index(level)
    event, axis = trace.made[i]
    return trace.v[i], axis, event


def _low(trace: LayerTrace, alignment: Alignment, logits: Tensor) -> tuple[Tensor, int, int]:
    """The encoder's output; that of a transformer is a part of few maps, so that the last tokens stand for it."""
    try:
        end = trace.end()
    except Refused:
        if trace.encoder.name is not None or (tokens := last_tokens(trace, alignment, logits)) is None:
            raise
        return tokens.output, tokens.channels, tokens.event
    if end.output.dim() == 3 and trace.encoder.name is None:
        tokens = last_tokens(trace, alignment, check_logits(logits))
        if tokens is not None:
            return tokens.output, tokens.channels, tokens.event
    return end.output, end.channels, end.event or 0


def _high(trace: LayerTrace, alignment: Alignment, logits: Tensor) -> tuple[Tensor, int, int]:
    """The last map at 1/8 of the image, or the last tokens where they are no farther from that size."""
    if logits.grad_fn is None:
        raise no_gradient()
    tokens = last_tokens(trace, alignment, logits)
    grid = None if tokens is None else alignment.grid(tokens.event, tokens.channels)
    if tokens is None or grid is None:
        return trace.high(logits)
    image, last = trace.shape, (tokens.output, tokens.channels, tokens.event)
    try:
        map_, channels, event = trace.high(logits)
    except Refused:
        return last
    size = map_.movedim(channels, 1).shape[2:]
    nearer = distance_to_high(grid.cells.shape, image) <= distance_to_high(size, image)
    return last if nearer else (map_, channels, event)


@dataclass(frozen=True)
class _CAM(Explainer, ABC):
    """What all share: the layer, and the sum over its channels.

    level : "low" = the encoder output, "high" = the last activation at 1/8 of the image (both of tokens, see above), or the
        name of an activation call or of a submodule (its last activation).
    encoder : see :class:`srd_lab.methods.srd.SRD`; a submodule that puts out tokens is taken as it is.
    """

    level: str | int = "low"
    encoder: str | None = None

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Class activation map (N, h, w) at ``level``, >= 0; the model's output, from one forward pass."""
        with layer_of(model, x, self.level, self.encoder) as layer:
            a, g = layer.activation, layer.slope(class_logit(layer.logits, target))
            map_ = torch.relu((self.weights(a, g) * a).sum(1))
            return layer.run.finish(map_), layer.run.finish(layer.logits)

    @abstractmethod
    def weights(self, a: Tensor, g: Tensor) -> Tensor:
        """Weights (N, K, 1, 1) or (N, K, h, w) of a layer's channels ``a`` with slopes ``g``, both (N, K, h, w)."""


@method(
    "gradcam",
    title="Grad-CAM",
    paper="Selvaraju et al. 2017",
    resolution="low",
    passes="3",
    tested="captum, grad-cam",
)
@dataclass(frozen=True)
class GradCAM(_CAM):
    """Channels weighted by their mean slope."""

    def weights(self, a: Tensor, g: Tensor) -> Tensor:
        return g.mean((2, 3), keepdim=True)


@method(
    "gradcam_pp",
    title="Grad-CAM++",
    paper="Chattopadhyay et al. 2018",
    resolution="low",
    passes="3",
    tested="definition",
)
@dataclass(frozen=True)
class GradCAMPlusPlus(_CAM):
    """Channels weighted by their positive slopes, those of rare features more; 0 / 0 is 0."""

    def weights(self, a: Tensor, g: Tensor) -> Tensor:
        # g^2 / (2 g^2 + g^3 sum A) without the common factor: squares of small slopes would underflow
        share = rules.divide(torch.ones_like(g), 2 + g * a.sum((2, 3), keepdim=True)) * (g != 0)
        return (share * torch.relu(g)).sum((2, 3), keepdim=True)


@method(
    "xgradcam", title="XGrad-CAM", paper="Fu et al. 2020", resolution="low", passes="3", tested="grad-cam"
)
@dataclass(frozen=True)
class XGradCAM(_CAM):
    """Channels weighted by their mean slope over where they are active; 0 / 0 is 0."""

    def weights(self, a: Tensor, g: Tensor) -> Tensor:
        return rules.divide((g * a).sum((2, 3), keepdim=True), a.sum((2, 3), keepdim=True))


@method(
    "layercam_low",
    title="LayerCAM, low",
    paper="Jiang et al. 2021",
    resolution="low",
    passes="3",
    tested="grad-cam",
)
@method(
    "layercam_high",
    title="LayerCAM, high",
    paper="Jiang et al. 2021",
    resolution="high",
    passes="3",
    tested="grad-cam",
    level="high",
)
@dataclass(frozen=True)
class LayerCAM(_CAM):
    """Every position of every channel weighted by its own positive slope."""

    def weights(self, a: Tensor, g: Tensor) -> Tensor:
        return torch.relu(g)
