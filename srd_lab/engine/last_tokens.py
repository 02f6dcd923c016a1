"""The layer of a transformer that maps are made at: the last one whose patches the logits are made of.

Behind the last attention a head that reads the class token sees no patch any more: there the patches' slopes are zero. All
that the logits owe to patches passes the tokens that this attention reads: in a block that normalises first, the output of
its first norm. Where the head averages patches, it is the tokens that are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srd_lab.engine.alignment import Alignment
from srd_lab.engine.channels import has_extent
from srd_lab.engine.layer_trace import LayerTrace, Tokens
from srd_lab.engine.layers import cuts
from srd_lab.engine.model_memory import memory_of
from srd_lab.engine.token_grid import TokenGrid

_ROUNDING = 1e-3  # of the largest slope, that two ways to the same slopes may be apart by


def last_tokens(trace: LayerTrace, alignment: Alignment, logits: Tensor) -> Tokens | None:
    """The last tokens with patches in the pass ``trace`` through which all passes that the logits (N, K) owe to patches.

    These are tokens that every path to the logits passes, or, behind such tokens, some whose patches alone give all of the
    slopes of the patches there; not those of more channels, which are queries, keys and values in one. None where there are
    no tokens on a grid, and where all passes others behind them.

    Searched once for a model that calls the same functions, by one backward pass and one for every layer that is tried.
    """
    if not trace.tokens:
        return None
    known: dict[Any, int | None] = memory_of(trace.model).setdefault(last_tokens, {})
    key = trace.sequence, tuple(logits.shape)
    if key not in known:
        known[key] = _searched(trace, alignment, logits)
    return next((tokens for tokens in trace.tokens if tokens.event == known[key]), None)


def _searched(trace: LayerTrace, alignment: Alignment, logits: Tensor) -> int | None:
    """The event of the tokens that :func:`last_tokens` looks for."""
    tried = [tokens for tokens in trace.tokens if tokens.output._version == tokens.version]
    if not tried or not logits.requires_grad:
        return None
    drawn = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits) + 0.5
    outputs = [tokens.output for tokens in tried]
    slopes = torch.autograd.grad((logits * drawn).sum(), outputs, retain_graph=True, allow_unused=True)
    passed = cuts(logits.grad_fn, trace.bottom)
    grids = [alignment.grid(tokens.event, tokens.channels) for tokens in tried]
    found = [_Found(*one) for one in zip(tried, grids, slopes, strict=True)]
    through = [one for one in found if one.tokens.output.grad_fn in passed and one.slope is not None]
    for one in reversed(found):
        if one.grid is None:
            if one in through and has_extent(one.tokens.output, one.tokens.channels):
                return None  # all passes tokens of which it is not known where they lie
            continue
        if one.slope is None or not one.grid.lay(one.slope, one.tokens.channels).any():
            continue
        before = next((t for t in reversed(through) if t.grid and t.tokens.event < one.tokens.event), None)
        if before is not None and _width(one.tokens) > _width(before.tokens):
            continue
        if one in through or (before is not None and _gives(one, before)):
            return one.tokens.event
    return None


@dataclass(frozen=True, eq=False)
class _Found:
    """Tokens, where they lie, and the slope of the logits there; None for what is not known or not there."""

    tokens: Tokens
    grid: TokenGrid | None
    slope: Tensor | None


def _width(tokens: Tokens) -> int:
    return tokens.output.shape[tokens.channels]


def _gives(later: _Found, before: _Found) -> bool:
    """Whether all slopes of the patches ``before`` come through those of ``later`` tokens."""
    if later.grid is None or later.slope is None or before.grid is None or before.slope is None:
        return False
    axis = later.tokens.channels
    lies = later.grid.lies(later.slope.shape[3 - axis])
    signal = later.slope * (lies if axis == 1 else lies[:, None])
    (through,) = torch.autograd.grad(
        later.tokens.output, before.tokens.output, signal, retain_graph=True, allow_unused=True
    )
    if through is None:
        return False
    whole, found = (before.grid.lay(t, before.tokens.channels) for t in (before.slope, through))
    return bool((whole - found).abs().amax() <= _ROUNDING * whole.abs().amax())
