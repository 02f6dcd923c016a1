"""Layer-wise relevance propagation: the z+, gamma and epsilon rules, and excitation backprop, which is z+ from a one.

Between two activation layers everything is affine: ``u_j = sum_i w_ij x_i + b_j``. Relevance goes back by

- z+ (Montavon et al. 2017): ``R_i = sum_j x_i w_ij^+ / (sum_k x_k w_kj^+) R_j``, biases ignored;
- gamma (Montavon et al. 2019): the same with ``w + gamma w^+`` in the place of ``w^+``, biases taking their part;
- epsilon (Bach et al. 2015): ``R_i = sum_j x_i w_ij / (u_j + epsilon sign u_j) R_j``.

Batch norm after a convolution is folded into w before the sign is taken; additions and concatenations are part of the
affine map, so a residual network needs no canonisation. z+ and gamma take activation outputs x >= 0; at the input, with
pixels in a box [l, h], they use z^B: ``R_i = sum_j (x_i w_ij - l_i w_ij^+ - h_i w_ij^-) / (sum_k same) R_j``.

On transformers there are two ways to go on. Epsilon holds attention weights and the scale of normalisations constant (Ali et
al. 2022). AttnLRP (Achtibat et al. 2024) holds the scale constant alone: what is a product of two maps, such as queries and
keys, weights and values, or a gate and what it gates, gives half to each; a softmax ``s`` of ``x`` gives
``R_i = x_i (R_s,i - s_i sum_j R_s,j)``. z+ and gamma are for activations >= 0, and refuse GELU.

Excitation backprop (Zhang et al. 2016) is the z+ rule with a one at the class; contrastive, what the negated weights of
the class would excite is taken off in the last layer.

Example
-------
>>> map_, logits = LRPZPlus().explain_with_logits(model, x)    # (N, H, W); sums to the target logit
>>> torch.allclose(map_.sum((1, 2)), logits.amax(1), rtol=1e-3)
True
>>> ExcitationBackprop().explain(model, x, 3).shape            # (N, H / 8, W / 8)
torch.Size([2, 8, 8])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srd_lab import maps
from srd_lab.catalogue import method
from srd_lab.engine import rules
from srd_lab.engine.attnlrp_trace import AttnLRPTrace
from srd_lab.engine.attribution import (
    ON_LEAK,
    Attribution,
    attribution,
    check_conserved,
    no_gradient,
    slope_of,
    slopes_of,
)
from srd_lab.engine.layers import call_index, check_rows
from srd_lab.engine.lrp_trace import ModifiedTrace
from srd_lab.engine.record import original_of
from srd_lab.engine.srd_trace import SRDTrace
from srd_lab.errors import BadValue, Refused
from srd_lab.logits import check_target, class_logit
from srd_lab.normalise import check_box
from srd_lab.types import Explainer


@dataclass(frozen=True)
class _Modified(Explainer, ABC):
    """A rule with modified weights.

    low, high : the pixel box; it is normalised as the image is.
    on_leak : "error" or "warn" where not all relevance that started arrives, and neither rounding nor dead fields or
        constants explain it; for rules that keep the sum.
    """

    low: float = 0.0
    high: float = 1.0
    on_leak: str = "error"

    def __post_init__(self) -> None:
        if self.on_leak not in ON_LEAK:
            raise BadValue(f"on_leak={self.on_leak!r} is not known; expected one of {', '.join(ON_LEAK)}")
        if not self.low < self.high:
            raise BadValue(f"the pixel box needs low < high, got {self.low} and {self.high}")

    def explain(self, model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
        """See :meth:`srd_lab.types.Explainer.explain`; raises BadInput for images outside of the pixel box."""
        check_box(model, x, self.low, self.high)
        return super().explain(model, x, target)

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Relevance per position, as the class says; the model's output, from one forward pass."""
        with attribution(model, x) as run:
            low, high = (
                run.normalise(torch.full_like(x, end)).detach().requires_grad_()
                for end in (self.low, self.high)
            )
            trace = run.recording(ModifiedTrace(run.network, (low, high), self.modify, self.with_bias))
            trace.keeps_maps = self.keeps_maps
            logits = trace.trace(run.given)
            classes = check_target(target, logits)[:, None]
            map_ = self.propagate(run, trace, logits, classes, (run.given, low, high))
            return run.finish(map_), run.finish(logits)

    with_bias = False
    conserves = True
    keeps_maps = False

    def modify(self, weight: Tensor) -> Tensor:
        """The weight that stands in for ``weight``, of its shape: its positive part."""
        return weight.clamp_min(0)

    @abstractmethod
    def propagate(
        self,
        run: Attribution,
        trace: ModifiedTrace,
        logits: Tensor,
        classes: Tensor,
        ends: tuple[Tensor, ...],
    ) -> Tensor:
        """The map (N, h, w).

        run : the attribution that it is a part of. trace : the pass with modified weights, which has run.
        logits : (N, K). classes : those that are explained, (N, 1). ends : the image, and its box's lower and upper end,
        each (N, C, H, W).
        """


def _to_input(
    top: list[Tensor], signals: list[Tensor], ends: tuple[Tensor, ...], differentiable: bool
) -> Tensor:
    """Relevance (N, C, H, W) at the image, of signals at tensors of the modified pass."""
    slopes = slopes_of(top, ends, signals, differentiable=differentiable)
    return torch.stack([t * g for t, g in zip(ends, slopes, strict=True) if g is not None]).sum(0)


@method(
    "lrp_zplus",
    title="LRP z+",
    paper="Montavon et al. 2017",
    resolution="input",
    passes="6",
    tested="definition",
)
@dataclass(frozen=True)
class LRPZPlus(_Modified):
    """LRP z+ with z^B at the first layer: the map sums to the target logit, up to dead receptive fields.

    low, high, on_leak : the pixel box, normalised as the image is; and what to do where relevance leaks.
    channels : how the colour channels become one number; "sum" adds up their shares.
    """

    channels: str = "sum"

    def propagate(
        self,
        run: Attribution,
        trace: ModifiedTrace,
        logits: Tensor,
        classes: Tensor,
        ends: tuple[Tensor, ...],
    ) -> Tensor:
        relevance = torch.zeros_like(logits).scatter(1, classes, logits.gather(1, classes))
        top = trace.modified(logits)
        with trace.live():
            attribution = _to_input([top], [rules.divide(relevance, top)], ends, run.differentiable)
        if self.conserves:
            check_conserved(
                relevance * (top != 0), attribution, trace.live_pass.leaks, self.on_leak, trace.rounding
            )
        return maps.reduce_channels(attribution, self.channels)


@method(
    "lrp_gamma",
    title="LRP gamma",
    paper="Montavon et al. 2019",
    resolution="input",
    passes="6",
    tested="definition",
)
@dataclass(frozen=True)
class LRPGamma(LRPZPlus):
    """LRP gamma with z^B at the first layer; biases absorb their share, so the map does not sum to the logit.

    low, high, channels : see :class:`LRPZPlus`; on_leak means nothing. gamma : how much positive weights are favoured, >= 0.
    """

    gamma: float = 0.25

    with_bias = True
    conserves = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma < 0:
            raise BadValue(f"lrp_gamma needs gamma >= 0, got {self.gamma}")

    def modify(self, weight: Tensor) -> Tensor:
        """The weight that stands in for ``weight``: ``w + gamma w^+``."""
        return weight + self.gamma * weight.clamp_min(0)


@method(
    "excitation_backprop",
    title="Excitation BP",
    paper="Zhang et al. 2016",
    resolution="high",
    passes="6",
    tested="definition",
)
@method(
    "contrastive_excitation",
    title="c-Excitation BP",
    paper="Zhang et al. 2016",
    resolution="high",
    passes="6",
    tested="definition",
    contrastive=True,
)
@dataclass(frozen=True)
class ExcitationBackprop(_Modified):
    """Marginal winning probabilities: z+ from a one at the class; (N, h, w) at ``level``, sums to 1 up to dead fields.

    low, high, on_leak : see :class:`LRPZPlus`.
    level : "high" = the last activation at 1/8 of the image that all of the relevance passes, "input", or an activation call
        or submodule by name.
    contrastive : takes off what the negated weights of the class would excite, and keeps what is positive after that.
    """

    level: str | int = "high"
    contrastive: bool = False

    @property
    def keeps_maps(self) -> bool:  # type: ignore[override]
        return self.level == "high"

    def propagate(
        self,
        run: Attribution,
        trace: ModifiedTrace,
        logits: Tensor,
        classes: Tensor,
        ends: tuple[Tensor, ...],
    ) -> Tensor:
        top = [trace.modified(logits)]
        one = torch.zeros_like(logits).scatter(1, classes, 1)
        signals = [rules.divide(one, top[0])]
        if self.contrastive:
            if trace.head is None or trace.head[0] is not original_of(logits):
                raise Refused(
                    "contrastive excitation backprop needs a network that ends in a linear layer; use contrastive=False"
                )
            _, last = trace.head
            top.append(last.part(-last.weight, None))
            signals.append(-rules.divide(one, top[1]))
        place = self._place(run, trace, top[0])
        with trace.live() as relevance:
            if isinstance(place, Tensor):
                event, axis = trace.records[place].event or 0, trace.channels.of(place)
                run.alignment(trace).check(event, axis, f"level {self.level!r}")
                map_ = _at_tensor(trace, place, top, signals, run.differentiable)
            attribution = _to_input(top, signals, ends, run.differentiable)
            found = dict(relevance)
        started = torch.stack(
            [t.detach() * signal.detach() for t, signal in zip(top, signals, strict=True)]
        ).sum(0)
        check_conserved(started, attribution, trace.live_pass.leaks, self.on_leak, trace.rounding)
        if place is None:
            map_ = attribution.sum(1)
        elif isinstance(place, int):
            if place not in found or found[place].dim() != 3:
                raise Refused(f"no map of relevance is at {trace.calls[place].name!r}; choose another level")
            check_rows(f"layer {trace.calls[place].name!r}", found[place].shape, len(logits))
            run.alignment(trace).check_made(trace.made_by[place], f"level {self.level!r}")
            map_ = found[place]
        return torch.relu(map_) if self.contrastive else map_

    def _place(self, run: Attribution, trace: ModifiedTrace, top: Tensor) -> int | Tensor | None:
        """Where the map is read: at an activation call, another tensor, or the input."""
        if self.level == "input":
            return None
        if self.level == "high":
            if top.grad_fn is None:
                raise no_gradient()
            return trace.high(run.given.shape, top)
        level = self.level.removeprefix("network.") if isinstance(self.level, str) else self.level
        return call_index(trace.calls, level)  # the network of a classifier runs by itself


def _at_tensor(
    trace: ModifiedTrace, place: Tensor, top: list[Tensor], signals: list[Tensor], differentiable: bool
) -> Tensor:
    """Relevance (N, h, w) at a tensor of the pass."""
    part, axis = trace.modified(place), trace.channels.of(place)
    (g,) = torch.autograd.grad(top, part, signals, create_graph=differentiable, retain_graph=True)
    return (part * g).sum(axis)


@method(
    "lrp_epsilon",
    title="LRP epsilon",
    paper="Bach et al. 2015",
    resolution="input",
    passes="3",
    tested="definition, zennit",
)
@dataclass(frozen=True)
class LRPEpsilon(Explainer):
    """LRP epsilon at every layer, the first among them; biases absorb their share.

    epsilon : stabilises the pre-activations, the sums that activations are given, away from zero; > 0. zennit does so with
        every addend too, which on residual networks is another map (by 0.3 % of its maximum on a ResNet18).
    channels : how the colour channels become one number; "sum" adds up their shares.
    """

    epsilon: float = 1e-6
    channels: str = "sum"

    trace = SRDTrace

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise BadValue(f"LRP needs epsilon > 0, got {self.epsilon}")

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Relevance per pixel (N, H, W), signed; the model's output, from one forward pass."""
        with attribution(model, x) as run:
            rule = rules.lrp_epsilon(self.epsilon)
            trace = run.recording(self.trace(run.network, rule, with_bias=False))
            logits, _ = trace.trace(run.given)
            score = class_logit(logits, target)[:, None]
            signal = rules.divide(score, score + self.epsilon * rules.sign(score))
            with trace.live():
                g = slope_of(score, run.given, signal, differentiable=run.differentiable)
            map_ = maps.reduce_channels(run.given * g, self.channels)
            return run.finish(map_), run.finish(logits)


@method(
    "attnlrp",
    title="AttnLRP",
    paper="Achtibat et al. 2024",
    resolution="input",
    passes="3",
    tested="definition, LXT",
)
@dataclass(frozen=True)
class AttnLRP(LRPEpsilon):
    """LRP epsilon through queries and keys, too; of a network without products of two maps and softmax it is LRP epsilon.

    epsilon, channels : see :class:`LRPEpsilon`. A sigmoid that gates a map stays a constant, as its value at 0 is not 0.
    """

    trace = AttnLRPTrace
