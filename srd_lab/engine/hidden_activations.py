"""Activations in disguise: what is a function of one entry of a map, and bent, through calls that nobody follows.

``u.flatten(1) * torch.stack([u, 0 * u]).softmax(0)[0].flatten(1)`` is SiLU, and no list of spellings ends. So autograd is
asked what a product, a choice, or what else is not affine and makes one number of several, is made of: whether each entry of
it leads back to one entry of a map, with a slope that depends on that entry, or is another one in another place and image.

Tried once when a model is first followed, and remembered as long as its weights stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from srd_lab.engine.affine import (
    CURVES,
    JOINS,
    KINKS,
    LEAVING,
    LIKE,
    SELECTIONS,
    SHAPED,
    SHIFTS,
    is_affine,
    spelled,
)
from srd_lab.engine.geometry import MaxPool
from srd_lab.engine.image_trace import ImageTrace
from srd_lab.engine.model_memory import memory_of
from srd_lab.engine.spellings import Call, Function, function_name, tensors_in
from srd_lab.errors import Refused

_HALVES = spelled("glu")
_ALONG = _HALVES | spelled("prod cumprod")
_NAMED = (  # bent, and refused by name where it matters; roots and quotients are of statistics, too
    CURVES | KINKS | spelled("pow __pow__ square sqrt rsqrt div divide true_divide __truediv__ __itruediv__")
)
_MOST = 12  # tensors that a call is followed back to
_RECENT = 60  # tensors among which these are
_FURTHER = 4  # calls that a suspect is followed through
_DEEP = 500  # nodes of autograd's graph among which these are


def check_no_hidden_activation(model: nn.Module, x: Tensor) -> None:
    """Refuse (SrdLabError) a model that makes a bent function of single entries of a map where no call says so.

    x : images (N, C, H, W), of which the first is tried, with another one made of it.
    """
    known, one = memory_of(model), x.detach()[:1]
    key = _Suspects, tuple(one.shape)
    if key not in known:
        # a model may be one for single images, or for batches of this size
        for tried in (torch.cat([one, one.flip((2, 3)) / 2]), one, x.detach()):
            trace = _Suspects(model)
            try:
                with torch.enable_grad():
                    trace.run(tried.clone().requires_grad_().clone())
                known[key] = True
                break
            except Hidden:
                raise
            except Exception:  # whoever runs the model next says why
                continue
            finally:
                trace.release()


class Hidden(Refused):
    """The refusal of a model that makes an activation by another name, or goes where it cannot be followed."""


class _Suspects(ImageTrace):
    """Runs a model, its activations in one call or written out as they are, and tries its products of maps, its choices and
    what else is not affine, and what is made of these in some calls more."""

    needs_activations = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._made = deque[Tensor](maxlen=_RECENT)
        self._activated = WeakTensorKeyDictionary()  # what calls that are followed put out
        self._cut = WeakTensorKeyDictionary()  # what is made of the image and asks for no gradient
        self._suspects = WeakTensorKeyDictionary()  # what such calls put out, what of, and in how many calls

    def run(self, x: Tensor) -> Any:
        self._made.append(x)
        try:
            return super().run(x)
        finally:
            self._made.clear()

    def intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = tensors_in(args[:1] if func in SHAPED else args, kwargs)
        if func in LEAVING and any(_moves(t) or t in self._cut for t in tensors):
            raise Hidden(
                f"{function_name(func)} in {self.where()} takes what is made of the image out of torch, where nothing can "
                "be followed; write it with torch's functions"
            )
        out = super().intercept(func, args, kwargs)
        if func not in LIKE and any(_moves(t) or t in self._cut for t in tensors):
            for t in tensors_in((out,)):
                if _moves(t):
                    self._made.append(t)
                elif not t.requires_grad:
                    self._cut[t] = True
        return out

    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        out = super().activate(call, x, inplace)
        self._activated[out] = True
        return out

    def other(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = tensors_in(args[:1] if function in SHAPED else args, kwargs)
        moving = [t for t in tensors if _moves(t)]
        found = self._suspects_of(function, args, kwargs, tensors, moving)
        earlier = [self._suspects[t] for t in moving if t in self._suspects and function not in SHIFTS]
        out = super().other(function, args, kwargs)
        made = [t for t in tensors_in((out,)) if _moves(t)]
        if len(found) == 1 and function not in SELECTIONS and not any(t in self._cut for t in tensors):
            made_of = found[0].numel()
            found = [] if function in _NAMED and all(t.numel() >= made_of for t in made) else found
        for parts, calls in ((found, 0), *earlier):
            for t in made if parts else ():
                if calls < _FURTHER:
                    self._suspects[t] = parts, calls + 1
                if self._is_activation(t, parts):
                    raise Hidden(
                        f"{function_name(function)} in {self.where()} is an activation by another name: each entry is "
                        "a bent function of one entry of a map, and there is no rule for it; write it as one call of torch "
                        "(F.relu, F.silu, F.gelu), or choose a method that needs gradients only"
                    )
        return out

    def max_pool(self, pool: MaxPool) -> Any:
        out = super().max_pool(pool)
        pooled = out if isinstance(out, Tensor) else out[0]
        if _moves(pooled) and self._is_activation(pooled, [pool.x]):
            raise Hidden(
                f"the max pool in {self.where()} is an activation by another name: it chooses between a map and what is "
                "made of the same entry, and there is no rule for it; write it as one call of torch (F.relu), or choose a "
                "method that needs gradients only"
            )
        return out

    def _suspects_of(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        moving: list[Tensor],
    ) -> list[Tensor]:
        """What a call multiplies, chooses from, or makes something of that is not affine; empty for all other calls."""
        if not moving or function in SHIFTS | JOINS:
            return []
        if function in _ALONG:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            return list(moving[0].chunk(2, dim) if function in _HALVES else moving[0].unbind(dim))
        if function in SELECTIONS or any(t in self._cut for t in tensors):
            return moving
        return [] if is_affine(function, args, kwargs, moving) else moving

    def _has_slope(self, t: Tensor) -> bool:
        """Whether ``t`` depends on what it was made of."""
        below = _below(t.grad_fn)
        first = next((s for s in self._made if s.grad_fn in below), t)
        return bool(_back(t, first, _signal(t)).any())

    def _is_activation(self, out: Tensor, parts: list[Tensor]) -> bool:
        """Whether each entry of ``out`` is a bent function of one entry of a map that all ``parts`` are made of."""
        if out.numel() == len(out):  # one number of an image is a function of every other one
            return False
        signal = _signal(out)
        below = set.intersection(*(_below(t.grad_fn) for t in parts))
        sources = [t for t in reversed(self._made) if t.grad_fn in below and t.numel() == out.numel()]
        sloped = [t for t in parts if self._has_slope(t)]  # a rounded gate has none
        near = max(100 * torch.finfo(out.dtype).eps, 1e-9)
        for source in _up_to(self._activated, sources[:_MOST]):
            slope, first, second = (_back(out, source, signal**power) for power in (0, 1, 2))
            size = float(slope.abs().amax() * second.abs().amax())
            if not 0 < size < torch.inf or not all(_back(t, source, _signal(t)).any() for t in sloped):
                continue
            # of one entry alone, the mean of the signals that arrive is one signal, and that of their squares its square
            if not torch.allclose(slope * second, first * first, rtol=near, atol=near * size):
                return False
            power = _power(out, source, signal, slope, first)
            if power is None and _is_curved(out, source):
                return True
            if power == 1 and _differs(slope):
                return True
            if power == 2 and _differs(_per_entry(slope, source)):  # u * relu(u), and not a square
                return True
        return False


def _signal(t: Tensor) -> Tensor:
    """Positive numbers, like ``t``, that are always the same."""
    drawn = torch.Generator(t.device).manual_seed(0)
    return 4 * torch.rand(t.shape, generator=drawn, device=t.device).to(t) + 0.1


def _up_to(last: Container[Tensor], tensors: list[Tensor]) -> Iterator[Tensor]:
    """Tensors up to the first that is among ``last``."""
    for t in tensors:
        yield t
        if t in last:
            return


def _moves(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and t.grad_fn is not None and t.numel() > 1


def _below(top: Any) -> set[Any]:
    found, waiting = {top}, deque([top])
    while waiting and len(found) < _DEEP:
        for node, _ in waiting.popleft().next_functions:
            if node is not None and node not in found:
                found.add(node)
                waiting.append(node)
    return found


def _back(of: Tensor, to: Tensor, signal: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(of, to, signal, retain_graph=True, allow_unused=True)
    return torch.zeros_like(to) if g is None else g.detach()


def _per_entry(slope: Tensor, source: Tensor) -> Tensor:
    """``slope`` over ``source``, which is the same for all entries of a square; that of the mean where these are near 0."""
    values, size = source.detach(), float(source.detach().abs().amax())
    far = values.abs() > 1e-2 * size
    of_far = slope[far] / values[far]
    return torch.full_like(slope, float(of_far.mean())).masked_scatter(far, of_far)


def _differs(slope: Tensor) -> bool:
    """Whether a function's slopes (2, C, ...) are not the same for the two images, nor those of a gate that all places of a
    channel, or all channels of a place, have in common."""
    if len(slope) < 2:
        return False
    near = 1e-3 * float(slope.abs().amax())
    of_place = [
        slope.amax(axis) - slope.amin(axis) for axis in range(1, slope.dim()) if slope.shape[axis] > 1
    ]
    one, other = slope.chunk(2)
    return bool((one - other).abs().amax() > near) and all(bool((t > near).any()) for t in of_place)


def _is_curved(out: Tensor, source: Tensor) -> bool:
    """Whether the slope of ``out`` depends on ``source``, by a thousandth of it at least."""
    (slope,) = torch.autograd.grad(out.sum(), source, create_graph=True)
    if not slope.requires_grad:
        return False
    (curve,) = torch.autograd.grad(slope.sum(), source, retain_graph=True, allow_unused=True)
    return curve is not None and bool((curve * source).abs().amax() > 1e-3 * slope.abs().amax())


def _power(out: Tensor, source: Tensor, signal: Tensor, slope: Tensor, first: Tensor) -> float | None:
    """The k for which ``u f'(u) = k f(u)`` (Euler), of a function f of single entries; None if there is none."""
    f = [float((out.detach() * s).double().sum()) for s in (torch.ones_like(signal), signal)]
    uf = [float((source.detach() * g).double().sum()) for g in (slope, first)]
    if abs(f[0] * uf[1] - f[1] * uf[0]) > 1e-4 * (abs(f[0] * uf[1]) + abs(f[1] * uf[0])) or not f[0]:
        return None
    return round(uf[0] / f[0], 3)
