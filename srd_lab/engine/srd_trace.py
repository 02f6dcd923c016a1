"""SRD's trace of a model: gates, bias shares, where the encoder ends and where the input begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from srd_lab.engine import rules
from srd_lab.engine.affine import (
    COPIES,
    MATRIX_PRODUCTS,
    RESHAPES,
    ROWS_BY_MATRIX,
    SCALES,
    SHIFTS,
    constant_part,
    overwrites,
)
from srd_lab.engine.decomposed import Decomposed
from srd_lab.engine.encoder_end import EncoderEnd, End
from srd_lab.engine.geometry import BatchNorm, Convolution, MaxPool
from srd_lab.engine.layers import Place, call_index, high
from srd_lab.engine.live_pass import Refuse
from srd_lab.engine.network_input import NetworkInput
from srd_lab.engine.norms_and_attention import affine_form
from srd_lab.engine.softplus import in_place
from srd_lab.engine.spellings import Call, Function, tensors_in

_NO_AXIS = "works on a map of which nothing tells along which axis the vectors of SRD lie"


class SRDTrace(Decomposed):
    """A forward pass that can be decomposed backwards.

    rule : see :mod:`srd_lab.engine.rules`.
    encoder : dotted name of the submodule that is the encoder, "" for the model itself, None to find where it ends.
    with_bias : whether biases, shifts of normalisations and added constants are shared (Eq. 11).
    u, v : pre-activations and outputs of the activation calls, channels along dimension 1; axes : where they lay.
    made_by : which torch function of the model each call was, counted from 1; of one that is written out, the last.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: rules.Rule,
        encoder: str | None = None,
        *,
        with_bias: bool,
    ) -> None:
        super().__init__(model, rule)
        self.u: list[Tensor] = []
        self.v: list[Tensor] = []
        self.axes: list[int] = []
        self.made_by: list[int] = []
        self._gates: list[Any] = []  # their nodes in autograd's graph
        self._fed: Any = None  # that of the image
        self._top: Any = None  # and that of the logits
        self.encoder = EncoderEnd(model, encoder, self.records, self.channels)
        self._axis, self._lone = 1, False  # of the activation call that is running
        self._laid: tuple[torch.Size, int] | None = None
        self._read = (
            WeakTensorKeyDictionary()
        )  # what a linear layer without a bias read, by what it made of it
        self._with_bias = with_bias
        self._begin = NetworkInput(self.records)
        self._shape = torch.Size()

    def trace(self, leaf: Tensor) -> tuple[Any, Tensor]:
        """Output of the model and the tensor that input relevance refers to: what a leading normalisation made of
        ``leaf`` (N, C, H, W); ``leaf`` itself where there is none, or more than one."""
        self._shape = leaf.shape
        fed = leaf.clone()  # a model may change its input in place; the caller's stays as it was
        self._fed = fed.grad_fn
        self._begin.begin(fed)
        output = self.run(fed)
        self._top = output.grad_fn if isinstance(output, Tensor) else None
        normalised = self._begin.found
        return output, leaf if normalised is None else normalised

    def end(self) -> End:
        """Where the encoder ended. Raises SrdLabError where none was found or its output is of no use."""
        return self.encoder.found(self._shape[0], self._top, self._fed)

    def call_index(self, layer: str | int) -> int:
        """See :func:`srd_lab.engine.layers.call_index`."""
        return call_index(self.calls, layer)

    def high(self, last: int | None) -> int | Tensor:
        """The last map at 1/8 of the input's size through which all relevance passes that starts at the encoder's output,
        which the call ``last`` made: index of an activation call, or another tensor where none is such a map."""
        end = self.end()
        top = end.output.grad_fn if last is None else self._gates[last]
        calls = self.u if last is None else self.u[: last + 1]
        gates = [Place(i, tuple(u.shape), self._gates[i]) for i, u in enumerate(calls)]
        normalised = self._begin.found
        bottom = self._fed if normalised is None else normalised.grad_fn
        is_call, index = high(gates, self.places(), self._shape, top, bottom)
        return index if is_call else self.maps[index][0]

    def release(self) -> None:
        super().release()
        self.encoder.clear()
        self._begin.clear()
        self._read.clear()
        for recorded in (self.u, self.v, self._gates):
            recorded.clear()
        self._fed = self._top = None

    # calls ---------------------------------------------------------------------------------------------
    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        if self._with_bias and self.channels.are_unknown(x):  # a rule for vectors, not for entries
            out = super().activate(call, x, inplace)
            advice = "use four axes (N, C, H, W) there, or a method that needs gradients only"
            refusal: Tensor = Refuse.apply(
                out, self.live_pass, f"activation {call.name!r} {_NO_AXIS}; {advice}"
            )
            return refusal
        self._lone = self.records[x].lone
        self._axis, self._laid = self.channels.of(x), self.channels.laid(x)
        self.layer_reads(x, self._axis)
        out = super().activate(call, x, inplace)
        self.records.note(out, call=call)
        return self.channels.copy(x, out)

    def gate(self, call: Call, u: Tensor, v: Tensor) -> Tensor:
        if self._laid is None or self._lone:
            return self._gate(call, u, v)
        shape, axis = self._laid
        before, self._axis = self._axis, axis
        out = self._gate(call, u.reshape(shape), v.reshape(shape)).reshape(v.shape)
        self._axis = before
        return out

    def _gate(self, call: Call, u: Tensor, v: Tensor) -> Tensor:
        if self._lone:  # a map of one channel, whose axis a sum took away
            u, v = u.unsqueeze(1), v.unsqueeze(1)
        else:
            u, v = u.movedim(self._axis, 1), v.movedim(self._axis, 1)
        self.u.append(u)
        self.v.append(v)
        self.axes.append(self._axis)
        self.made_by.append(self.events)
        out = super().gate(call, u, v)
        self._gates.append(out.grad_fn)
        return out.squeeze(1) if self._lone else out.movedim(1, self._axis)

    def convolution(self, conv: Convolution) -> Tensor:
        self._begin.reads(conv.x)
        y = super().convolution(conv)
        self.encoder.convolved(conv, y)
        if conv.bias is not None and self._with_bias:
            y = self.share_bias(y, conv.x, conv.bias, conv)
        self.put_out(y, conv)
        return y

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        last = x.dim() - 1
        self.layer_reads(x, last)
        y = F.linear(x, weight, bias)
        if bias is None:
            self._read[y] = x
        elif self._with_bias and last:
            y = self.share_bias(y, x, bias, axis=last)
        return self.channels.put(y, last)

    def batch_norm(self, norm: BatchNorm, run: Callable[[], Tensor]) -> Tensor:
        y = self.channels.put(run(), 1)
        if self._begin.normalised(norm.x, y):
            return y
        self._begin.reads(norm.x)
        if not self._with_bias:
            return y
        conv = self.convolution_of(norm.x)
        y = self.share_bias(y, norm.x if conv is None else conv.x, norm.shift, conv)
        self.records.note(y, convolution=conv)  # for a shift that follows
        return y

    def max_pool(self, pool: MaxPool) -> Any:
        self._begin.reads(pool.x)
        out = super().max_pool(pool)
        self.encoder.call(F.max_pool2d, pool.x, out[0] if isinstance(out, tuple) else out)
        return out

    def other(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = affine_form(self, function, args, kwargs)
        return super().other(function, args, kwargs) if out is None else out

    def on_maps(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        maps = self.maps_in(args, kwargs)
        if function in MATRIX_PRODUCTS and len(maps) == 1:
            return self._product(function, args, kwargs, maps[0])
        scales = function in SCALES | SHIFTS and len(maps) == 1 and maps[0].dim() == 4
        axis = self.channels.of(maps[0])
        scales = scales and not self.gate_in(args, kwargs) and _one_per_channel(maps[0], axis, args, kwargs)
        conv = None
        if scales:
            conv = self.convolution_of(maps[0] if axis == 1 else maps[0].movedim(axis, 1))
        if conv is not None:
            return self._as_batch_norm(function, args, kwargs, maps[0], conv)
        if self._with_bias and function in SHIFTS and len(maps) == 1:
            return self._shift(function, args, kwargs, maps[0])
        return self.count_constants(function, args, kwargs, maps, super().on_maps(function, args, kwargs))

    def after(self, function: Function, args: tuple[Any, ...], maps: list[Tensor], out: Any) -> None:
        self._begin.called(function, args, maps, out)
        x = max(maps, key=Tensor.dim)
        copied = function in COPIES or (function in RESHAPES and out.shape == x.shape)
        if copied and (conv := self.records[x].convolution) is not None:
            self.records.note(out, convolution=conv)
        first = next((t for t in args if isinstance(t, Tensor)), None)  # behind an equation, maybe
        if isinstance(out, Tensor) and out.requires_grad and first is not None:
            self.encoder.call(function, first, out)

    # constants -----------------------------------------------------------------------------------------
    def shifted(self, y: Tensor, x: Tensor, shift: Tensor, axis: int) -> Tensor:
        """``y + shift``, the shift shared along the vectors of ``x``; all have their channels along ``axis``."""
        out = y + shift
        if not self._with_bias:
            return out
        return self.share_bias(out, x.expand(out.shape), shift.expand(out.shape).movedim(axis, 1), axis=axis)

    def _as_batch_norm(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, conv: Convolution
    ) -> Tensor:
        """What scales or shifts the channels of a convolution's output ``x`` by constants, as a batch norm does."""
        axis = self.channels.of(x)
        constant = constant_part(function, args, kwargs, [x]) if function in SHIFTS else None
        out: Tensor = super().on_maps(function, args, kwargs)
        if constant is not None and self._with_bias:
            shift = constant.movedim(axis, 1)[0, :, 0, 0]
            shared = self.share_bias(out.movedim(axis, 1), conv.x, shift, conv)
            out = shared if axis == 1 else shared.movedim(1, axis)
        self.put_out(out.movedim(axis, 1), conv, out.grad_fn)
        return out

    def _product(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
    ) -> Tensor:
        """A product of the rows of ``x`` by a matrix of weights is a linear layer, whose bias may be added next."""
        out: Tensor = self.count_constants(
            function, args, kwargs, [x], super().on_maps(function, args, kwargs)
        )
        if (
            len(args) == 2
            and args[0] is x
            and args[1].dim() == 2
            and x.dim() > 1
            and function in ROWS_BY_MATRIX
        ):
            self._read[out] = x
        return out

    def _shift(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Tensor:
        """A constant belongs to the vector that it is added to, as the shift of a batch norm does."""
        if self.channels.are_unknown(x):
            return self.refused(function, args, kwargs, _NO_AXIS)
        axis = self.channels.of(x)
        vectors = x.clone() if overwrites(function, kwargs) else x
        shift = constant_part(function, args, kwargs, [x])
        lone, laid = self.records[x].lone, self.channels.laid(x)
        if (lone or laid) and torch.broadcast_shapes(shift.shape, x.shape) == x.shape:
            # with the axis of channels that a sum took away, or a reshape merged or split
            shape, along = laid or ((len(x), 1, *x.shape[1:]), 1)

            def shared(out: Tensor, u: Tensor) -> Tensor:
                y, vectors, constant = (t.reshape(shape) for t in (out.clone(), u, shift.expand(x.shape)))
                constant = constant.movedim(along, 1)
                return self.share_bias(y, vectors, constant, axis=along).reshape(x.shape)

            if overwrites(function, kwargs):  # what shifts in place keeps the sign of the map
                return self.channels.copy(x, in_place(x, lambda u: shared(u + shift, u)))
            return self.channels.copy(x, shared(super().on_maps(function, args, kwargs), x))
        rows, last = self._read.get(vectors), vectors.dim() - 1
        out = super().on_maps(function, args, kwargs)
        if (
            rows is not None
            and out.shape == x.shape
            and bool((shift == shift.reshape(-1, shift.shape[-1])[0]).all())
        ):
            return self.channels.put(
                self.share_bias(out, rows, shift.reshape(-1, shift.shape[-1])[0], axis=last), last
            )
        if out.dim() > x.dim() or x.dim() < 2:
            return self.absorb(out, shift)
        return self.share_bias(out, vectors.expand(out.shape), shift.movedim(axis, 1), axis=axis)

    # where things begin and end --------------------------------------------------------------------------
    def left(self, module: nn.Module, output: Any) -> Any:
        # what follows may overwrite the encoder's output
        return output.clone() if self.encoder.returned(module, output) else None

    def layer_reads(self, x: Tensor, axis: int) -> None:
        """A layer reads ``x``."""
        self._begin.reads(x)
        self.encoder.layer(x, axis)


def _one_per_channel(x: Tensor, axis: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether all operands of a call but ``x``, of four axes, are numbers, or have one for each channel along ``axis``."""
    for t in tensors_in(args, kwargs):
        if t is x:
            continue
        if t.dim() > 4:
            return False
        spread = t.reshape((1,) * (4 - t.dim()) + tuple(t.shape)).movedim(axis, 1)
        if spread.shape[1] not in (1, x.shape[axis]):
            return False
        if spread.numel() > spread.shape[1] and not bool((spread == spread[:1, :, :1, :1]).all()):
            return False
    return True
