"""Activations in disguise: what is a function of one entry of a map, and bent, through calls that nobody follows.

``u.flatten(1) * torch.stack([u, 0 * u]).softmax(0)[0].flatten(1)`` is SiLU, and no list of spellings ends. So autograd is
asked what a product, or a choice, is made of: whether each entry of it leads back to one entry of a map, with a slope that
depends on that entry; of a choice, whether the slope is another one for another image.

Tried once when a model is first followed, and remembered as long as it lives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from srd_lab.engine.affine import JOINS, LIKE, SELECTIONS, SHAPED, SHIFTS, spelled
from srd_lab.engine.image_trace import ImageTrace
from srd_lab.engine.model_checks import memory_of, state_of
from srd_lab.engine.spellings import Call, Function, function_name, tensors_in
from srd_lab.errors import Refused

_HALVES = spelled("glu")
_ALONG = _HALVES | spelled("prod cumprod")
_MOST = 12  # tensors that a call is followed back to
_RECENT = 60  # tensors among which these are
_DEEP = 500  # nodes of autograd's graph among which these are


def check_no_hidden_activation(model: nn.Module, x: Tensor) -> None:
    """Refuse (SrdLabError) a model that makes a bent function of single entries of a map where no call says so.

    x : images (N, C, H, W), of which the first is tried, with another one made of it.
    """
    known, one = memory_of(model), x.detach()[:1]
    key = _Suspects, state_of(model), tuple(one.shape)
    if key not in known:
        for tried in (torch.cat([one, one.flip((2, 3)) / 2]), one):  # a model may be one for single images
            trace = _Suspects(model)
            try:
                with torch.enable_grad():
                    trace.run(tried.clone().requires_grad_().clone())
                break
            except HiddenActivation:
                raise
            except Exception:  # whoever runs the model next says why
                continue
            finally:
                trace.release()
        known[key] = True


class HiddenActivation(Refused):
    """The refusal of a model that makes an activation by another name."""


class _Suspects(ImageTrace):
    """Runs a model, its activations in one call or written out as they are, and tries its products of maps and its choices,
    and what is made of these in one call more."""

    needs_activations = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._made = deque[Tensor](maxlen=_RECENT)
        self._activated = WeakTensorKeyDictionary()  # what calls that are followed put out
        self._cut = WeakTensorKeyDictionary()  # what is made of the image and asks for no gradient
        self._suspects = WeakTensorKeyDictionary()  # what products and choices put out, and what of

    def run(self, x: Tensor) -> Any:
        self._made.append(x)
        try:
            return super().run(x)
        finally:
            self._made.clear()

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = tensors_in(args[:1] if func in SHAPED else args, kwargs)
        out = super().__torch_function__(func, types, args, kwargs)
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
        found = self._suspicion(function, args, kwargs, tensors, moving)
        earlier = [self._suspects[t] for t in moving if t in self._suspects and function not in SHIFTS]
        out = super().other(function, args, kwargs)
        for suspicion in (found, *earlier):
            for t in filter(_moves, tensors_in((out,))) if suspicion else ():
                if suspicion is found:
                    self._suspects[t] = found
                if self._is_activation(t, *suspicion):
                    raise HiddenActivation(
                        f"{function_name(function)} in {self.where()} is an activation by another name: each entry is "
                        "a bent function of one entry of a map, and there is no rule for it; write it as one call of torch "
                        "(F.relu, F.silu, F.gelu), or choose a method that needs gradients only"
                    )
        return out

    def _suspicion(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        moving: list[Tensor],
    ) -> tuple[list[Tensor], bool] | None:
        """What a call multiplies, or chooses from, and whether it chooses; None for a call that does neither."""
        if not moving:
            return None
        if function in SELECTIONS or any(t in self._cut for t in tensors):
            return moving, True
        if function in _ALONG:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            return list(moving[0].chunk(2, dim) if function in _HALVES else moving[0].unbind(dim)), False
        return (moving, False) if len(moving) > 1 and function not in SHIFTS | JOINS else None

    def _is_activation(self, out: Tensor, parts: list[Tensor], chooses: bool) -> bool:
        """Whether each entry of ``out`` is a bent function of one entry of a map that all ``parts`` are made of."""
        drawn = torch.Generator(out.device).manual_seed(0)
        signal = 4 * torch.rand(out.shape, generator=drawn, device=out.device).to(out) + 0.1
        below = set.intersection(*(_below(t.grad_fn) for t in parts))
        sources = [t for t in reversed(self._made) if t.grad_fn in below and t.numel() == out.numel()]
        near = max(100 * torch.finfo(out.dtype).eps, 1e-9)
        for source in _up_to(self._activated, sources[:_MOST]):
            slope, first, second = (_back(out, source, signal**power) for power in (0, 1, 2))
            size = float(slope.abs().amax() * second.abs().amax())
            if not 0 < size < torch.inf or not all(_back(t, source, torch.ones_like(t)).any() for t in parts):
                continue
            # of one entry alone, the mean of the signals that arrive is one signal, and that of their squares its square
            if not torch.allclose(slope * second, first * first, rtol=near, atol=near * size):
                return False
            power = _power(out, source, signal, slope, first)
            if power is None and _is_curved(out, source):
                return True
            if chooses and power == 1 and _differs(slope):
                return True
        return False


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


def _differs(slope: Tensor) -> bool:
    """Whether a function's slopes (2, ...) are not the same for the two images."""
    if len(slope) < 2:
        return False
    one, other = slope.chunk(2)
    return not torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(slope.abs().amax()))


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
