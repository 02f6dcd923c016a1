"""Gradient-based maps: Gradient, Gradient x Input, Guided Backprop, Integrated Gradients.

- Gradient (saliency): ``|d y_c / d x|`` (Simonyan et al. 2014).
- Gradient x Input: ``x * d y_c / d x`` (Ancona et al. 2018).
- Guided Backprop: a gradient that drops negative signals at every activation (Springenberg et al. 2015).
- Integrated Gradients: ``x * mean_k d y_c / d (x k / m)``, from a zero baseline (Sundararajan et al. 2017).

All attribute to the normalised input where the model begins with a normalisation layer, as the attack does: there
zero is the mean colour, and the product with the input means what those papers mean. ``channels`` says how the
colour channels become one number: ``sum`` (signed), ``abs_sum`` (l1, what Dombrowski et al. attack) or ``max_abs``.

Example
-------
>>> Gradient().explain(model, x)                             # (N, H, W), >= 0
>>> IntegratedGradients(steps=50).explain(model, x, target)  # (N, H, W), signed
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srd_lab import maps, rules
from srd_lab.backprop import Gated, split_normalisation, traced
from srd_lab.checks import check_input, check_target
from srd_lab.intercept import Watch
from srd_lab.types import SrdLabError

Attribution = tuple[Tensor, Tensor]  # map (N, H, W) and logits (N, K)


@dataclass(frozen=True)
class Gradient:
    """``d y_c / d x``; ``channels="abs_sum"`` sums absolute values over channels, so the map is >= 0."""

    channels: str = "abs_sum"

    def explain(self, model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
        """Sensitivity per pixel (N, H, W). See :class:`srd_lab.types.Explainer`."""
        return self.explain_with_logits(model, x, target)[0]

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> Attribution:
        """The map and the model's output, from one forward pass."""
        _, slope, logits = _slope(model, x, target)
        return maps.reduce_channels(slope, self.channels), logits


@dataclass(frozen=True)
class GradInput:
    """``x * d y_c / d x``; ``channels="sum"`` adds up the channels' signed shares."""

    channels: str = "sum"

    def explain(self, model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
        """First-order share of every pixel in the logit (N, H, W). See :class:`srd_lab.types.Explainer`."""
        return self.explain_with_logits(model, x, target)[0]

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> Attribution:
        """The map and the model's output, from one forward pass."""
        given, slope, logits = _slope(model, x, target)
        return maps.reduce_channels(given * slope, self.channels), logits


@dataclass(frozen=True)
class GuidedBackprop:
    """A gradient through activations that pass positive signals only; ``channels="abs_sum"``, the map is >= 0.

    Activations keep their own derivative (a softplus surrogate stays smooth); only the sign is guided.
    """

    channels: str = "abs_sum"

    def explain(self, model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
        """Guided sensitivity per pixel (N, H, W). See :class:`srd_lab.types.Explainer`."""
        return self.explain_with_logits(model, x, target)[0]

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> Attribution:
        """The map and the model's output, from one forward pass."""
        _, slope, logits = _slope(model, x, target, rules.guided)
        return maps.reduce_channels(slope, self.channels), logits


@dataclass(frozen=True)
class IntegratedGradients:
    """``x * mean over k = 1..steps of the gradient at x k / steps``; the baseline is zero (normalised).

    steps : points of the path, > 0.
    images_at_once : images per forward pass; None keeps a pass near 30 images of 224 x 224. When the path takes
        several passes, a differentiable map recomputes each of them backwards instead of holding them all.
    """

    steps: int = 30
    channels: str = "sum"
    images_at_once: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SrdLabError(f"integrated gradients needs steps >= 1, got {self.steps}")

    def explain(self, model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
        """Share of every pixel in the logit's rise from the baseline (N, H, W). See :class:`srd_lab.types.Explainer`."""
        return self.explain_with_logits(model, x, target)[0]

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> Attribution:
        """The map and the model's output."""
        check_input(x, model)
        normalise, network = split_normalisation(model)
        leaf, differentiable = traced(x)
        with torch.set_grad_enabled(differentiable):
            logits = Watch(network).run(normalise(leaf.clone()))
            given = normalise(leaf.clone())
            classes = check_target(target, logits)
            slope = self._mean_slope(network, given, classes, differentiable)
            return maps.reduce_channels(given * slope, self.channels), logits

    def _mean_slope(self, network: nn.Module, given: Tensor, classes: Tensor, differentiable: bool) -> Tensor:
        n, _, h, w = given.shape
        at_once = self.images_at_once or max(1, 30 * 224 * 224 // (h * w))
        fractions = torch.arange(1, self.steps + 1, dtype=given.dtype, device=given.device) / self.steps
        chunks = fractions.split(max(1, at_once // n))

        def part(some: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda base: _path_slopes(network, base, some, classes)

        if len(chunks) == 1 or not differentiable:
            parts = [
                part(some)(given if differentiable else given.detach().requires_grad_()) for some in chunks
            ]
        else:
            parts = [_Recompute.apply(given, part(some)) for some in chunks]  # type: ignore[no-untyped-call]
        total = torch.stack(parts).sum(0) / self.steps
        return total if differentiable else total.detach()


def _path_slopes(network: nn.Module, base: Tensor, fractions: Tensor, classes: Tensor) -> Tensor:
    """Sum over ``fractions`` of the gradient of the target logits at ``base * fraction``; (N, C, H, W)."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        points = (fractions[:, None, None, None, None] * base).flatten(0, 1)
        logits = Watch(network).run(points.clone())  # a network may change its input in place
        score = logits.gather(1, classes.repeat(len(fractions))[:, None]).sum()
        (slope,) = torch.autograd.grad(score, points, create_graph=differentiable)
    return slope.unflatten(0, (len(fractions), len(base))).sum(0)


class _Recompute(torch.autograd.Function):
    """``function(x)`` without keeping its graph: it is built again when the gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x.detach().requires_grad_()).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        again = torch.is_grad_enabled()  # this gradient is to be differentiated in its turn
        x = x if again else x.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(ctx.function(x), x, grads[0], create_graph=again)
        return g, None


def _slope(
    model: nn.Module, x: Tensor, target: Tensor | int | None, rule: rules.Rule | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The (normalised) input, the gradient of the target logits there, and the logits."""
    check_input(x, model)
    leaf, differentiable = traced(x)
    normalise, network = split_normalisation(model)
    with torch.enable_grad():
        given = normalise(leaf)
        fed = given.clone()  # a model may change its input in place
        gated = None if rule is None else Gated(network, rule)
        logits = (gated or Watch(network)).run(fed)
        score = logits.gather(1, check_target(target, logits)[:, None]).sum()
        with nullcontext() if gated is None else gated.live():
            (slope,) = torch.autograd.grad(score, given, create_graph=differentiable)
    if differentiable:
        return given, slope, logits
    return given.detach(), slope, logits.detach()
