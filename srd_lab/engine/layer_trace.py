"""A trace that leaves a network as it is and records its layers: outputs in the graph, and what made each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srd_lab.engine.encoder_end import EncoderEnd, End
from srd_lab.engine.geometry import Convolution, MaxPool
from srd_lab.engine.image_trace import ImageTrace
from srd_lab.engine.layers import Place, call_index, high
from srd_lab.engine.norms_and_attention import AsItIs, affine_form
from srd_lab.engine.preconditions import check_traceable
from srd_lab.engine.spellings import Call, Function


@dataclass(frozen=True)
class Tokens:
    """An output (N, T, C) or (N, C, T) of a running model: a row of tokens, perhaps.

    output : in the graph; version : of the tensor then. channels : the axis of its channels. event : which torch function of
        the model made it.
    """

    output: Tensor
    version: int
    channels: int
    event: int


class LayerTrace(AsItIs, ImageTrace):
    """Records the output of every activation call, of every call that may make tokens, and where the encoder ends.

    encoder : dotted name of the submodule that is the encoder, "" for the model itself, None to find where it ends.
    v : outputs of the activation calls.
    made : of each, which torch function of the model made it (:class:`srd_lab.engine.interceptor.Exchange`) and the axis of
        its channels.
    shape : of the images. tokens : outputs of three dimensions. bottom : the image's node in autograd's graph.
    """

    def __init__(self, model: nn.Module, encoder: str | None) -> None:
        super().__init__(model)
        self.encoder = EncoderEnd(model, encoder, self.records, self.channels)
        self.v: list[Tensor] = []
        self.made: list[tuple[int, int]] = []
        self.tokens: list[Tokens] = []
        self.shape = torch.Size()
        self.bottom: Any = None
        self._top: Any = None  # the node of the logits

    def trace(self, leaf: Tensor) -> Any:
        """The model's output for the image ``leaf`` (N, C, H, W), which asks for a gradient."""
        self.shape = leaf.shape
        fed = leaf.clone()  # a model may change its input in place; the caller's stays as it was
        self.bottom = fed.grad_fn
        output = self.run(fed)
        self._top = output.grad_fn if isinstance(output, Tensor) else None
        return output

    def end(self) -> End:
        """Where the encoder ended. Raises SrdLabError where none was found or its output is of no use."""
        return self.encoder.found(self.shape[0], self._top, self.bottom)

    def call_index(self, layer: str | int) -> int:
        """See :func:`srd_lab.engine.layers.call_index`."""
        return call_index(self.calls, layer)

    def high(self, logits: Tensor) -> tuple[Tensor, int, int]:
        """The last map at 1/8 of the input's size that all paths to the logits pass: the output of an activation call, or
        another one where none is such a map; with the axis of its channels, and which torch function made it."""
        shapes = [tuple(v.movedim(axis, 1).shape) for v, (_, axis) in zip(self.v, self.made, strict=True)]
        calls = [Place(i, shape, self.v[i].grad_fn) for i, shape in enumerate(shapes)]
        is_call, index = high(calls, self.places(), self.shape, logits.grad_fn, self.bottom)
        if is_call:
            event, axis = self.made[index]
            return self.v[index], axis, event
        map_ = self.maps[index][0]
        return map_, self.channels.of(map_), self.records[map_].event or 0

    def release(self) -> None:
        super().release()
        self.encoder.clear()
        self.v.clear()
        self.tokens.clear()
        self.bottom = None

    # calls ---------------------------------------------------------------------------------------------
    def intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        before, version = self.events, None if first is None else first._version
        out = super().intercept(func, args, kwargs)
        # .cpu() in a hook, say, returns its argument, and the network does not use what it returned
        if isinstance(out, Tensor) and before < self.events and (out is not first or out._version != version):
            self.records.note(out, event=self.events)
            if out.dim() == 3 and len(out) == self.shape[0] and self.is_map(out):
                self.tokens.append(Tokens(out, out._version, self.channels.of(out), self.events))
        return out

    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        check_traceable(call.name, x)
        axis = self.channels.of(x)
        self.layer_reads(x, axis)
        out = super().activate(call, x, inplace)
        self.made.append((self.events, axis))
        self.records.note(out, call=call)
        return self.channels.copy(x, out)

    def activation(self, call: Call, u: Tensor) -> Tensor:
        v = call.function(u)
        self.v.append(v)
        return v.clone()  # what follows may overwrite it

    def convolution(self, conv: Convolution) -> Tensor:
        y = conv.apply(conv.x, conv.weight, conv.bias)
        self.encoder.convolved(conv, y)
        return y

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.layer_reads(x, x.dim() - 1)
        return self.channels.put(super().linear(x, weight, bias), x.dim() - 1)

    def max_pool(self, pool: MaxPool) -> Any:
        out = super().max_pool(pool)
        self.encoder.call(torch.max_pool2d, pool.x, out[0] if isinstance(out, tuple) else out)
        return out

    def other(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = affine_form(self, function, args, kwargs)
        return super().other(function, args, kwargs) if out is None else out

    def after(self, function: Function, args: tuple[Any, ...], maps: list[Tensor], out: Any) -> None:
        first = next((t for t in args if isinstance(t, Tensor)), None)  # behind an equation, maybe
        if isinstance(out, Tensor) and out.requires_grad and first is not None:
            self.encoder.call(function, first, out)

    def left(self, module: nn.Module, output: Any) -> Any:
        # what follows may overwrite it
        return output.clone() if self.encoder.returned(module, output) else None

    def layer_reads(self, x: Tensor, axis: int) -> None:
        self.encoder.layer(x, axis)
