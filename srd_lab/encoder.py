"""SRD's trace of a model: gates, bias shares, where the encoder ends and where the input begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab import rules
from srd_lab.backprop import Decomposed, TensorNotes
from srd_lab.calls import BatchNorm, Call, Convolution, MaxPool
from srd_lab.types import SrdLabError

_GLOBAL_POOLS = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
_SHIFT_AND_SCALE = {"add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_"}
_NORMALISING = _SHIFT_AND_SCALE | {"__rsub__", "rsub", "subtract", "true_divide", "clone", "cat", "stack"}


@dataclass(frozen=True)
class End:
    """Where the encoder ends: its output map as it was then, and the activation call that made it (None after a
    pool)."""

    output: Tensor
    call: Call | None
    version: int


class SRDTrace(Decomposed):
    """A forward pass that can be decomposed backwards.

    encoder : dotted module name, "" for the model itself, None to find it.
    with_bias : whether biases and batch-norm shifts are shared (Eq. 11).
    """

    def __init__(self, model: nn.Module, rule: rules.Rule, encoder: str | None, with_bias: bool) -> None:
        super().__init__(model, rule)
        self.u: list[Tensor] = []
        self.v: list[Tensor] = []
        self._with_bias = with_bias
        self._encoder = None if encoder is None else find_module(model, encoder)
        self._encoder_name = encoder
        self._made_by: TensorNotes[Call] = TensorNotes()
        self._convolved: TensorNotes[Convolution] = TensorNotes()
        self._found: End | None = None
        self._input: Tensor | None = None  # what the network proper is fed with, once normalised
        self._at_input = True
        self._shape: torch.Size | None = None

    def trace(self, leaf: Tensor) -> tuple[Any, Tensor]:
        """Output of the model and the tensor that input relevance refers to: leaf, or what a leading
        normalisation made of it."""
        self._shape = leaf.shape
        output = self.run(leaf.clone())  # a model may change its input in place; the caller's stays as it was
        return output, leaf if self._input is None else self._input

    def end(self) -> End:
        """Where the encoder ended in the last trace."""
        if self._found is None:
            raise SrdLabError(
                "no end of an encoder was found (a map with spatial extent before global pooling or flattening); "
                'name the submodule that puts it out with encoder="..." ("" is the model itself)'
            )
        if self._found.output._version != self._found.version:
            raise SrdLabError(
                "what was found as the encoder's output is overwritten by the model later on; name the submodule that "
                'puts it out with encoder="..."'
            )
        if self._found.output.dim() != 4:
            raise SrdLabError(
                f"encoder {self._encoder_name!r} puts out shape {tuple(self._found.output.shape)}; expected a map "
                "(N, C, h, w): name a submodule before pooling or flattening"
            )
        return self._found

    def release(self) -> None:
        """Let go of every tensor, so that the graph dies with whoever still needs it."""
        self.u.clear()
        self.v.clear()
        self._made_by.clear()
        self._convolved.clear()
        self._found = self._input = None

    # calls ---------------------------------------------------------------------------------------------
    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        self._at_input = False
        self._reopen(x)
        out = super().activate(call, x, inplace)
        self._made_by.put(out, call)
        return out

    def gate(self, call: Call, u: Tensor, v: Tensor) -> Tensor:
        self.u.append(u)
        self.v.append(v)
        return super().gate(call, u, v)

    def convolution(self, conv: Convolution) -> Tensor:
        self._at_input = False
        self._reopen(conv.x)
        y = conv.apply(conv.x, conv.weight, conv.bias)
        if conv.bias is not None and self._with_bias:
            y = self.share_bias(y, conv.x, conv.bias, conv)
        self._convolved.put(y, conv)
        return y

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self._at_input = False
        y = F.linear(x, weight, bias)
        if bias is None or not self._with_bias or x.dim() != 2:
            return y
        return self.share_bias(y, x, bias, None)

    def batch_norm(self, norm: BatchNorm, run: Callable[[], Tensor]) -> Tensor:
        self._at_input = False
        y = run()
        if not self._with_bias:
            return y
        conv = self._convolved.get(norm.x)
        return self.share_bias(y, norm.x if conv is None else conv.x, norm.shift, conv)

    def max_pool(self, pool: MaxPool) -> Any:
        self._at_input = False
        return super().max_pool(pool)

    def other(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = super().other(function, args, kwargs)
        if isinstance(out, Tensor) and out.requires_grad:
            self._follow_input(function, out)
            if args and isinstance(args[0], Tensor):
                self._look_for_end(function, args[0], out)
        return out

    # where things begin and end --------------------------------------------------------------------------
    def left(self, module: nn.Module, output: Any) -> Any:
        if module is self._encoder:
            if not isinstance(output, Tensor):
                raise SrdLabError(
                    f"encoder {self._encoder_name!r} puts out {type(output).__name__}; expected one tensor"
                )
            self._found = End(output, self._made_by.get(output), output._version)
            return output.clone()  # what follows may overwrite it
        return None

    def accountable(self, out: Any) -> bool:
        """Behind the encoder anything goes: the start needs gradients only."""
        if self._found is None:
            return True
        return self._encoder is None and isinstance(out, Tensor) and out.dim() == 4 and max(out.shape[2:]) > 1

    def _follow_input(self, function: Callable[..., Any], out: Tensor) -> None:
        """A shift or scale ahead of the first layer is normalisation: the input is what it puts out."""
        if self._at_input and out.shape == self._shape and getattr(function, "__name__", "") in _NORMALISING:
            self._input = out

    def _reopen(self, x: Tensor) -> None:
        """A layer on a map with spatial extent: what was pooled before was a side branch, not the end."""
        if self._encoder is None and x.dim() == 4 and max(x.shape[2:]) > 1:
            self._found = None

    def _look_for_end(self, function: Callable[..., Any], first: Tensor, out: Tensor) -> None:
        if self._encoder is not None or self._found is not None:
            return
        if first.dim() != 4 or not first.requires_grad:
            return
        pooled = out.dim() == 4 and max(out.shape[2:]) == 1 < max(first.shape[2:])
        flattened = out.dim() < 4 and out.shape[0] == first.shape[0]
        if function in _GLOBAL_POOLS or pooled or flattened:
            self._found = End(first, self._made_by.get(first), first._version)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that dotted name; a wrapper's prefix may be left out."""
    modules = dict(model.named_modules())
    if name in modules:
        return modules[name]
    matches = [module for full, module in modules.items() if full.endswith("." + name)]
    if len(matches) != 1:
        known = ", ".join(full for full, _ in model.named_children())
        raise SrdLabError(
            f"the model has no submodule {name!r}; its parts are {known} (dotted names go deeper)"
        )
    return matches[0]
