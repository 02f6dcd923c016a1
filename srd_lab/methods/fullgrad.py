"""FullGrad: the gradient of the input and of every bias (Srinivas & Fleuret 2019).

A network of ReLUs, max pools and affine layers is ``y_c = <d y_c / d x, x> + sum_b <d y_c / d b, b>`` exactly, over the
biases b of all its layers. The map adds up what each term has to say about places:

    psi(d y_c / d x * x) + sum_layers sum_channels psi(d y_c / d b * b),    psi = stretch to the image of |.|

every term stretched to [0, 1] over its channels and places first. The shift of a norm is a bias, and an activation f other
than ReLU has the bias f(u) - f'(u) u. Tokens lie where their patches do. Biases of linear layers behind the maps, of class
tokens, and of layers that mix tokens or keep others than the patches' have no place: they count for completeness only. The
bias of a layer that is no vector along channels is refused; a position embedding is no bias.

Where a network is of such layers alone, the terms are held against the logit, which shows constants that are no layer's
bias: a channel of ones that is put beside a map, say.

Example
-------
>>> FullGrad().explain(model, x).shape      # (N, H, W), >= 0
torch.Size([2, 64, 64])
>>> terms = FullGrad().terms(model, x, 3)   # (N, 1 + biases): their sums, which add up to the logit
>>> torch.allclose(terms.sum(1), model(x)[:, 3], atol=1e-3)
True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from srd_lab import maps
from srd_lab.catalogue import method
from srd_lab.engine import rules
from srd_lab.engine.affine import KINKS, RECURRENT, SHIFTS, constant_part, is_affine, overwrites, spelled
from srd_lab.engine.alignment import Alignment
from srd_lab.engine.attribution import attribution, row_of, slopes_of
from srd_lab.engine.channels import memory_of
from srd_lab.engine.geometry import BatchNorm, Convolution, MaxPool
from srd_lab.engine.image_trace import ImageTrace
from srd_lab.engine.layers import check_rows, not_by_rows
from srd_lab.engine.network_input import NetworkInput
from srd_lab.engine.norms_and_attention import AsItIs, multi_head_attention_forward
from srd_lab.engine.preconditions import check_traceable
from srd_lab.engine.softplus import in_place
from srd_lab.engine.spellings import Call, Function, function_name, is_foreign, tensors_in
from srd_lab.errors import Leak, Refused
from srd_lab.logits import class_logit
from srd_lab.types import Explainer

# besides the layers that interception has methods of their own for
_WITH_BIAS = spelled(
    "layer_norm group_norm instance_norm batch_norm",
    "conv1d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution bilinear conv_tbc",
    "addmm addbmm baddbmm addmv addr addcmul lerp index_add native_layer_norm native_group_norm native_batch_norm",
    "_native_batch_norm_legit_no_training _native_batch_norm_legit cudnn_batch_norm miopen_batch_norm _convolution",
)
_WHAT, _CURE = "the output of a layer with a bias", "use another method on this network"  # of refusals
_WITHOUT_BIAS = ("relu", "leaky_relu", "prelu")  # f(u) = f'(u) u


@method(
    "fullgrad",
    title="FullGrad",
    paper="Srinivas & Fleuret 2019",
    resolution="input",
    passes="3",
    tested="definition",
)
@dataclass(frozen=True)
class FullGrad(Explainer):
    """Input and bias gradients, each stretched to [0, 1] and to the image, added up.

    Raises Leak where a network of affine layers and activations has constants that are no layer's bias.
    """

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Full-gradient saliency (N, H, W), >= 0; the model's output, from one forward pass."""
        products, logits = _products(model, x, target, laid_over_image=True)
        size = (x.shape[2], x.shape[3])
        shown = [maps.upsample(_unit_range(p).sum(1), size) for p in products if p.dim() == 4]
        return torch.stack(shown).sum(0), logits

    def terms(self, model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
        """What the input and every bias, in call order, add to the target logit: (N, 1 + biases). Their sum is the logit
        for a network of piecewise linear and affine layers, and activations.

        model : the network. x : images (N, C, H, W). target : classes (N,), one for all, or None = the predicted ones.

        Raises SrdLabError as :meth:`explain` does.
        """
        # one image at a time: inside windows, or in (S, N, D) layouts, a sum over the batch is not easily split
        each = [_products(model, x[i : i + 1], row_of(target, i, len(x)))[0] for i in range(len(x))]
        return torch.stack([torch.stack([p.sum() for p in products]) for products in each])


@dataclass(frozen=True)
class _Bias:
    """A bias of the running model.

    y : what it is in, with channels along ``axis``. bias : its value; None for that of an activation y of ``u``.
    event : which torch function of the model made y. lone : y has one channel, and no axis for it.
    ahead : it is a part of a normalisation of the image.
    """

    y: Tensor
    axis: int
    bias: Tensor | None
    u: Tensor | None = None
    event: int = 0
    lone: bool = False
    ahead: bool = False

    @property
    def value(self) -> Tensor:
        if self.bias is not None:
            return self.bias
        assert self.u is not None
        (slope,) = torch.autograd.grad(self.y.sum(), self.u, create_graph=True)
        return self.y - slope * self.u


class _Biases(AsItIs, ImageTrace):
    """Notes every tensor that a bias was added to, with the bias and the axis of its channels.

    sums_up : whether the model has been affine so far but for activations, so that its output is the sum of the terms.
    """

    needs_activations = False
    follows_curves = True
    sees_all = True
    sums_up = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.found: list[_Bias] = []
        self.begin = NetworkInput(self.records)
        self._made = WeakTensorKeyDictionary()  # which torch function of the model made a tensor
        self._queries: int | None = None  # within an attention in one call: what made its queries

    def note(
        self, y: Tensor, bias: Tensor | None, axis: int, ahead: bool = False, event: int | None = None
    ) -> Tensor:
        """``y``, to which ``bias`` was added; a copy, as what follows may overwrite it.

        event : whose output lies where ``y`` does; None = of the call that is running.
        """
        if bias is None or not y.requires_grad:
            return y
        lone, event = self.records[y].lone, self.events if event is None else event
        self.found.append(_Bias(y, axis, bias, None, event, lone, ahead))
        return self._with_channels(y.clone(), axis, lone)

    def _with_channels(self, t: Tensor, axis: int, lone: bool) -> Tensor:
        if not lone:
            return self.channels.put(t, axis)
        self.records.note(t, lone=True)
        return t

    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        check_traceable(call.name, x)
        axis = self.channels.of(x)
        self.begin.reads(x)
        lone = self.records[x].lone
        return self._with_channels(self._activated(call, x, inplace, axis), axis, lone)

    def _like(self, x: Tensor, out: Tensor) -> Tensor:
        """``out``, which is made of ``x`` and has one channel if ``x`` has."""
        if out.dim() == x.dim() and self.records[x].lone:
            self.records.note(out, lone=True)
        return out

    def after(self, function: Function, args: tuple[Any, ...], maps: list[Tensor], out: Any) -> None:
        self.begin.called(function, args, maps, out)
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor):
                self._like(maps[0], made)
                self._made[made] = self.events

    def _activated(self, call: Call, x: Tensor, inplace: bool, axis: int) -> Tensor:
        if call.kind in _WITHOUT_BIAS:
            return call.original(x)
        u = x.clone()
        v = call.function(u)
        self.found.append(_Bias(v, axis, None, u, self.events, self.records[x].lone))
        return x.copy_(v) if inplace else v.clone()

    def convolution(self, conv: Convolution) -> Tensor:
        self.begin.reads(conv.x)
        self.sums_up &= not self.maps_in((conv.weight, conv.bias), {})
        y = conv.apply(conv.x, conv.weight, conv.bias)
        return self.note(y, None if conv.bias is None else conv.bias.view(-1, 1, 1), 1)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.begin.reads(x)
        self.sums_up &= not self.maps_in((weight, bias), {})
        y = self.channels.put(super().linear(x, weight, bias), x.dim() - 1)
        return self.note(self._like(x, y), bias, y.dim() - 1, event=self._place_of(x))

    def linear_of_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The queries or keys of an attention."""
        return self.linear(x, weight, bias)

    def layer_reads(self, x: Tensor, axis: int) -> None:
        """An attention reads ``x``."""
        self.begin.reads(x)

    def batch_norm(self, norm: BatchNorm, run: Callable[[], Tensor]) -> Tensor:
        ahead = self.begin.is_ahead([norm.x])
        y = self.note(run(), norm.shift.view(-1, *[1] * (norm.x.dim() - 2)), 1, ahead)
        if not self.begin.normalised(norm.x, y):
            self.begin.reads(norm.x)
        return y

    def max_pool(self, pool: MaxPool) -> Any:
        self.begin.reads(pool.x)
        return super().max_pool(pool)

    def on_maps(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        maps = self.maps_in(args, kwargs)
        out = self._noted(function, args, kwargs, maps)
        if any(t.requires_grad for t in tensors_in((out,))):
            self.sums_up &= function in KINKS or is_affine(function, args, kwargs, maps)
        return out

    def _noted(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], maps: list[Tensor]
    ) -> Any:
        """What a call on one map makes of zeros is a bias, where it is one vector along the channels of the result."""
        if function is F.multi_head_attention_forward:
            return self._attention(args, kwargs)
        if function in RECURRENT:
            raise Refused(
                f"{function_name(function)} in {self.where()} has activations and biases inside, for which FullGrad has no "
                "place; use another method"
            )
        if is_foreign(function):
            raise Refused(
                f"{function_name(function)} in {self.where()} is no operator of torch's own, and may have a bias, for "
                "which FullGrad has no place; use another method"
            )
        if len(maps) > 1 or not (function in SHIFTS or function in _WITH_BIAS):
            return super().on_maps(function, args, kwargs)
        (x,), bias = maps, constant_part(function, args, kwargs, maps)
        axis, ahead = self.channels.of(x), self.begin.is_ahead(maps)
        if overwrites(function, kwargs):
            if self._is_bias(function, bias, x, axis):
                return in_place(
                    args[0],
                    lambda u: self.note(self._like(x, function(u, *args[1:], **kwargs)), bias, axis, ahead),
                )
            return super().on_maps(function, args, kwargs)
        out = super().on_maps(function, args, kwargs)
        self.channels.follow(function, args, kwargs, x, axis, out)
        if isinstance(out, Tensor):
            axis = self.channels.of(out)
        return (
            self.note(self._like(x, out), bias, axis, ahead)
            if self._is_bias(function, bias, out, axis)
            else out
        )

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An attention in one call of torch, of which each linear layer has a bias of its own."""
        query = kwargs["query"] if "query" in kwargs else args[0]
        self._queries = self._made.get(memory_of(query), 0)
        out = multi_head_attention_forward(self, *args, **kwargs)
        self._queries = None
        if out is None:
            raise Refused(
                f"the attention in {self.where()} adds keys or values, or its tokens have no batch, which FullGrad has no "
                "rule for; use another method"
            )
        return out

    def _place_of(self, x: Tensor) -> int | None:
        """Within an attention in one call: which torch function put out tokens that lie where those of ``x`` do."""
        if self._queries is None:
            return None
        tokens = memory_of(x)
        return self._made.get(tokens, self._queries) if tokens.shape == x.shape else self._queries

    def _is_bias(self, function: Function, bias: Any, out: Any, axis: int) -> bool:
        """Whether ``bias`` is a vector along the channels of ``out``; refuses what is none and has no place elsewhere."""
        if isinstance(out, Tensor) and bias.shape == out.shape and _is_vector(bias, axis):
            return function in SHIFTS or bool(bias.any())
        self.sums_up &= function not in SHIFTS  # a position embedding, which has no term
        if function in _WITH_BIAS and any(t.any() for t in tensors_in((bias,), {})):
            raise Refused(
                f"{function_name(function)} in {self.where()} adds a bias that FullGrad has no place for; write it as a "
                "convolution, a linear layer or a sum, or use another method"
            )
        return False


def _is_vector(t: Tensor, axis: int) -> bool:
    """Whether ``t`` is one vector along ``axis``, at every position of every image."""
    if t.dim() < 2:
        return True
    rows = t.movedim(axis, -1).flatten(0, -2)
    return bool((rows == rows[:1]).all())


def _products(
    model: nn.Module, x: Tensor, target: Tensor | int | None, *, laid_over_image: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Gradient times value of the (normalised) input and of every bias, channels along dimension 1; the logits.

    laid_over_image : whether the maps among them have to lie over the image.
    """
    with attribution(model, x) as run:
        trace = run.recording(_Biases(run.network))
        fed = run.given.clone()
        trace.begin.begin(fed)
        logits = trace.run(fed)
        score = class_logit(logits, target)
        normalised = None if trace.begin.overwritten else trace.begin.found
        start = run.given if normalised is None else normalised
        terms = [_Bias(start, 1, start), *(b for b in trace.found if normalised is None or not b.ahead)]
        values = [term.value for term in terms]
        if laid_over_image:
            _check_rows(score, terms)
        slopes = slopes_of(score, [term.y for term in terms], differentiable=run.differentiable)
        products, sums = [], []
        last = {
            tuple(term.y.shape): term for term in terms
        }  # the cells of others of that size read much the same
        for g, value, term in zip(slopes, values, terms, strict=True):
            if g is not None:
                product = g * value
                sums.append(product.detach().sum())
                if term.lone:
                    product = product.unsqueeze(1)
                elif product.dim() > 1:  # else it has one axis, of images, channels and positions
                    product = product.movedim(term.axis, 1)
                if laid_over_image and term.event:
                    ask = term is last[tuple(term.y.shape)]
                    product = _placed(product, run.alignment(trace), term, len(x), ask=ask)
                products.append(run.finish(product))
        if trace.sums_up:
            _check_sum(score.detach(), torch.stack(sums), trace.rounding)
        return products, run.finish(logits)


def _check_sum(score: Tensor, sums: Tensor, rounding: float) -> None:
    """Refuse a network whose terms are not its logits, so that some constant in it has no term.

    score : logits (N,) of the classes. sums : what each term adds to all of them together, (terms,).
    rounding : the share of these numbers that rounding may cost.

    Raises Leak. What is not finite passes, and ``Explainer.explain`` refuses it.
    """
    logit, found = score.double().sum(), sums.double().sum()
    if not (logit - found).abs() > rounding * (score.double().abs().sum() + sums.double().abs().sum()):
        return
    raise Leak(
        f"input and biases add up to {float(found):.4g} where the model puts out {float(logit):.4g}: it has a constant that "
        "is no layer's bias (a channel of ones, say), or hooks that change gradients; add the constant as a vector along "
        "channels, or use another method on it"
    )


def _check_rows(score: Tensor, terms: list[_Bias]) -> None:
    """Refuse (SrdLabError) biases of tokens with as many rows as there are images, of which each is not one image's."""
    rows = [t.y for t in terms if t.y.dim() == 3 and not t.lone and len(t.y) == len(score)]
    if len(score) < 2 or not rows:
        return
    of_first = torch.autograd.grad(score[0], rows, retain_graph=True, allow_unused=True)
    for y, slope in zip(rows, of_first, strict=True):
        if slope is not None and slope[1:].any():
            raise not_by_rows(_WHAT, y.shape, len(score), _CURE)


def _placed(product: Tensor, alignment: Alignment, term: _Bias, images: int, *, ask: bool) -> Tensor:
    """The ``product`` of a bias, channels along dimension 1, with tokens laid where they lie over the image.

    Refuses a map that does not lie over so many images; ask : whether its cells are asked what they read.
    """
    what, cure = _WHAT, _CURE
    if term.y.dim() == (3 if term.lone else 4):
        check_rows(what, (term.y if term.lone else term.y.movedim(term.axis, 1)).shape, images, cure)
        alignment.check(term.event, None if term.lone else term.axis, what, ask=ask)
    elif term.y.dim() == 3:
        if len(term.y) != images or alignment.lies(
            term.event, None
        ):  # tokens first, windows, or a map of one image
            raise not_by_rows(what, term.y.shape, images, cure)
        return alignment.check_tokens(term.event, term.axis, what, ask=ask).lay(product, 1)
    elif term.y.dim() > 4 or (
        term.y.dim() == 2 and len(term.y) != images
    ):  # frames, or positions beside images
        raise not_by_rows(what, term.y.shape, images, cure)
    return product


def _unit_range(product: Tensor) -> Tensor:
    """|product| stretched to [0, 1] per image; 0 where it is the same everywhere."""
    size = product.abs()
    low, high = size.amin((1, 2, 3), keepdim=True), size.amax((1, 2, 3), keepdim=True)
    return rules.divide(size - low, high - low)
