"""SRD's backward passes from one forward pass: where they start, and what arrives at a layer or at the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srd_lab.engine import rules
from srd_lab.engine.attribution import Attribution
from srd_lab.engine.layers import check_rows, not_by_rows
from srd_lab.engine.live_pass import Leaks
from srd_lab.engine.srd_trace import SRDTrace
from srd_lab.errors import BadValue, Refused


@dataclass(frozen=True)
class Start:
    """Where a backward pass starts.

    tensor : of the trace, channels along dimension 1, (N, C, ...); signal : the signal there, of its shape.
    relevance : what the signal stands for, (N, ...).
    leaked : how much of that, of all images together, starts at zero vectors, where no signal can stand for it.
    call : index of the activation call whose pre-activation the tensor is; None for another tensor.
    """

    tensor: Tensor
    signal: Tensor
    relevance: Tensor
    leaked: Tensor
    call: int | None


class BackwardPasses:
    """One forward pass of a model, and the backward passes that are made from it.

    run : the attribution. trace : what runs the model. post : whether the reference vector of an activation is its output
        instead of its pre-activation (the ablation of Fig. 7 of the SRD paper).
    output : what the model puts out. input : the tensor (N, C, H, W) that relevance of the input is of.
    """

    def __init__(self, run: Attribution, trace: SRDTrace, *, post: bool) -> None:
        self.run, self.trace, self._post = run, trace, post
        self.output, self.input = trace.trace(run.given)

    # starts --------------------------------------------------------------------------------------------
    def from_encoder(self, relevance: Tensor) -> Start:
        """A start from ``relevance`` (N, ...) at the positions of the encoder's output."""
        end = self.trace.end()
        if end.call is not None:
            return self._from_call(end.call.index, relevance)
        output = end.output.movedim(end.channels, 1)
        return _start(output, output, relevance, None)

    def from_position(self, index: int, position: tuple[int, ...]) -> Start:
        """A start from relevance 1 at one position of activation call ``index``, for every image.

        position : (row, column), or (index,) on tokens. Raises SrdLabError for one outside of the map.
        """
        u = self.trace.u[index]
        places = tuple(u.shape[2:])
        self._check_layer(index)
        if not isinstance(position, tuple) or not all(isinstance(i, int) for i in position):
            raise BadValue(f"a position is a tuple (row, column), or (index,) on tokens, got {position!r}")
        if len(position) != len(places) or any(
            not 0 <= i < size for i, size in zip(position, places, strict=True)
        ):
            raise BadValue(
                f"position {position} is outside the map of {self.trace.calls[index].name}, {places}"
            )
        r = u.new_zeros(u.shape[0], *places)
        here: tuple[Any, ...] = (slice(None), *position)
        r[here] = 1
        return self._from_call(index, r)

    def _from_call(self, index: int, r: Tensor) -> Start:
        u = self.trace.u[index]
        return _start(u, self.trace.v[index] if self._post else u, r, index)

    def check_rows(self, what: str, t: Tensor, cure: str = "name another layer") -> None:
        """Refuse a tensor ``t`` of the trace, called ``what``, unless it has a row per image, made of that image alone.

        cure : what to do otherwise. Raises SrdLabError.
        """
        images = len(self.run.given)
        check_rows(what, t.shape, images, cure)
        if t.dim() != 3 or images == 1 or images not in t.shape[1:] or not t.requires_grad:
            return
        # as many tokens as images: the batch may come second
        (slope,) = torch.autograd.grad(t[0].sum(), self.run.given, retain_graph=True, allow_unused=True)
        if slope is not None and slope[1:].any():
            raise not_by_rows(what, t.shape, images, cure)

    def _check_layer(self, index: int) -> None:
        self.check_rows(f"layer {self.trace.calls[index].name!r}", self.trace.u[index])

    # backward passes -----------------------------------------------------------------------------------
    def at_input(self, start: Start) -> Tensor:
        """Relevance (N, H, W) that arrives at the input."""
        g, _ = self._back(start, self.input)
        return self.run.finish(self._input_relevance(g))

    def at_call(self, start: Start, index: int) -> Tensor:
        """Relevance (N, ...) that arrives at activation call ``index``. Raises SrdLabError where none does."""
        self._check_layer(index)
        if index == start.call:
            return self.run.finish(start.relevance)
        u = self.trace.u[index]
        relevance = self._back(start, u)[1] if u.requires_grad else {}
        if index not in relevance:
            raise Refused(
                f"no relevance reaches {self.trace.calls[index].name!r}: it lies behind the layer that the pass starts at, "
                "or in a branch that does not lead there"
            )
        return self.run.finish(relevance[index])

    def over_image(self, relevance: Tensor, index: int | None, what: str) -> Tensor:
        """Relevance (N, h, w) of a map that lies over the image; that of tokens (N, T) as such a map, each where it lies
        over the image, less class and register tokens.

        index : of the activation call that it is at; None for the encoder's output. what : its name, for messages.

        Raises SrdLabError for what is not known to lie over the image, and for an encoder's output of which no patch is
        read.
        """
        alignment, end = self.run.alignment(self.trace), self.trace.end()
        if index is None and end.call is not None:
            index = end.call.index
        event = (end.event or 0) if index is None else self.trace.made_by[index]
        axis = end.channels if index is None else self.trace.axes[index]
        if relevance.dim() != 2:
            alignment.check(event, axis, what)
            return relevance
        grid = alignment.check_tokens(event, axis, what)
        if index is None and self.output.requires_grad:
            of = (self.output.square().sum(), end.output)
            (slope,) = torch.autograd.grad(*of, retain_graph=True, allow_unused=True)
            if slope is not None and not grid.lay(slope, axis).any():
                raise Refused(
                    f"{what} holds no relevance that a patch has of its own: the logits read none there, but a class token; "
                    'use level="input" or "high", or name an encoder that ends before the last attention with encoder="..."'
                )
        return grid.lay_numbers(relevance)

    def at_high(self, start: Start) -> Tensor:
        """Relevance (N, h, w) at the last map of 1/8 of the image that all of it passes, see :meth:`SRDTrace.high`."""
        place = self.trace.high(start.call)
        if isinstance(place, int):
            self.run.alignment(self.trace).check_made(self.trace.made_by[place], "level 'high'")
            return self.at_call(start, place)
        g, _ = self._back(start, place)
        axis = self.trace.channels.of(place)
        self.run.alignment(self.trace).check(self.trace.records[place].event or 0, axis, "level 'high'")
        return self.run.finish(torch.zeros_like(place).sum(axis) if g is None else (place * g).sum(axis))

    def everywhere(self, start: Start) -> dict[str, Tensor]:
        """Relevance at the input, "input", and at every activation call up to the start, by name and in call order."""
        g, relevance = self._back(start, self.input)
        maps = {"input": self.run.finish(self._input_relevance(g))}
        last = max(relevance, default=-1)
        for call in self.trace.calls[: last + 1]:
            u = self.trace.u[call.index]
            if u.requires_grad:  # else no image had a part in it
                nothing = u.new_zeros(u.shape[0], *u.shape[2:])
                maps[call.name] = self.run.finish(relevance.get(call.index, nothing))
        return maps

    def leaks(self, start: Start) -> Leaks:
        """What the last backward pass, from ``start``, could not pass on."""
        return self.trace.live_pass.leaks.plus("dead fields", start.leaked)

    def _input_relevance(self, g: Tensor | None) -> Tensor:
        return torch.zeros_like(self.input[:, 0]) if g is None else (self.input * g).sum(1)

    def _back(self, start: Start, to: Tensor) -> tuple[Tensor | None, dict[int, Tensor]]:
        """The signal at ``to``, None where none arrives; and the relevance by activation call."""
        with self.trace.live() as relevance:
            (g,) = torch.autograd.grad(
                start.tensor,
                to,
                start.signal,
                create_graph=self.run.differentiable,
                retain_graph=True,
                allow_unused=True,
            )
            found = dict(relevance)
        if start.call is not None:
            found[start.call] = start.relevance
        return g, found


def _start(tensor: Tensor, reference: Tensor, r: Tensor, call: int | None) -> Start:
    """Signal u R / ||u||^2, so that the relevance of every position is R (per neuron, R is split as u^2 is)."""
    square = rules.squared_norm(reference)
    signal = rules.along(reference, r[:, None], square)
    leaked = (r.detach() * (square[:, 0] == 0)).sum()
    return Start(tensor, signal, r, leaked, call)
