"""What replaces the derivative of an activation, and how a bias is shared, in one modified backward pass.

G is the signal that runs backwards: the relevance of a tensor t is <t, G> over channels. A rule answers, for an
activation with pre-activation u, output v and incoming G_v, what goes to u. Affine operations keep their ordinary
vector-Jacobian product. All rules are plain differentiable tensor code: an attack differentiates through them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from srd_lab.engine.geometry import Convolution


class Passed(NamedTuple):
    """What a rule passes on.

    to_u : signal at the pre-activation, past the activation's own derivative; or None.
    through_v : signal still to go through the activation's own derivative; or None.
    relevance : (N, ...) relevance of this activation layer, or None where the rule has no such notion.
    leaked : relevance that the rule cannot pass on, 0 elsewhere; None where that is not counted.
    """

    to_u: Tensor | None
    through_v: Tensor | None
    relevance: Tensor | None = None
    leaked: Tensor | None = None


Rule = Callable[[Tensor, Tensor, Tensor], Passed]


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b with 0 wherever b is 0, in the value and in every derivative.

    Example
    -------
    >>> divide(torch.ones(2), torch.tensor([0.0, 2.0]))
    tensor([0.0000, 0.5000])
    """
    return a / b.masked_fill(b == 0, torch.inf)


def squared_norm(t: Tensor) -> Tensor:
    """||t||^2 over channels, (N, 1, ...)."""
    return (t * t).sum(1, keepdim=True)


def inverse_norm(square: Tensor) -> Tensor:
    """1 / ||t|| of ||t||^2, and 0 where that is 0."""
    return torch.rsqrt(square.masked_fill(square == 0, torch.inf))


def along(t: Tensor, r: Tensor, square: Tensor) -> Tensor:
    """t r / ||t||^2, the signal along t that stands for the relevance r (N, 1, ...); 0 where t is. ``square`` is ||t||^2."""
    if not _may_overflow(square):
        return t * divide(r, square)
    inverse = inverse_norm(square)
    return (t * inverse) * (r * inverse)


def _may_overflow(square: Tensor) -> bool:
    """Whether 1 / ||t||^2 may be too large: a look that costs nothing on the CPU, and is not made elsewhere."""
    return square.device.type != "cpu" or bool(((square > 0) & (square < 1e-30)).any())


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> over channels, (N, 1, ...)."""
    return (a * b).sum(1, keepdim=True)


def srd_vector(u: Tensor, v: Tensor, g: Tensor) -> Passed:
    """Sharing ratio of pointwise feature vectors (Eq. 6-8): R = <v, G>, G_u = u R / ||u||^2. All are (N, C, ...).

    Example
    -------
    >>> u = torch.tensor([[1.0, -1.0]])
    >>> passed = srd_vector(u, torch.relu(u), torch.ones(1, 2))
    >>> passed.relevance, (passed.to_u * u).sum(1)     # what arrives is what goes on
    (tensor([1.]), tensor([1.]))
    """
    r, square = inner(v, g), squared_norm(u)
    return Passed(along(u, r, square), None, r.squeeze(1), r * (square == 0))


def srd_vector_post(u: Tensor, v: Tensor, g: Tensor) -> Passed:
    """Ablation of Fig. 7: the reference vector is the post-activation, G_u = v R / ||v||^2."""
    r = inner(v, g)
    return Passed(v * divide(r, squared_norm(v)), None, r.squeeze(1))


def srd_scalar(u: Tensor, v: Tensor, g: Tensor) -> Passed:
    """Ablation of Fig. 7: every neuron on its own, which is LRP-0 (Bach et al. 2015)."""
    r = v * g
    return Passed(divide(r, u), None, r.sum(1))


def srd_scalar_post(u: Tensor, v: Tensor, g: Tensor) -> Passed:
    """Ablation: every neuron on its own, measured by its post-activation value."""
    r = v * g
    return Passed(divide(r, v), None, r.sum(1))


def guided(u: Tensor, v: Tensor, g: Tensor) -> Passed:
    """Guided backprop (Springenberg et al. 2015): only positive signals go on, through the derivative."""
    return Passed(None, g * (g > 0))


def deconvnet(u: Tensor, v: Tensor, g: Tensor) -> Passed:
    """Deconvnet (Zeiler & Fergus 2014): positive signals go on, whether the activation was active or not."""
    return Passed(g * (g > 0), None)


def lrp_epsilon(epsilon: float) -> Rule:
    """LRP-epsilon (Bach et al. 2015): a neuron's relevance over its pre-activation, stabilised away from zero.

    epsilon : > 0, in units of the pre-activation.
    """

    def rule(u: Tensor, v: Tensor, g: Tensor) -> Passed:
        r = v * g
        return Passed(divide(r, u + epsilon * sign(u)), None, r.sum(1))

    return rule


def lrp_modified(u: Tensor, v: Tensor, g: Tensor) -> Passed:
    """LRP z+ and gamma (Montavon et al. 2017, 2019): u is the pre-activation that the modified weights make.

    A field of which hardly anything is left counts as dead: on a softplus surrogate what a ReLU would make 0 is 1e-30,
    say, and while its shares would still be numbers, their derivatives overflow.
    """
    r = v * g
    dead = u.abs() < torch.finfo(u.dtype).tiny ** (1 / 3)  # 2e-13 in float32
    return Passed(divide(r, u.masked_fill(dead, 0)), None, r.sum(1), r * dead)


def sign(t: Tensor) -> Tensor:
    """1 where t >= 0 and -1 elsewhere, without a derivative."""
    return torch.where(t >= 0, 1.0, -1.0).to(t)


def bias_relevance(bias: Tensor, g: Tensor) -> Tensor:
    """<bias, g> over channels, (N, 1, ...): the relevance of a bias. It is a vector of channels or has the shape of g."""
    if bias.dim() > 1:
        return inner(bias, g)
    return torch.einsum("nc...,c->n...", g, bias).unsqueeze(1)


def share_bias(x: Tensor, relevance: Tensor, conv: Convolution | None) -> tuple[Tensor, Tensor]:
    """Signal that a bias adds at the input x of its layer (Eq. 11), ``relevance`` being that of the bias; and the part of
    that which no position can take, (N, 1, ...) over the layer's output.

    x : (N, C, H, W), or (N, C, ...) without ``conv``. relevance : (N, 1, ...) over the layer's output.
    Every position i of a receptive field takes the share ||x_i|| / sum_k ||x_k|| of the bias, along x_i.
    ``conv`` is the geometry of the receptive fields; None is one position (1x1 convolution, normalisation, linear
    layer, a constant added to a map). Zero padding has norm 0 and takes nothing; a dead field passes nothing on.
    """
    square = squared_norm(x)
    if conv is None:
        return along(x, relevance, square), relevance * (square == 0)
    inverse = inverse_norm(square)
    total = conv.box_sum(square * inverse)
    share = conv.box_spread(divide(relevance, total))
    spread = (x * inverse) * share if _may_overflow(square) else x * (inverse * share)
    return spread, relevance * (total == 0)
