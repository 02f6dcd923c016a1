"""SRD's trace of a model: gates, bias shares, where the encoder ends and where the input begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab import rules
from srd_lab.affine import COPIES, SHIFTS, constant_part, is_affine, overwrites
from srd_lab.backprop import Decomposed
from srd_lab.calls import BatchNorm, Call, Convolution, Function, MaxPool, tensors_in
from srd_lab.held import HELD
from srd_lab.layout import Channels, has_extent
from srd_lab.level import call_index, high_call
from srd_lab.notes import TensorNotes, original_of
from srd_lab.types import SrdLabError

T = torch.Tensor
_GLOBAL_POOLS = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
_SHIFT_AND_SCALE = {"add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_"}
_NORMALISING = _SHIFT_AND_SCALE | {"__rsub__", "rsub", "subtract", "true_divide", "clone", "cat", "stack"}
# of colours, to normalise each
_SLICING = {"__getitem__", "unsqueeze", "select", "narrow", "chunk", "split", "unbind"}


@dataclass(frozen=True)
class End:
    """Where the encoder ends: its output map as it was then, the axis of its channels, and the activation call that
    made it (None after anything else)."""

    output: Tensor
    axis: int
    call: Call | None
    version: int


class SRDTrace(Decomposed):
    """A forward pass that can be decomposed backwards.

    encoder : dotted module name, "" for the model itself, None to find it.
    with_bias : whether biases, shifts of normalisations and added constants are shared (Eq. 11).
    accounting : whether live passes put down what is lost, for one image at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: rules.Rule,
        encoder: str | None,
        with_bias: bool,
        accounting: bool = False,
    ) -> None:
        super().__init__(model, rule)
        self.u: list[Tensor] = []  # channels along dimension 1, here and in v
        self.v: list[Tensor] = []
        self.channels = Channels()
        self._axis = 1  # of the activation call that is running
        self._with_bias = with_bias
        self._encoder = None if encoder is None else find_module(model, encoder)
        self._encoder_name = encoder
        self._made_by: TensorNotes[Call] = TensorNotes()
        self._convolved: TensorNotes[Convolution] = TensorNotes()
        self._found: End | None = None
        self._pooled: TensorNotes[bool] = TensorNotes()  # what was pooled from maps
        self._apart = False  # whether maps of several branches are pooled, each by itself
        self._input: Tensor | None = None  # what the network proper is fed with, once normalised
        self._at_input = True
        # the image, and what normalising makes of it; of these, what the network proper has read
        self._ahead: TensorNotes[bool] = TensorNotes(lasting=True)
        self._read: list[Tensor] = []
        self._shape: torch.Size | None = None
        if accounting:
            self.switch.lost = {}

    def trace(self, leaf: Tensor) -> tuple[Any, Tensor]:
        """Output of the model and the tensor that input relevance refers to: what a leading normalisation made of
        leaf; leaf itself where there is none, or more than one."""
        self._shape = leaf.shape
        fed = leaf.clone()  # a model may change its input in place; the caller's stays as it was
        self._ahead.put(fed, True)
        output = self.run(fed)
        if self._input is None or any(original_of(t) is not self._input for t in self._read):
            return output, leaf
        return output, self._input

    def end(self) -> End:
        """Where the encoder ended in the last trace."""
        if self._found is None:
            raise SrdLabError(
                "no end of an encoder was found (a map with spatial extent before global pooling or flattening, or "
                "tokens before one is picked or all are averaged); "
                'name the submodule that puts it out with encoder="..." ("" is the model itself)'
            )
        if self._apart:
            raise SrdLabError(
                "several maps are pooled, each by itself, before the logits, so that none is the encoder's output; name the "
                'submodule to explain with encoder="..."'
            )
        if self._found.output._version != self._found.version:
            raise SrdLabError(
                "what was found as the encoder's output is overwritten by the model later on; name the submodule that "
                'puts it out with encoder="..."'
            )
        if self._found.output.dim() < 3:
            raise SrdLabError(
                f"encoder {self._encoder_name!r} puts out shape {tuple(self._found.output.shape)}; expected a map "
                "(N, C, h, w) or tokens (N, S, D): name a submodule before pooling or flattening"
            )
        if self._shape is not None and self._found.output.shape[0] != self._shape[0]:
            raise SrdLabError(
                f"the encoder puts out shape {tuple(self._found.output.shape)} for {self._shape[0]} images; expected the "
                'batch first: name another submodule with encoder="..."'
            )
        return self._found

    def call_index(self, layer: str | int) -> int:
        """Index of an activation call by index, by name, or by the submodule whose last call it is."""
        return call_index(self.calls, layer)

    def high(self, last: int | None) -> int:
        """Index of the last activation call at 1/8 of the input's size, none behind the call ``last``."""
        assert self._shape is not None
        calls = self.u if last is None else self.u[: last + 1]
        return high_call([tuple(u.shape) for u in calls], self._shape)

    def release(self) -> None:
        """Let go of every tensor, so that the graph dies with whoever still needs it."""
        self.u.clear()
        self.v.clear()
        self.channels.clear()
        self._made_by.clear()
        self._convolved.clear()
        self._ahead.clear()
        self._pooled.clear()
        self._read.clear()
        self._found = self._input = None

    # calls ---------------------------------------------------------------------------------------------
    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        self._axis = self.channels.of(x)
        self._layer(x, self._axis)
        out = super().activate(call, x, inplace)
        self._made_by.put(out, call)
        return self.channels.put(out, self._axis)

    def gate(self, call: Call, u: Tensor, v: Tensor) -> Tensor:
        u, v = u.movedim(self._axis, 1), v.movedim(self._axis, 1)
        self.u.append(u)
        self.v.append(v)
        return super().gate(call, u, v).movedim(1, self._axis)

    def convolution(self, conv: Convolution) -> Tensor:
        self._layer(conv.x, 1)
        y = super().convolution(conv)
        if conv.bias is not None and self._with_bias:
            y = self.share_bias(y, conv.x, conv.bias, conv)
        self._convolved.put(y, conv)
        return y

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        last = x.dim() - 1
        self._layer(x, last)
        y = F.linear(x, weight, bias)
        if bias is not None and self._with_bias and last:
            y = self.share_bias(y, x, bias, axis=last)
        return self.channels.put(y, last)

    def batch_norm(self, norm: BatchNorm, run: Callable[[], Tensor]) -> Tensor:
        self._leave_input(norm.x)
        y = self.channels.put(run(), 1)
        if not self._with_bias:
            return y
        conv = self._convolved.get(norm.x)
        return self.share_bias(y, norm.x if conv is None else conv.x, norm.shift, conv)

    def max_pool(self, pool: MaxPool) -> Any:
        self._leave_input(pool.x)
        out = super().max_pool(pool)
        self._look_for_end(F.max_pool2d, pool.x, out[0] if isinstance(out, tuple) else out)
        return out

    def other(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        moving = self.moving(args, kwargs)
        if not moving:
            return super().other(function, args, kwargs)
        x = max(moving, key=Tensor.dim)
        axis = self.channels.of(x)
        if function in HELD:
            self._layer(x, axis)
            out = HELD[function](self, *args, **kwargs)
            if out is not None:
                return out
        if self._with_bias and function in SHIFTS and len(moving) == 1:
            out = self._shift(function, args, kwargs, x, axis)
        else:
            out = super().other(function, args, kwargs)
            if self.switch.lost is not None and is_affine(function, args, kwargs, moving):
                out = self._account(function, args, kwargs, moving, out)
        self.channels.follow(function, args, kwargs, x, axis, out)
        self._follow_input(function, moving, out)
        if function in COPIES and (conv := self._convolved.get(x)) is not None:
            self._convolved.put(out, conv)
        if isinstance(out, Tensor) and out.requires_grad and args and isinstance(args[0], Tensor):
            self._look_for_end(function, args[0], out)
        return out

    # constants -----------------------------------------------------------------------------------------
    def shifted(self, y: Tensor, x: Tensor, shift: Tensor, axis: int) -> Tensor:
        """``y + shift``, the shift shared along the vectors of ``x``; all have their channels along ``axis``."""
        out = y + shift
        if not self._with_bias:
            return out
        return self.share_bias(out, x.expand(out.shape), shift.expand(out.shape).movedim(axis, 1), axis=axis)

    def _shift(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, axis: int
    ) -> Tensor:
        """A constant belongs to the vector that it is added to, as the shift of a batch norm does."""
        carrier = x.clone() if overwrites(function, kwargs) else x
        shift = constant_part(function, args, kwargs, [x])
        out = super().other(function, args, kwargs)
        if out.dim() > x.dim():
            return out  # type: ignore[no-any-return]
        return self.share_bias(out, carrier.expand(out.shape), shift.movedim(axis, 1), axis=axis)

    def _account(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        moving: list[Tensor],
        out: Any,
    ) -> Any:
        """``out`` of an affine call, its constant part put down as lost: a class token put in front, say."""
        if not isinstance(out, Tensor) or not out.requires_grad or overwrites(function, kwargs):
            return out
        constant = constant_part(function, args, kwargs, moving)
        return self.absorb(out, constant) if constant.any() else out

    # where things begin and end --------------------------------------------------------------------------
    def left(self, module: nn.Module, output: Any) -> Any:
        if module is self._encoder:
            if not isinstance(output, Tensor):
                raise SrdLabError(
                    f"encoder {self._encoder_name!r} puts out {type(output).__name__}; expected one tensor"
                )
            self._found = self.ends(output)
            return output.clone()  # what follows may overwrite it
        return None

    def ends(self, output: Tensor) -> End:
        """``output`` as the encoder's."""
        output = original_of(output)  # other branches do not pass a view
        return End(output, self.channels.of(output), self._made_by.get(output), output._version)

    def _follow_input(self, function: Function, moving: list[Tensor], out: Any) -> None:
        """A shift or scale ahead of the first layer is normalisation: the input is what it puts out."""
        name = getattr(function, "__name__", "")
        ahead = [t for t in moving if self._ahead.get(t)]
        if not self._at_input or len(ahead) < len(moving) or name not in _NORMALISING | _SLICING:
            self._read += ahead
            return
        for t in tensors_in((out,)):
            self._ahead.put(t, True)
        if isinstance(out, Tensor) and out.shape == self._shape and name in _NORMALISING:
            self._input = out

    def _leave_input(self, x: Tensor) -> None:
        """``x`` goes into the network proper."""
        self._at_input = False
        if self._ahead.get(x):
            self._read.append(x)

    def _layer(self, x: Tensor, axis: int) -> None:
        """A layer on a map with spatial extent: what was pooled before was a side branch, not the end."""
        self._leave_input(x)
        if self._encoder is None and has_extent(x, axis):
            self._found, self._apart = None, False

    def _look_for_end(self, function: Function, first: Tensor, out: Tensor) -> None:
        if self._encoder is not None or not first.requires_grad:
            return
        extended = has_extent(first, self.channels.of(first))
        if first.dim() not in (3, 4) or (first.dim() == 3 and not extended):
            return
        pooled = extended and out.dim() == first.dim() and not has_extent(out, self.channels.of(out))
        flattened = 0 < out.dim() < first.dim() and out.shape[0] == first.shape[0]
        if not (pooled or flattened or (function in _GLOBAL_POOLS and first.dim() == 4)):
            return
        self._pooled.put(out, True)
        if self._found is None:
            self._found = self.ends(first)
        elif extended and original_of(first) is not self._found.output and not self._pooled.get(first):
            # a gate, say, whose pooled factor is the map's own: the later map is the end; or one branch of several
            (from_it,) = torch.autograd.grad(
                first.sum(), self._found.output, allow_unused=True, retain_graph=True
            )
            self._apart = from_it is None
            self._found = self.ends(first)


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
