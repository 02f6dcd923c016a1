"""Convolutions, max pools and batch norms as values: what they are made of, their transposes, and box sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from srd_lab.errors import Refused

_FEW = 4  # channels


class _Convolve(torch.autograd.Function):
    """A convolution as a linear map of x alone.

    PyTorch's own second derivative computes the weights' share too, asked for or not: 1.5 times the whole attack.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.geometry, ctx.shape = geometry, x.shape
        ctx.save_for_backward(weight)  # so that torch notices if it is overwritten
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return None, None, None, None
        return _Spread.apply(grads[0], *ctx.saved_tensors, ctx.geometry, ctx.shape), None, None, None


class _Spread(torch.autograd.Function):
    """The transpose of :class:`_Convolve`; the derivative of each is the other."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, geometry: tuple[Any, ...], shape: torch.Size) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        ctx.save_for_backward(weight)
        return _transposed(g, weight, geometry, shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return None, None, None, None
        return _Convolve.apply(grads[0], *ctx.saved_tensors, None, ctx.geometry), None, None, None


def _is_watched() -> bool:
    """Whether a transform of torch.func runs this, or hooks take what is saved for the backward pass: a checkpoint, say,
    which will run torch's own convolution and expects what that saves."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None or torch._C._functorch.maybe_current_level() is not None


def _transposed(g: Tensor, weight: Tensor, geometry: tuple[Any, ...], shape: torch.Size) -> Tensor:
    """The transpose of a convolution of what has this shape (N, C, H, W).

    For an image on a CPU that is half as dear by way of columns: the usual kernel computes 16 channels at once, however few.
    """
    stride, padding, dilation, groups = geometry
    if groups > 1 or shape[1] > _FEW or g.device.type != "cpu":
        return conv2d_input(shape, weight, g, *geometry)
    columns = weight.flatten(1).t() @ g.flatten(2)
    return F.fold(columns, tuple(shape[2:]), tuple(weight.shape[2:]), dilation, padding, stride)


@dataclass(frozen=True)
class Convolution:
    """A 2d convolution call: its input and its geometry.

    x : (N, in, H, W). weight : (out, in / groups, *kernel). bias : (out,) or None.
    stride, padding, dilation : for rows and columns, in pixels of x. groups : as torch has them.
    versions : of x, weight and bias when the model made the call, by their ids.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    versions: dict[int, int] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.versions:
            self.versions.update((id(t), t._version) for t in self._operands)

    @property
    def overwritten(self) -> bool:
        """Whether something was written into x, weight or bias since, so that they would make another output now."""
        return any(self.versions.get(id(t), t._version) != t._version for t in self._operands)

    @property
    def _operands(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.bias) if t is not None]

    def call(self) -> Tensor:
        """The call as the model made it."""
        return F.conv2d(self.x, self.weight, self.bias, *self.geometry)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same geometry with another input or other weights, (N, out, h, w); differentiable in x, cheaply so for frozen
        weights of batches of real images that nobody else differentiates or keeps."""
        learning = weight.requires_grad or (bias is not None and bias.requires_grad)
        if learning or x.dim() != 4 or x.is_complex() or _is_watched():
            return F.conv2d(x, weight, bias, *self.geometry)
        return _Convolve.apply(x, weight, bias, self.geometry)

    def total(self, terms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The same geometry of several inputs, each with weights of its own, added up: in one call where that can be."""
        if self.groups > 1:
            return torch.stack([self.apply(x, weight) for x, weight in terms]).sum(0)
        inputs, weights = zip(*terms, strict=True)
        return self.apply(torch.cat(inputs, 1), torch.cat(weights, 1))

    def box_sum(self, x: Tensor) -> Tensor:
        """Sum of x (N, 1, H, W) over the positions of every receptive field, (N, 1, h, w)."""
        if self._pools:
            return F.avg_pool2d(x, self._window, self.stride, self.padding, divisor_override=1)
        return _Convolve.apply(x, self._box(x), None, self._one_group)

    def box_spread(self, s: Tensor) -> Tensor:
        """The transpose of :meth:`box_sum`: add s (N, 1, h, w) to every position of its receptive field, (N, 1, H, W)."""
        if self._pools:
            like, back = self.x[:, :1].detach(), torch.ops.aten.avg_pool2d_backward
            return back(s, like, self._window, self.stride, self.padding, False, True, 1)
        shape = (s.shape[0], 1, *self.x.shape[2:])
        return _Spread.apply(s, self._box(s), self._one_group, shape)

    @property
    def geometry(self) -> tuple[Any, ...]:
        """stride, padding, dilation, groups."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def _window(self) -> list[int]:
        return list(self.weight.shape[2:])

    @property
    def _pools(self) -> bool:
        """Whether a sum pool has this geometry; it is faster than a convolution of ones, and exact on zeros anywhere."""
        fits = all(2 * p <= k for p, k in zip(self.padding, self._window, strict=True))
        return fits and self.dilation == (1, 1)

    @property
    def _one_group(self) -> tuple[Any, ...]:
        return *self.geometry[:3], 1

    def _box(self, like: Tensor) -> Tensor:
        return like.new_ones(1, 1, *self.weight.shape[2:])


@dataclass(frozen=True)
class MaxPool:
    """A 2d max pool call: its input x (N, C, H, W) and its geometry, as torch's own arguments have it."""

    x: Tensor
    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    ceil_mode: bool
    return_indices: bool

    def apply(self, x: Tensor, return_indices: bool = False) -> Any:
        """The pooled map, with the winners' flat indices (h * W + w) if asked for."""
        return F.max_pool2d(  # type: ignore[call-overload]
            x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, return_indices
        )


def take(x: Tensor, indices: Tensor) -> Tensor:
    """The entries of x (N, C, H, W) at flat ``indices`` (N, C, h, w), h * W + w: a max pool with given winners.

    Example
    -------
    >>> x = torch.arange(4.0).view(1, 1, 2, 2)
    >>> take(x, torch.tensor([[[[2]]]]))
    tensor([[[[2.]]]])
    """
    return x.flatten(2).gather(2, indices.flatten(2)).view_as(indices)


@dataclass(frozen=True)
class BatchNorm:
    """A batch norm call with fixed statistics on x (N, C, ...): ``x * scale + shift``, both (C,)."""

    x: Tensor
    scale: Tensor
    shift: Tensor


def convolution_of(
    pad: Callable[[Tensor, list[int]], Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Convolution:
    """A call of ``F.conv2d`` as a value; ``pad`` pads x where padding="same" needs one more row or column at an end."""
    if padding == "valid":
        padding = 0
    elif padding == "same":
        spans = [d * (k - 1) for d, k in zip(_pair(dilation), weight.shape[2:], strict=True)]
        padding = tuple(span // 2 for span in spans)
        if any(
            span % 2 for span in spans
        ):  # one more row or column at the end: not a convolution's own padding
            input, padding = pad(input, [side for n in reversed(spans) for side in (n // 2, n - n // 2)]), 0
    return Convolution(input, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups)


def max_pool_of(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> MaxPool:
    """A call of ``F.max_pool2d`` as a value."""
    return MaxPool(input, kernel_size, stride or None, padding, dilation, ceil_mode, return_indices)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]


def linear_of(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias of a call of ``F.linear``, however they were passed."""
    return input, weight, bias


def batch_norm_of(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> BatchNorm:
    """A call of ``F.batch_norm`` as a value. Raises SrdLabError if it uses the statistics of the batch."""
    if training or running_mean is None or running_var is None:
        raise Refused("batch norm uses the statistics of the batch; call model.eval() first")
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    return BatchNorm(input, scale, shift if bias is None else shift + bias)
