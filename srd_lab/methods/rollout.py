"""Attention rolled out from the last layer of a transformer to its patches.

A^l is the attention of layer l, (heads, T, T), row i what token i takes of all; E_h is the mean over heads.

- Attention rollout (Abnar & Zuidema 2020): ``R = B^L ... B^1``, ``B^l = (E_h A^l + I) / 2``; the half of I is the residual
  connection.
- Gradient-weighted rollout (Chefer et al. 2021, "Generic attention-model explainability", Eq. 5 and 6 for self-attention):
  ``R = (I + C^L) ... (I + C^1)``, ``C^l = E_h relu(d y_c / d A^l * A^l)``.

The map is the mean of the rows of R whose tokens the logits read behind the last attention (that of the class token, where
the head reads it), less the columns of class and register tokens, on the grid of the patches.

Every token has to attend to all: windows (Swin), pooled keys and class attention are refused, as are networks without
attention. Attention rollout does not depend on the class.

Example
-------
::

    map_ = GradientRollout().explain(vit, x, target=3)    # (N, 14, 14) of 224 x 224 and patches of 16
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srd_lab.catalogue import method
from srd_lab.engine.attention_trace import AttentionTrace
from srd_lab.engine.attribution import attribution, no_gradient, slopes_of
from srd_lab.errors import Refused
from srd_lab.logits import class_logit
from srd_lab.types import Explainer


@dataclass(frozen=True)
class _Rollout(Explainer, ABC):
    """What both share: the matrices, and the product of them."""

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention (N, h, w) to every patch, >= 0; the model's output, from one forward pass."""
        with attribution(model, x, split=False) as run:
            trace = run.recording(AttentionTrace(model))
            logits = trace.trace(run.given)
            score = class_logit(logits, target)
            found = trace.matrices(len(x))
            grid = trace.grid(run.alignment(trace), found[0].shape[-1])
            last, *others = slopes_of(score, found[::-1], differentiable=run.differentiable)
            slopes = [*others[::-1], last]
            if any(slope is None for slope in slopes):
                raise no_gradient()
            read = (last.detach() != 0).any(3).any(1).any(0)
            if not read.any():
                raise Refused(
                    "the logits do not depend on what the last attention puts out, so that no map can be made"
                )
            row = (read.to(last) / read.sum()).expand(len(x), 1, -1)
            for weights, slope in zip(found[::-1], slopes[::-1], strict=True):
                assert slope is not None
                row = row @ self.passed(weights, slope)
            return run.finish(grid.lay_numbers(row.squeeze(1))), run.finish(logits)

    @abstractmethod
    def passed(self, weights: Tensor, slope: Tensor) -> Tensor:
        """What tokens pass on in a layer, (N, T, T).

        weights : its attention, (N, heads, T, T). slope : of the logit there, of the same shape.
        """


def _identity(weights: Tensor) -> Tensor:
    return torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)


@method(
    "attention_rollout",
    title="Rollout",
    paper="Abnar & Zuidema 2020",
    resolution="low",
    passes="3",
    tested="definition",
    needs="attention",
)
@dataclass(frozen=True)
class AttentionRollout(_Rollout):
    """Attention multiplied through the layers, half of each the residual connection; of no class in particular."""

    def passed(self, weights: Tensor, slope: Tensor) -> Tensor:
        return (weights.mean(1) + _identity(weights)) / 2


@method(
    "gradient_rollout",
    title="Gradient rollout",
    paper="Chefer et al. 2021",
    resolution="low",
    passes="3",
    tested="definition",
    needs="attention",
)
@dataclass(frozen=True)
class GradientRollout(_Rollout):
    """Attention where it raises the logit, multiplied through the layers."""

    def passed(self, weights: Tensor, slope: Tensor) -> Tensor:
        return torch.relu(weights * slope).mean(1) + _identity(weights)
