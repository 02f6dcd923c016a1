"""Activations in disguise: a map times what is made of the same map entry by entry, through calls that nobody follows.

``u.flatten(1) * torch.stack([u, 0 * u]).softmax(0)[0].flatten(1)`` is SiLU, and no list of spellings ends. What a product
is made of is asked of autograd instead: both factors lead back to one map, and each entry of either to one entry of it.

Tried once when a model is first followed, and remembered as long as it lives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab.engine.affine import DIVISIONS, spelled
from srd_lab.engine.image_trace import ImageTrace
from srd_lab.engine.letters import in_letters, sums_nothing
from srd_lab.engine.model_checks import state_of
from srd_lab.engine.spellings import Function, function_name, plain_spelling
from srd_lab.errors import Refused

_TIMES = spelled("mul multiply __mul__ __rmul__ __imul__") | DIVISIONS
_SUMS_OF_PRODUCTS = spelled("addcmul addcdiv")
_ALONG = spelled("prod")
_MOST = 12  # tensors that two factors are followed back to, and factors of one product
_none_in: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()


def check_no_hidden_activation(model: nn.Module, x: Tensor) -> None:
    """Refuse (SrdLabError) a model that multiplies a map by a function of the same entry, where no call says so.

    x : images (N, C, H, W), of which the first two are tried: a single one may lie in memory in another way.
    """
    known, some = _none_in.setdefault(model, set()), x.detach()[:2]
    key = state_of(model), tuple(some.shape)
    if key not in known:
        with torch.enable_grad():
            _Products(model).run(some.clone().requires_grad_().clone())
        known.add(key)


class _Products(ImageTrace):
    """Runs a model, its activations in one call or written out as they are, and looks at its products of maps."""

    needs_activations = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._made: list[Tensor] = []  # so far, in the order of the calls

    def run(self, x: Tensor) -> Any:
        self._made = [x]
        try:
            return super().run(x)
        finally:
            self._made = []

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        self._made += [t for t in (out if isinstance(out, tuple | list) else (out,)) if _moves(t)]
        return out

    def other(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for a, b in _factors(plain_spelling(function), args, kwargs):
            if _moves(a) and _moves(b) and a.shape == b.shape and self._is_one_function(a, b):
                raise Refused(
                    f"{function_name(function)} in {self.where()} multiplies a map by what is made of it entry by entry: an "
                    "activation by another name, which cannot be followed; write it as one call of torch (F.silu, F.gelu), "
                    "or choose a method that needs gradients only"
                )
        return super().other(function, args, kwargs)

    def _is_one_function(self, a: Tensor, b: Tensor) -> bool:
        """Whether each entry of ``a * b`` is a function of one entry of a map, and more than a power of it."""
        drawn = torch.Generator(a.device).manual_seed(0)
        s, t = (torch.randn(a.shape, generator=drawn, device=a.device).to(a) for _ in range(2))
        for source in self._sources(a, b):
            (a_s, a_t), (b_s, b_t) = ([_back(of, source, signal) for signal in (s, t)] for of in (a, b))
            # an entry made of one entry alone hands on its own signal: the ratio of two signals stays
            one, other = a_s * b_t, a_t * b_s
            both = (one != 0) & (other != 0)
            if both.any():  # else they are made of different entries, as of a map that was put together
                alone = torch.allclose(one[both], other[both], rtol=1e-3, atol=0)
                powers = (_is_power(a, source, (s, t), (a_s, a_t)), _is_power(b, source, (s, t), (b_s, b_t)))
                return alone and not all(powers)
        return False

    def _sources(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """The last tensors that both are made of, the last first."""
        nodes = _below(a.grad_fn) & _below(b.grad_fn)
        return [t for t in reversed(self._made) if t.grad_fn in nodes][:_MOST]


def _factors(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The pairs of tensors that a call multiplies entry by entry."""
    operands = (*args, *(kwargs[name] for name in ("input", "other", "tensor1", "tensor2") if name in kwargs))
    if function in _TIMES and len(operands) == 2:
        yield operands
    elif function in _SUMS_OF_PRODUCTS and len(operands) >= 3:
        yield operands[1], operands[2]
    elif function is torch.einsum and sums_nothing(function, args):
        tensors, letters, _ = in_letters(function, args, kwargs) or ([], [], "")
        for t, row in zip(tensors[1:], letters[1:], strict=True):
            if sorted(row) == sorted(letters[0]):
                yield tensors[0], t.permute([row.index(letter) for letter in letters[0]])
    elif function in (F.glu, torch._C._nn.glu):
        value, gate = operands[0].chunk(2, kwargs.get("dim", args[1] if len(args) > 1 else -1))
        yield value, torch.sigmoid(gate)
    elif function in _ALONG and isinstance(dim := kwargs.get("dim", args[1] if len(args) > 1 else None), int):
        first, *others = operands[0].unbind(dim)
        yield from ((first, t) for t in others[:_MOST])


def _moves(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and t.grad_fn is not None and t.numel() > 1


def _below(top: Any) -> set[Any]:
    """The nodes of autograd's graph that lead to ``top``, which is one of them."""
    found, waiting = {top}, [top]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in found:
                found.add(node)
                waiting.append(node)
    return found


def _back(of: Tensor, to: Tensor, signal: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(of, to, signal, retain_graph=True, allow_unused=True)
    return torch.zeros_like(to) if g is None else g


def _is_power(
    of: Tensor, source: Tensor, signals: tuple[Tensor, Tensor], back: tuple[Tensor, Tensor]
) -> bool:
    """Whether a function f of one entry is a power of it, so that ``u f'(u) / f(u)`` is one number (Euler)."""
    f = [float((of.detach() * s).double().sum()) for s in signals]
    slope = [float((source.detach() * g).double().sum()) for g in back]
    return abs(f[0] * slope[1] - f[1] * slope[0]) <= 1e-4 * (abs(f[0] * slope[1]) + abs(f[1] * slope[0]))
