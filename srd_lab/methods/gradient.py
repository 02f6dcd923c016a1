"""Gradient-based maps: Gradient, Gradient x Input, Guided Backprop, Deconvnet.

- Gradient (saliency): ``|d y_c / d x|`` (Simonyan et al. 2014).
- Gradient x Input: ``x * d y_c / d x`` (Ancona et al. 2018).
- Guided Backprop: a gradient that drops negative signals at every activation (Springenberg et al. 2015).
- Deconvnet: a gradient that does so and lets every positive signal pass (Zeiler & Fergus 2014).

All attribute to the normalised input where the model begins with a normalisation layer, as the attack does: there
zero is the mean colour, and the product with the input means what those papers mean. ``channels`` says how the
colour channels become one number: ``sum`` (signed), ``abs_sum`` (l1, what Dombrowski et al. attack) or ``max_abs``.

Example
-------
>>> map_ = Gradient().explain(model, x)              # (N, H, W), >= 0
>>> map_.shape, bool((map_ >= 0).all())
(torch.Size([2, 64, 64]), True)
>>> GradInput().explain(model, x, target=3).shape    # (N, H, W), signed
torch.Size([2, 64, 64])
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from srd_lab import maps
from srd_lab.catalogue import method
from srd_lab.engine import rules
from srd_lab.engine.attribution import attribution, slope_of
from srd_lab.engine.decomposed import Gated
from srd_lab.engine.interceptor import Watch
from srd_lab.logits import class_logit
from srd_lab.types import Explainer

MapAndLogits = tuple[Tensor, Tensor]  # (N, H, W) and (N, K)


@method(
    "gradient",
    title="Saliency",
    paper="Simonyan et al. 2014",
    resolution="input",
    passes="3",
    tested="captum",
)
@dataclass(frozen=True)
class Gradient(Explainer):
    """``d y_c / d x``; ``channels="abs_sum"`` sums absolute values over channels, so the map is >= 0."""

    channels: str = "abs_sum"

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> MapAndLogits:
        """Sensitivity per pixel (N, H, W); the model's output, from one forward pass."""
        _, slope, logits = _slope(model, x, target)
        return maps.reduce_channels(slope, self.channels), logits


@method(
    "grad_input",
    title="GradInput",
    paper="Ancona et al. 2018",
    resolution="input",
    passes="3",
    tested="captum",
)
@dataclass(frozen=True)
class GradInput(Explainer):
    """``x * d y_c / d x``; ``channels="sum"`` adds up the channels' signed shares."""

    channels: str = "sum"

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> MapAndLogits:
        """First-order share of every pixel in the logit (N, H, W); the model's output, from one forward pass."""
        given, slope, logits = _slope(model, x, target)
        return maps.reduce_channels(given * slope, self.channels), logits


@method(
    "guided_backprop",
    title="Guided Backprop",
    paper="Springenberg et al. 2015",
    resolution="input",
    passes="3",
    tested="captum",
)
@dataclass(frozen=True)
class GuidedBackprop(Explainer):
    """A gradient through activations that pass positive signals only; ``channels="abs_sum"``, the map is >= 0.

    Activations keep their own derivative (a softplus surrogate stays smooth); only the sign is guided.
    """

    channels: str = "abs_sum"

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> MapAndLogits:
        """Guided sensitivity per pixel (N, H, W); the model's output, from one forward pass."""
        _, slope, logits = _slope(model, x, target, rules.guided)
        return maps.reduce_channels(slope, self.channels), logits


@method(
    "deconvnet",
    title="Deconvnet",
    paper="Zeiler & Fergus 2014",
    resolution="input",
    attackable=False,
    passes="3",
    tested="captum",
)
@dataclass(frozen=True)
class Deconvnet(Explainer):
    """A gradient whose activations rectify the signal instead of passing it where they are active (Zeiler & Fergus
    2014); ``channels="abs_sum"``, the map is >= 0."""

    channels: str = "abs_sum"

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> MapAndLogits:
        """Rectified signal per pixel (N, H, W); the model's output, from one forward pass."""
        _, slope, logits = _slope(model, x, target, rules.deconvnet)
        return maps.reduce_channels(slope, self.channels), logits


def _slope(
    model: nn.Module, x: Tensor, target: Tensor | int | None, rule: rules.Rule | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The (normalised) input, the gradient of the target logits there, and the logits."""
    with attribution(model, x) as run:
        fed = run.given.clone()  # a model may change its input in place
        gated = None if rule is None else run.recording(Gated(run.network, rule))
        logits = (gated or Watch(run.network)).run(fed)
        score = class_logit(logits, target)
        with nullcontext() if gated is None else gated.live():
            slope = slope_of(score, run.given, differentiable=run.differentiable)
        return run.finish(run.given), run.finish(slope), run.finish(logits)
