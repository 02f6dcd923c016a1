"""Sharing Ratio Decomposition (Han, Kim and Kwak, ICLR 2024).

A pointwise feature vector (PFV) is the vector along channels at one position. The pre-activation PFV u_j of a layer
is the sum of what the PFVs of the layer before contribute to it, u_j = sum_i vhat_ij, and PFV i takes the share
``mu_ij = <vhat_ij, u_j> / ||u_j||^2`` of its relevance (Eq. 5-8; the printed Eq. 6 divides by ||vhat_ij||, which does
not sum to 1). As one backward pass: an activation replaces its derivative by ``u R / ||u||^2`` with R = <v, G>, and
everything affine keeps its vector-Jacobian product. Biases and shifts are shared by Eq. 11. Gates, the scale of a
normalisation that depends on the input and attention weights are held constant (:mod:`srd_lab.engine.held_constant`).

The pass starts at the encoder output with ``mu = relu(sum_k alpha_k A_k)``, alpha the spatial mean of the gradient of
``y_c - mean_k y_k`` (Eq. 3, 4, 9).

Example
-------
>>> SRD().explain(model, x)                          # (N, H, W)
>>> SRD(level="high").explain(model, x, target=3)    # (N, H / 8, W / 8)
>>> SRD(start="ones").relevance(model, x)["input"]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from srd_lab.catalogue import method
from srd_lab.engine import rules
from srd_lab.engine.attribution import ON_LEAK, check_conserved, row_of, slope_of, traced
from srd_lab.engine.encoder_end import ANOTHER_ENCODER, End
from srd_lab.engine.layers import check_rows, not_by_rows
from srd_lab.engine.preconditions import check_input
from srd_lab.engine.srd_trace import SRDTrace
from srd_lab.errors import SrdLabError
from srd_lab.logits import check_target, class_logit
from srd_lab.types import Explainer

STARTS = ("contrastive", "gradcam", "ones")
UNITS = ("vector", "scalar")
VALUES = ("pre", "post")
LEAKS = ("dead fields", "constants", "other")
_RULES = {
    ("vector", "pre"): rules.srd_vector,
    ("vector", "post"): rules.srd_vector_post,
    ("scalar", "pre"): rules.srd_scalar,
    ("scalar", "post"): rules.srd_scalar_post,
}


@method(
    "srd_low",
    title="SRD, low",
    paper="Han et al. 2024",
    resolution="low",
    passes="3",
    tested="definition",
    level="low",
)
@method(
    "srd_high",
    title="SRD, high",
    paper="Han et al. 2024",
    resolution="high",
    passes="4",
    tested="definition",
    level="high",
)
@method(
    "srd", title="SRD, input", paper="Han et al. 2024", resolution="input", passes="4", tested="definition"
)
@dataclass(frozen=True)
class SRD(Explainer):
    """Sharing Ratio Decomposition.

    encoder : dotted name of the submodule whose output is the encoder output, "" = the model itself, None = found
        (the last map with spatial extent before global pooling or flattening; the last tokens before one of them is
        picked or all are averaged).
    start : relevance at the encoder output: "contrastive" (Eq. 4), "gradcam" (no class mean), "ones" (section 4.3,
        class-agnostic).
    level : resolution of the map: "input"; "high" = the last activation at 1/8 of the input (28 of 224) that all of the
        relevance passes; "low" = the encoder output; or the name of an activation call or of a submodule (its last
        activation).
    unit : "vector", or "scalar" for every neuron on its own (LRP-0, no bias shares; the ablation of Fig. 7).
    values : "pre"- or "post"-activation reference vector (Fig. 7).
    on_leak : "error" or "warn" where not all relevance that started arrives, and neither rounding nor :meth:`leaks`
        explains it.
    """

    encoder: str | None = None
    start: str = "contrastive"
    level: str = "input"
    unit: str = "vector"
    values: str = "pre"
    on_leak: str = "error"

    def __post_init__(self) -> None:
        for field, allowed in (
            *(("start", STARTS), ("unit", UNITS), ("values", VALUES)),
            ("on_leak", ON_LEAK),
        ):
            if getattr(self, field) not in allowed:
                raise SrdLabError(
                    f"SRD {field}={getattr(self, field)!r} is not known; expected one of {', '.join(allowed)}"
                )

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Signed relevance (N, h, w) at ``level``; (N, H, W) at the input; the model's output, from one forward pass."""
        with _tracing(self, model, x) as run:
            if not isinstance(run.output, Tensor):
                check_target(target, run.output)
            begin = run.begin(target, None)
            found = run.at_level(begin, self.level)
            if self.level in ("input", "high") and (self.unit, self.values) == ("vector", "pre"):
                check_conserved(begin.relevance, found, run.leaks(begin), self.on_leak, run.trace.eps)
            return found, run.finish(run.output)

    def relevance(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor | int | None = None,
        *,
        start: str | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Relevance of every layer: key "input" (N, H, W) and one key per activation call of the encoder in call
        order (N, h, w), or (N, S) on tokens. ``start`` overrides the start, by name or as a tensor of that shape at
        the encoder output.

        Input relevance refers to x, or to the normalised tensor where the model begins with a normalisation.
        The sum is the same at every cut through the network, up to what :meth:`leaks` reports.
        """
        with _tracing(self, model, x) as run:
            return run.everywhere(run.begin(target, start))

    def conserved(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor | int | None = None,
        *,
        start: str | Tensor | None = None,
    ) -> Tensor:
        """Share (N,) of the relevance at the encoder output that arrives at the input; 0 where there was none.

        1 minus this is the leak, which can have either sign; :meth:`leaks` says where it went.
        """
        with _tracing(self, model, x) as run:
            begin = run.begin(target, start)
            return run.finish(rules.divide(_total(run.at_input(begin)), _total(begin.relevance)))

    def leaks(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor | int | None = None,
        *,
        start: str | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What became of the relevance that did not arrive: shares (N,) of that at the encoder output, by cause.
        With :meth:`conserved` they sum to 1; all are 0 where the encoder output held none.

        dead fields : went to a vector, or to a bias whose whole receptive field is, zero.
        constants : went to what no pixel had a part in, such as a class token put among the others.
        other : all else, which is rounding. unit="scalar" and values="post" do not conserve, and show it here.
        """
        # One image at a time: inside windows, or in (S, N, D) layouts, a sum over the batch is not easily split.
        each = [
            self._leaks_of_one(model, x[i : i + 1], row_of(target, i, len(x)), row_of(start, i, len(x)))
            for i in range(len(x))
        ]
        return {cause: torch.stack([one[cause] for one in each]) for cause in LEAKS}

    def _leaks_of_one(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None, start: str | Tensor | None
    ) -> dict[str, Tensor]:
        with _tracing(self, model, x.detach()) as run:
            begin = run.begin(target, start)
            total, arrived = begin.relevance.sum(), run.at_input(begin).sum()
            found = run.leaks(begin)
            leaks = {cause: found.get(cause, torch.zeros_like(total)) for cause in LEAKS[:-1]}
            leaks[LEAKS[-1]] = total - arrived - torch.stack([*leaks.values()]).sum()
            return {cause: rules.divide(amount, total).detach() for cause, amount in leaks.items()}

    def erf(
        self, model: nn.Module, x: Tensor, layer: str | int, positions: Sequence[tuple[int, ...]]
    ) -> Tensor:
        """Effective receptive fields (Eq. 1-2) of the PFVs at ``positions`` (row, column) of an activation call, or
        (index,) on tokens: (N, P, H, W). Each sums to 1, up to the leaks."""
        if not len(positions):
            raise SrdLabError("no positions were given; expected pairs (row, column)")
        with _tracing(self, model, x) as run:
            index = run.trace.call_index(layer)
            return torch.stack([run.at_input(run.single(index, position)) for position in positions], 1)

    def sharing_ratio(self, model: nn.Module, x: Tensor, source: str | int, target: str | int) -> Tensor:
        """Sharing ratios mu_{i->j} (Eq. 6) between neighbouring layers: (N, h_j, w_j, h_i, w_i), j in the activation
        call ``target``, i in the activation call ``source`` or "input"; one axis instead of two on tokens. Entry
        [n, j] is a map over i. Where other activations lie on paths from i to j, the sum over all paths (Eq. 17)."""
        with _tracing(self, model, x) as run:
            j = run.trace.call_index(target)
            places = tuple(run.trace.u[j].shape[2:])
            begins = (run.single(j, position) for position in product(*map(range, places)))
            if source == "input":
                shares = [run.at_input(begin) for begin in begins]
            else:
                i = run.trace.call_index(source)
                if i >= j:
                    raise SrdLabError(
                        f"layer {source!r} does not come before {target!r}; swap source and target"
                    )
                shares = [run.at_call(begin, i) for begin in begins]
            stacked = torch.stack(shares, 1)
            return stacked.unflatten(1, places)


@dataclass(frozen=True)
class _Begin:
    """Where a backward pass starts: a tensor of the trace, the signal there, the relevance that it stands for, and how
    much of that starts at zero vectors, where no signal can carry it."""

    tensor: Tensor
    signal: Tensor
    relevance: Tensor
    leaked: Tensor
    call: int | None


class _Run:
    """One traced forward pass and the backward passes made from it."""

    def __init__(self, method: SRD, model: nn.Module, leaf: Tensor, differentiable: bool) -> None:
        self.method, self.leaf, self.differentiable = method, leaf, differentiable
        rule, with_bias = _RULES[method.unit, method.values], method.unit == "vector"
        self.trace = SRDTrace(model, rule, method.encoder, with_bias=with_bias)
        self.trace.keeps_maps = method.level == "high"
        self.output, self.input = self.trace.trace(self.leaf)

    def leaks(self, begin: _Begin) -> dict[str, Tensor]:
        """What the last backward pass, from ``begin``, could hand to nobody, by cause."""
        found = self.trace.live_pass.leaks
        return found | {"dead fields": found.get("dead fields", 0) + begin.leaked}

    def finish(self, t: Tensor) -> Tensor:
        return t if self.differentiable else t.detach()

    # starts --------------------------------------------------------------------------------------------
    def begin(self, target: Tensor | int | None, start: str | Tensor | None) -> _Begin:
        end = self.trace.end()
        r = self._start_map(end, target, self.method.start if start is None else start)
        if end.call is None:
            front = end.output.movedim(end.channels, 1)
            return self._inject(front, front, r, None)
        return self._at(end.call.index, r)

    def single(self, index: int, position: tuple[int, ...]) -> _Begin:
        """Relevance 1 at one position of an activation call, for every image."""
        u = self.trace.u[index]
        places = tuple(u.shape[2:])
        self._check_rows(f"layer {self.trace.calls[index].name!r}", u)
        if len(position) != len(places) or any(
            not 0 <= i < size for i, size in zip(position, places, strict=True)
        ):
            raise SrdLabError(
                f"position {position} is outside the map of {self.trace.calls[index].name}, {places}"
            )
        r = u.new_zeros(u.shape[0], *places)
        here: tuple[Any, ...] = (slice(None), *position)
        r[here] = 1
        return self._at(index, r)

    def _at(self, index: int, r: Tensor) -> _Begin:
        u = self.trace.u[index]
        return self._inject(u, u if self.method.values == "pre" else self.trace.v[index], r, index)

    def _inject(self, tensor: Tensor, reference: Tensor, r: Tensor, call: int | None) -> _Begin:
        """Signal u R / ||u||^2, so that the relevance of every position is R (per neuron, R is split as u^2 is)."""
        square = rules.squared_norm(reference)
        signal = rules.along(reference, r[:, None], square)
        leaked = (r.detach() * (square[:, 0] == 0)).sum()
        return _Begin(tensor, signal, r, leaked, call)

    def _start_map(self, end: End, target: Tensor | int | None, start: str | Tensor) -> Tensor:
        self._check_rows("the encoder", end.output, ANOTHER_ENCODER)
        encoded = end.output.movedim(end.channels, 1)
        shape = (encoded.shape[0], *encoded.shape[2:])
        if isinstance(start, Tensor):
            if start.shape != shape:
                raise SrdLabError(
                    f"start must hold the relevance at the encoder output, shape {shape}, got {tuple(start.shape)}"
                )
            return start.to(encoded)
        if start == "ones":
            return encoded.new_ones(shape)
        if start not in STARTS:
            raise SrdLabError(
                f"start={start!r} is not known; expected a tensor or one of {', '.join(STARTS)}"
            )
        if self.output is end.output or not isinstance(self.output, Tensor) or self.output.dim() != 2:
            raise SrdLabError(
                f'start={start!r} needs class logits behind the encoder; use start="ones" or give a tensor'
            )
        score = class_logit(self.output, target)
        if start == "contrastive":
            score = score - self.output.mean(1)
        slope = slope_of(score, end.output, differentiable=self.differentiable, retain=True)
        alpha = slope.movedim(end.channels, 1).mean([*range(2, slope.dim())], keepdim=True)
        return torch.relu((alpha * encoded).sum(1))

    def _check_rows(self, what: str, t: Tensor, cure: str = "name another layer") -> None:
        """Refuse ``t`` unless it has a row per image, made of that image alone."""
        images = len(self.leaf)
        check_rows(what, t.shape, images, cure)
        if t.dim() != 3 or images == 1 or images not in t.shape[1:] or not t.requires_grad:
            return
        # as many tokens as images: the batch may come second
        (slope,) = torch.autograd.grad(t[0].sum(), self.leaf, retain_graph=True, allow_unused=True)
        if slope is not None and slope[1:].any():
            raise not_by_rows(what, t.shape, images, cure)

    # backward passes -----------------------------------------------------------------------------------
    def _back(self, begin: _Begin, to: Tensor) -> tuple[Tensor | None, dict[int, Tensor]]:
        with self.trace.live() as relevance:
            (g,) = torch.autograd.grad(
                begin.tensor,
                to,
                begin.signal,
                create_graph=self.differentiable,
                retain_graph=True,
                allow_unused=True,
            )
            found = dict(relevance)
        if begin.call is not None:
            found[begin.call] = begin.relevance
        return g, found

    def at_input(self, begin: _Begin) -> Tensor:
        g, _ = self._back(begin, self.input)
        return self.finish(self._input_relevance(g))

    def _input_relevance(self, g: Tensor | None) -> Tensor:
        return torch.zeros_like(self.input[:, 0]) if g is None else (self.input * g).sum(1)

    def at_call(self, begin: _Begin, index: int) -> Tensor:
        u = self.trace.u[index]
        self._check_rows(f"layer {self.trace.calls[index].name!r}", u)
        if index == begin.call:
            return self.finish(begin.relevance)
        relevance = self._back(begin, u)[1] if u.requires_grad else {}
        if index not in relevance:
            raise SrdLabError(
                f"no relevance reaches {self.trace.calls[index].name!r}: it lies behind the layer that the pass starts at, "
                "or in a branch that does not lead there"
            )
        return self.finish(relevance[index])

    def at_level(self, begin: _Begin, level: str) -> Tensor:
        if level == "input":
            return self.at_input(begin)
        if level == "low":
            found = self.finish(begin.relevance)
        elif level == "high":
            found = self._at_high(begin)
        else:
            found = self.at_call(begin, self.trace.call_index(level))
        if found.dim() != 3:
            raise SrdLabError(
                f"level {level!r} holds relevance of shape {tuple(found.shape)} here (tokens), which is no map (N, h, w); "
                'use level="input", or relevance() for the numbers as they are'
            )
        return found

    def _at_high(self, begin: _Begin) -> Tensor:
        place = self.trace.high(begin.call)
        if isinstance(place, int):
            return self.at_call(begin, place)
        g, _ = self._back(begin, place)
        axis = self.trace.channels.of(place)
        return self.finish(torch.zeros_like(place).sum(axis) if g is None else (place * g).sum(axis))

    def everywhere(self, begin: _Begin) -> dict[str, Tensor]:
        g, relevance = self._back(begin, self.input)
        maps = {"input": self.finish(self._input_relevance(g))}
        last = max(relevance, default=-1)
        for call in self.trace.calls[: last + 1]:
            u = self.trace.u[call.index]
            if u.requires_grad:  # else no image had a part in it
                nothing = u.new_zeros(u.shape[0], *u.shape[2:])
                maps[call.name] = self.finish(relevance.get(call.index, nothing))
        return maps


def _total(relevance: Tensor) -> Tensor:
    """Sum over positions, (N,)."""
    return relevance.flatten(1).sum(1)


@contextmanager
def _tracing(
    method: SRD,
    model: nn.Module,
    x: Tensor,
) -> Iterator[_Run]:
    check_input(x, model)
    leaf, differentiable = traced(x)
    with torch.enable_grad():
        run = _Run(method, model, leaf, differentiable)
        try:
            yield run
        finally:
            run.trace.release()
