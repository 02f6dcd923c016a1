"""Class activation maps whose weights come from forward passes: one per channel of the layer, no gradient.

- Score-CAM (Wang et al. 2020): w = softmax_k of y_c(x * M_k), M_k the channel stretched to the image and to [0, 1].
- Ablation-CAM (Ramaswamy et al. 2020): w_k = (y_c - y_c without channel k) / y_c.

The maps are ``relu(sum_k w_k A_k)`` of one layer; see :mod:`srd_lab.methods.cam` for the choice of it. The passes run
in batches of bounded size. Ablation-CAM runs what lies in front of the layer for one image only, and what lies behind
it for a batch of ablated channels; where a network cannot mix the two (a concatenation, say), all of it for the batch.
Channels that are constant (dead ones, mostly) share one pass.

Example
-------
>>> ScoreCAM().explain(model, x[:1]).shape               # the encoder output; (N, 7, 7) of 224 x 224
torch.Size([1, 2, 2])
>>> AblationCAM(level="high").explain(model, x[:1]).shape    # (N, 28, 28) of 224 x 224
torch.Size([1, 8, 8])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srd_lab import maps
from srd_lab.catalogue import method
from srd_lab.engine import rules
from srd_lab.engine.interceptor import Exchange, Watch
from srd_lab.engine.recompute import recomputed
from srd_lab.errors import Refused, SrdLabError, first_line
from srd_lab.logits import check_target
from srd_lab.methods.cam import Layer, layer_of
from srd_lab.normalise import split_normalisation
from srd_lab.runtime import fast_layout, is_out_of_memory
from srd_lab.types import Explainer

_OFF = 1e-3  # of a layer's largest value, that it may be off by for one image, by rounding
_ABLATED_AT_ONCE = 2**23  # numbers in the copies of a layer: 32 MiB
_PIXELS_AT_ONCE = 32 * 224 * 224


@dataclass(frozen=True)
class _PassCAM(Explainer, ABC):
    """What both share.

    level, encoder : see :class:`srd_lab.methods.cam.GradCAM`.
    images_at_once : images per forward pass; None keeps a pass near 32 images of 224 x 224.
    """

    level: str | int = "low"
    encoder: str | None = None
    images_at_once: int | None = None

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Class activation map (N, h, w) at ``level``, >= 0; the model's output.

        A differentiable map recomputes its passes backwards instead of storing them all.
        """
        with layer_of(model, x, self.level, self.encoder, slopes=False) as layer:
            run, classes = layer.run, check_target(target, layer.logits)
            a, logits = run.finish(layer.activation), run.finish(layer.logits)
        with torch.set_grad_enabled(run.differentiable):
            try:
                rows = [
                    self.weights(model, x[i : i + 1], a[i], layer, logits[i, c], int(c))
                    for i, c in enumerate(classes.tolist())
                ]
            except SrdLabError:
                raise
            except Exception as error:  # whatever a model raises that takes a certain number of images, say
                if is_out_of_memory(error):
                    raise
                raise Refused(
                    "the model cannot be run on the images that this method makes, in batches of other sizes: "
                    f"{first_line(error)}; use a method that runs it once"
                ) from error
            return torch.relu(torch.einsum("nk,nkhw->nhw", torch.stack(rows), a)), logits

    @abstractmethod
    def weights(
        self, model: nn.Module, x: Tensor, a: Tensor, layer: Layer, score: Tensor, target: int
    ) -> Tensor:
        """Weights (K,) of the channels ``a`` (K, h, w) of one image x (1, C, H, W).

        model : the network. layer : that the channels are of. score : the logit of class ``target``.
        """


@method(
    "scorecam",
    title="Score-CAM",
    paper="Wang et al. 2020",
    resolution="low",
    passes="1 + K",
    tested="grad-cam",
)
@dataclass(frozen=True)
class ScoreCAM(_PassCAM):
    """Channels weighted by the logit of the image seen through them; the masks multiply the normalised image.

    level, encoder : see :class:`srd_lab.methods.cam.GradCAM`.
    images_at_once : masked images per forward pass; None keeps a pass near 32 images of 224 x 224.
    """

    def weights(
        self, model: nn.Module, x: Tensor, a: Tensor, layer: Layer, score: Tensor, target: int
    ) -> Tensor:
        normalise, network = split_normalisation(model)
        given = normalise(x)
        layout = fast_layout(network, given)
        at_once = self.images_at_once or max(1, _PIXELS_AT_ONCE // (x.shape[2] * x.shape[3]))

        def seen(channels: Tensor, image: Tensor) -> Tensor:
            masks = _to_unit_range(maps.upsample(channels, (x.shape[2], x.shape[3])))
            masks = masks.masked_fill(_constant(channels)[:, None, None], 0)  # rounding is no structure
            views = (image * masks[:, None]).contiguous(memory_format=layout)
            return Watch(network).run(views)[:, target].to(a)  # logits may be of fewer bits

        constant = _constant(a)
        index = torch.cat([(~constant).nonzero()[:, 0], constant.nonzero()[:1, 0]])
        scores = torch.cat([recomputed(seen, a[some], given) for some in index.split(at_once)])
        scores = torch.zeros_like(a[:, 0, 0]).index_put((index,), scores)
        return torch.softmax(torch.where(constant, scores[index[-1:]], scores), 0)


@method(
    "ablationcam",
    title="Ablation-CAM",
    paper="Ramaswamy et al. 2020",
    resolution="low",
    passes="1 + K tails",
    tested="grad-cam",
)
@dataclass(frozen=True)
class AblationCAM(_PassCAM):
    """Channels weighted by the share of the logit that goes when they are set to zero; a logit of 0 gives weights of 0.

    level, encoder : see :class:`srd_lab.methods.cam.GradCAM`.
    images_at_once : ablated copies of the layer per pass; None keeps them near 32 MiB.
    """

    def weights(
        self, model: nn.Module, x: Tensor, a: Tensor, layer: Layer, score: Tensor, target: int
    ) -> Tensor:
        at_once = self.images_at_once or max(1, _ABLATED_AT_ONCE // a.numel())
        whole_at_once = min(at_once, max(1, _PIXELS_AT_ONCE // (x.shape[2] * x.shape[3])))
        alive = (a != 0).flatten(1).any(1).nonzero()[:, 0]

        def check_same(made: Tensor) -> None:
            laid = layer.laid(made.detach())[:1] if made.dim() == layer.output.dim() else made
            if laid.shape[1:] != a.shape or (laid[0] - a).abs().amax() > _OFF * a.abs().amax():
                raise Refused(
                    f"level {self.level!r} cannot be ablated: the model makes other calls for one image than for several; "
                    "explain one image at a time, or use another method"
                )

        def run(channels: Tensor, images: Tensor) -> Tensor:
            def ablated(made: Tensor) -> Tensor:
                check_same(made)
                copies = made if len(images) > 1 else made.repeat(len(channels), *[1] * (made.dim() - 1))
                return layer.without(copies, channels)

            return Exchange(model, layer.event, ablated).run(images)

        def without(channels: Tensor, image: Tensor) -> Tensor:
            rows = channels.repeat(2) if len(channels) == 1 else channels  # two, to see that the batch grew
            try:
                logits = run(rows, image.clone())
            # one image met many, in a concatenation, say: many from the start
            except Exception as error:
                if isinstance(error, SrdLabError) or is_out_of_memory(error):
                    raise
                parts = [run(some, image.repeat(len(some), 1, 1, 1)) for some in rows.split(whole_at_once)]
                logits = torch.cat(parts)
            if logits.shape[0] != len(rows):
                raise Refused(
                    f"level {self.level!r} cannot be ablated: the model does not use what that call returns; name "
                    "another layer with level="
                )
            return logits[: len(channels), target].to(a)

        drop = torch.zeros_like(a[:, 0, 0])
        for some in alive.split(at_once) if len(alive) else ():
            drop = drop.index_put((some,), score - recomputed(without, some, x))
        return rules.divide(drop, score)


def _constant(channels: Tensor) -> Tensor:
    """Whether a channel (K, h, w) has one value everywhere, (K,)."""
    return (channels == channels[:, :1, :1]).flatten(1).all(1)


def _to_unit_range(masks: Tensor) -> Tensor:
    """Every mask stretched to [0, 1]; a constant one becomes 0."""
    low, high = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
    return rules.divide(masks - low, high - low)
