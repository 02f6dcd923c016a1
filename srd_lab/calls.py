"""What an intercepted call is: activations in every spelling, convolutions, max pools, batch norms, linear layers.

The tables and parsers that turn a torch function with its arguments into one of these, and the operations that every
pass needs on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input
from torch.overrides import handle_torch_function, has_torch_function_unary, resolve_name

from srd_lab.types import SrdLabError

Function = Callable[..., Any]


class _WriteBack(torch.autograd.Function):
    """Give ``x`` the value ``v`` in place; the gradient goes to ``v`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.part_of_another = x._is_view()
        return x.copy_(v)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # Nothing at all for a view would be read as nothing for the whole tensor that it is a part of.
        return torch.zeros_like(grads[0]) if ctx.part_of_another else None, grads[0]


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> list[Tensor]:
    """The tensors among a call's arguments, one level of lists deep."""
    leaves = (*args, *(kwargs or {}).values())
    flat = [t for leaf in leaves for t in (leaf if isinstance(leaf, tuple | list) else (leaf,))]
    return [t for t in flat if isinstance(t, Tensor)]


def in_place(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``x`` overwritten by ``function(x)``; whatever ``function`` saved for its derivative stays intact."""
    return _WriteBack.apply(x, function(x.clone()))  # type: ignore[no-untyped-call,no-any-return]


def smooth_relu(
    x: Tensor, slope: float, beta: float, inplace: bool = False, stands_for: str = "relu"
) -> Tensor:
    """Softplus surrogate of a (leaky) ReLU: one activation call, named as the original, to whoever intercepts."""
    if has_torch_function_unary(x):
        return handle_torch_function(  # type: ignore[no-any-return]
            smooth_relu, (x,), x, slope, beta, inplace=inplace, stands_for=stands_for
        )
    if inplace:
        return in_place(x, lambda u: smooth_relu(u, slope, beta))
    soft = F.softplus(x, beta)
    return soft if slope == 0 else slope * x + (1 - slope) * soft


def smooth_clip(
    x: Tensor, low: float, high: float, beta: float, inplace: bool = False, stands_for: str = "hardtanh"
) -> Tensor:
    """Softplus surrogate of hardtanh and ReLU6: a smooth step up at ``low`` and down at ``high``."""
    if has_torch_function_unary(x):
        return handle_torch_function(  # type: ignore[no-any-return]
            smooth_clip, (x,), x, low, high, beta, inplace=inplace, stands_for=stands_for
        )
    if inplace:
        return in_place(x, lambda u: smooth_clip(u, low, high, beta))
    return low + F.softplus(x - low, beta) - F.softplus(x - high, beta)


T = torch.Tensor
_PURE: dict[str, tuple[Function, ...]] = {
    "relu": (F.relu, torch.relu, T.relu),
    "leaky_relu": (F.leaky_relu,),
    "relu6": (F.relu6,),
    "hardtanh": (F.hardtanh,),
    "elu": (F.elu,),
    "selu": (F.selu, torch.selu),
    "celu": (F.celu, torch.celu),
    "prelu": (F.prelu, torch.prelu, T.prelu),
    "silu": (F.silu,),
    "mish": (F.mish,),
    "hardswish": (F.hardswish,),
    "gelu": (F.gelu,),
    "tanh": (F.tanh, torch.tanh, T.tanh),
    "softplus": (F.softplus,),
    "smooth_relu": (smooth_relu,),
    "smooth_clip": (smooth_clip,),
}
_IN_PLACE: dict[str, tuple[Function, ...]] = {
    "relu": (F.relu_, torch.relu_, T.relu_),
    "leaky_relu": (F.leaky_relu_,),
    "hardtanh": (F.hardtanh_,),
    "elu": (F.elu_,),
    "selu": (F.selu_, torch.selu_),
    "celu": (F.celu_, torch.celu_),
    "tanh": (torch.tanh_, T.tanh_),
}
ACTIVATIONS = {function: kind for kind, functions in _PURE.items() for function in functions}
IN_PLACE_ACTIVATIONS = {function: kind for kind, functions in _IN_PLACE.items() for function in functions}
_CLAMPS = {
    *(torch.clamp, T.clamp, torch.clamp_, T.clamp_, torch.clip, T.clip, torch.clip_, T.clip_),
    *(torch.clamp_min, T.clamp_min, torch.clamp_min_, T.clamp_min_),
}
_THRESHOLDS = {F.threshold, F.threshold_, torch.threshold}  # type: ignore[attr-defined]
LAYERS = (F.conv2d, F.linear, F.batch_norm)
MAX_POOLS = (F.max_pool2d, F.max_pool2d_with_indices, torch.max_pool2d)
_DROPOUTS: set[Function] = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.dropout_, torch.feature_dropout, torch.alpha_dropout),
}


@dataclass(frozen=True)
class Call:
    """One activation call.

    index : position in call order, from 0.
    name : dotted name of the module that made it; a functional call adds the function's name, the second and
        further calls of one module add ``#2``, ``#3`` ...
    kind : ``relu``, ``silu`` ...
    function : the activation as a pure function of the pre-activation.
    original : the call as the model made it, in place or not.
    """

    index: int
    name: str
    kind: str
    function: Callable[[Tensor], Tensor]
    original: Callable[[Tensor], Tensor]

    def value_at(self, u: float) -> float:
        """The activation at one number; whoever else intercepts does not see this."""
        with torch._C.DisableTorchFunction():
            return float(self.function(torch.tensor(u, dtype=torch.float64)))


class _Convolve(torch.autograd.Function):
    """A convolution as a linear map of x alone.

    PyTorch's own second derivative computes the weights' share too, asked for or not: 1.5 times the whole attack.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]
    ) -> Tensor:
        ctx.weight, ctx.geometry, ctx.shape = weight, geometry, x.shape
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Spread.apply(grads[0], ctx.weight, ctx.geometry, ctx.shape), None, None, None


class _Spread(torch.autograd.Function):
    """The transpose of :class:`_Convolve`; the derivative of each is the other."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, geometry: tuple[Any, ...], shape: torch.Size) -> Tensor:
        ctx.weight, ctx.geometry = weight, geometry
        return conv2d_input(shape, weight, g, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Convolve.apply(grads[0], ctx.weight, None, ctx.geometry), None, None, None


@dataclass(frozen=True)
class Convolution:
    """A convolution call: its own input and its geometry. ``weight`` is (out, in / groups, *kernel)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def call(self) -> Tensor:
        """The call as the model made it."""
        return F.conv2d(self.x, self.weight, self.bias, *self.geometry)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same geometry with another input or other weights; differentiable in x, cheaply so for frozen weights."""
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return F.conv2d(x, weight, bias, *self.geometry)
        return _Convolve.apply(x, weight, bias, self.geometry)  # type: ignore[no-untyped-call,no-any-return]

    def box_sum(self, x: Tensor) -> Tensor:
        """Sum of x (N, 1, H, W) over the positions of every receptive field."""
        if self._pools:
            return F.avg_pool2d(x, self._window, self.stride, self.padding, divisor_override=1)
        return _Convolve.apply(x, self._box(x), None, self._one_group)  # type: ignore[no-untyped-call,no-any-return]

    def box_spread(self, s: Tensor) -> Tensor:
        """The transpose of :meth:`box_sum`: hand s to every position of its receptive field."""
        if self._pools:
            like, back = self.x[:, :1].detach(), torch.ops.aten.avg_pool2d_backward
            return back(s, like, self._window, self.stride, self.padding, False, True, 1)  # type: ignore[no-any-return]
        shape = (s.shape[0], 1, *self.x.shape[2:])
        return _Spread.apply(s, self._box(s), self._one_group, shape)  # type: ignore[no-untyped-call,no-any-return]

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
    """A max pool call: its input and its geometry."""

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
    """The entries of x (N, C, H, W) at flat ``indices`` (N, C, h, w): a max pool with given winners."""
    return x.flatten(2).gather(2, indices.flatten(2)).view_as(indices)


@dataclass(frozen=True)
class BatchNorm:
    """A batch norm call with fixed statistics: ``x * scale + shift`` per channel."""

    x: Tensor
    scale: Tensor
    shift: Tensor


def function_name(function: Function) -> str:
    """Readable name of an intercepted function, such as ``torch.Tensor.mul``."""
    return resolve_name(function) or getattr(function, "__name__", repr(function))


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]  # type: ignore[no-any-return]


def recognise(
    func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Function, bool] | None:
    """Kind of an activation call, its pure function, and whether it is in place; None for any other call."""
    if func in ACTIVATIONS:
        return ACTIVATIONS[func], func, bool(kwargs.get("inplace", False))
    if func in IN_PLACE_ACTIVATIONS:
        return IN_PLACE_ACTIVATIONS[func], _PURE[IN_PLACE_ACTIVATIONS[func]][0], True
    kind: str | None = None
    if func in _CLAMPS:
        kind = _kind_of_clamp(*args[1:], **kwargs)
    elif func in _THRESHOLDS:
        kind = _kind_of_threshold(*args[1:], **kwargs)
    if kind is None:
        return None
    pure: Function = torch.clamp if func in _CLAMPS else torch.threshold
    return kind, pure, bool(kwargs.get("inplace", func.__name__.endswith("_")))


def _kind_of_clamp(min: Any = None, max: Any = None, **other: Any) -> str | None:
    if isinstance(min, int | float) and isinstance(max, int | float):
        return "hardtanh"
    return "relu" if max is None and isinstance(min, int | float) and min == 0 else None


def _kind_of_threshold(threshold: Any, value: Any, *other: Any, **others: Any) -> str | None:
    return "relu" if threshold == value == 0 else None


def _is_training(
    input: Tensor,
    p: float = 0.5,
    train: bool = True,
    *other: Any,
    training: bool | None = None,
    **others: Any,
) -> bool:
    """Whether a dropout call drops anything: ``train`` is torch's name for it, ``training`` is that of functional."""
    return p > 0 and (train if training is None else training)


def _attention_drops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *other: Any,
    **others: Any,
) -> bool:
    """Whether a call of scaled_dot_product_attention drops anything."""
    return dropout_p > 0


def _heads_drop(*args: Any, training: bool = True, **others: Any) -> bool:
    """Whether a call of multi_head_attention_forward drops anything; its probability is the eleventh argument."""
    probability = others["dropout_p"] if "dropout_p" in others else args[10]
    return training and probability > 0


# what decides whether chance has a part in a call
DROPPING: dict[Function, Callable[..., bool]] = {
    **dict.fromkeys(_DROPOUTS, _is_training),
    F.scaled_dot_product_attention: _attention_drops,
    F.multi_head_attention_forward: _heads_drop,
}


_NAMES_OF_CHANCE = (
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "normal_"),
    *("bernoulli", "bernoulli_", "multinomial", "poisson", "binomial", "uniform_", "random_", "exponential_"),
    *(
        "geometric_",
        "cauchy_",
        "log_normal_",
        "gumbel_softmax",
        "fractional_max_pool2d",
        "fractional_max_pool3d",
    ),
    *("fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices"),
)
_DRAWING = {getattr(place, n) for place in (torch, T, F) for n in _NAMES_OF_CHANCE if hasattr(place, n)}
_RRELUS = {F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_}


def draws(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call draws from the process's random numbers; a generator that is given is the model's own affair."""
    if func in _RRELUS:
        return bool(kwargs.get("training", len(args) > 3 and args[3]))
    return func in _DRAWING and kwargs.get("generator") is None


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
    return MaxPool(input, kernel_size, stride or None, padding, dilation, ceil_mode, return_indices)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]


def linear_of(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
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
    if training or running_mean is None or running_var is None:
        raise SrdLabError("batch norm uses the statistics of the batch; call model.eval() first")
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    return BatchNorm(input, scale, shift if bias is None else shift + bias)
