"""See every activation, affine and pooling call of an unmodified model while it runs.

Module hooks miss functional activations and cannot tell apart the calls of a shared module, and graph rewriting
fails on control flow; a ``TorchFunctionMode`` sees each call as it happens and leaves the model untouched.
What a call becomes is decided by subclasses of :class:`Interceptor`, which override one method per kind of call.
In-place activations keep their meaning: whoever holds the tensor still sees it change.

Not seen by any such mode, and therefore refused: scripted modules, modules replicated to other threads
(DataParallel) and recomputation by checkpointing.

Example
-------
>>> class CountActivations(Interceptor):
...     pass
>>> seen = CountActivations(model)
>>> logits = seen.run(x)
>>> [call.name for call in seen.calls]
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary, resolve_name
from torch.utils import checkpoint

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
MAX_POOLS = (F.max_pool2d, F.max_pool2d_with_indices, torch.max_pool2d)
DROPOUTS = {
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


class Interceptor(TorchFunctionMode):
    """Runs a model and hands each call of interest to a method; the base class changes nothing.

    A subclass overrides ``activation``, ``convolution``, ``linear``, ``batch_norm``, ``max_pool`` or ``other``.
    Inside these methods interception is off, so they may use any torch function.
    """

    needs_activations = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[Call] = []
        self._names = {id(module): name for name, module in model.named_modules()}
        self._containers = {name.rpartition(".")[0] for name in self._names.values()}
        self._path: list[str] = []
        self._used: Counter[str] = Counter()

    # what a subclass may override ------------------------------------------------------------------------
    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        """The activation call itself, in place where the model asked for it."""
        return in_place(x, lambda u: self.activation(call, u)) if inplace else self.activation(call, x)

    def activation(self, call: Call, u: Tensor) -> Tensor:
        """Output for pre-activation ``u``."""
        return call.function(u)

    def convolution(self, conv: Convolution) -> Tensor:
        return conv.call()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def batch_norm(self, norm: BatchNorm, run: Callable[[], Tensor]) -> Tensor:
        return run()

    def max_pool(self, pool: MaxPool) -> Any:
        return pool.apply(pool.x, pool.return_indices)

    def other(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(*args, **kwargs)

    def left(self, module: nn.Module, output: Any) -> Any:
        """Called when ``module`` has returned ``output``; what this returns takes its place, unless None."""
        return None

    # running ------------------------------------------------------------------------------------------
    def run(self, x: Tensor) -> Any:
        """The model's output for ``x``; refuses what it cannot see through, before and after."""
        check_model(self.model)
        with self._following_modules(), self:
            output = self.model(x)
        if self.needs_activations and not self.calls:
            raise SrdLabError(
                "no activation call was seen in the model; expected ReLU, LeakyReLU, ELU, SiLU, GELU, Tanh or softplus "
                "called through torch: use an eager (not scripted, not compiled) network"
            )
        return output

    @contextmanager
    def _following_modules(self) -> Iterator[None]:
        """Know which module is running, by process-wide hooks that leave the model's own hooks alone."""
        thread = threading.get_ident()

        def enter(module: nn.Module, inputs: Any) -> None:
            if threading.get_ident() == thread and id(module) in self._names:
                self._path.append(self._names[id(module)])

        def leave(module: nn.Module, inputs: Any, output: Any) -> Any:
            if threading.get_ident() == thread and id(module) in self._names:
                self._path.pop()
                return self.left(module, output)
            return None

        handles = (
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = _recognise(func, args, kwargs)
        if found is None:
            return self._dispatch(func, args, kwargs)
        kind, pure, inplace = found
        first, rest = _first(args, kwargs), args[1:]
        kwargs = {name: value for name, value in kwargs.items() if name != "input"}
        options = {name: value for name, value in kwargs.items() if name != "inplace"}
        call = Call(
            index=len(self.calls),
            name=self._name(kwargs.get("stands_for", kind)),
            kind=kind,
            function=lambda u: pure(u, *rest, **options),
            original=lambda x: func(x, *rest, **kwargs),
        )
        self.calls.append(call)
        return self.activate(call, first, inplace)

    def _dispatch(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.conv2d:
            return self.convolution(_convolution(self._pad, *args, **kwargs))
        if func is F.linear:
            return self.linear(*_linear(*args, **kwargs))
        if func is F.batch_norm:
            return self.batch_norm(_batch_norm(*args, **kwargs), lambda: func(*args, **kwargs))
        if func in MAX_POOLS:
            return self.max_pool(
                _max_pool(*args, **{"return_indices": func is F.max_pool2d_with_indices, **kwargs})
            )
        if func in DROPOUTS and _is_training(*args, **kwargs):
            raise SrdLabError(f"dropout is active in {self.where()}; call model.eval() first")
        return self.other(func, args, kwargs)

    def _pad(self, x: Tensor, sides: list[int]) -> Tensor:
        return self.other(F.pad, (x, sides), {})  # type: ignore[no-any-return]

    def _name(self, kind: str) -> str:
        module = self._path[-1] if self._path else ""
        base = module if module and module not in self._containers else f"{module}.{kind}".lstrip(".")
        self._used[base] += 1
        return base if self._used[base] == 1 else f"{base}#{self._used[base]}"

    def where(self) -> str:
        """The running module, for messages."""
        return (self._path[-1] if self._path else "") or type(self.model).__name__


class Watch(Interceptor):
    """Runs a model just as it is; what chance or the batch would decide is refused all the same."""

    needs_activations = False

    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        return call.original(x)

    def convolution(self, conv: Convolution) -> Tensor:
        return conv.apply(conv.x, conv.weight, conv.bias)


class SmoothModel(nn.Module):
    """The softplus surrogate of a model: ReLU-like calls become softplus(beta), all else stays (Dombrowski et al. 2019).

    ReLU, LeakyReLU, ReLU6 and hardtanh are replaced; activations that are smooth already are kept.
    """

    def __init__(self, model: nn.Module, beta: float) -> None:
        super().__init__()
        self.model = model
        self.beta = beta
        self.training = model.training  # its own flag alone: train() would set those of the model's parts

    def forward(self, x: Tensor) -> Tensor:
        return _Smooth(self.model, self.beta).run(x)  # type: ignore[no-any-return]


class _Smooth(Interceptor):
    def __init__(self, model: nn.Module, beta: float) -> None:
        super().__init__(model)
        self.beta = beta

    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        refuse_checkpoint(call)
        if call.kind == "relu":
            return smooth_relu(x, 0.0, self.beta, inplace=inplace)
        if call.kind == "leaky_relu":
            slope = -call.value_at(-1.0)
            return smooth_relu(x, slope, self.beta, inplace=inplace, stands_for=call.kind)
        if call.kind in ("relu6", "hardtanh"):
            low, high = call.value_at(-1e30), call.value_at(1e30)
            return smooth_clip(x, low, high, self.beta, inplace=inplace, stands_for=call.kind)
        return call.original(x)


def refuse_checkpoint(call: Call) -> None:
    """Refuse an activation whose forward pass will be run again, unseen, during the backward pass."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and hooks[0].__module__ == checkpoint.__name__:
        raise SrdLabError(
            f"activation {call.name!r} is checkpointed, and its recomputation cannot be seen; switch checkpointing off"
        )


def check_model(model: nn.Module) -> None:
    """Refuse a model whose calls cannot be followed or whose output depends on the batch or on chance."""
    for name, module in model.named_modules():
        where = name or type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise SrdLabError(
                f"{where} is a scripted module, whose calls cannot be seen; pass the eager network it was made from"
            )
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise SrdLabError(
                f"{where} is {type(module).__name__}, which runs copies elsewhere; pass its .module instead"
            )
        if type(module).__name__ == "OptimizedModule":
            raise SrdLabError(
                f"{where} is a compiled module, whose calls cannot be seen; pass its ._orig_mod instead"
            )
        if module._compiled_call_impl is not None:
            raise SrdLabError(
                f"{where} was compiled in place, so that its calls cannot be seen; pass it as it was before .compile()"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise SrdLabError(f"batch norm {where} uses the statistics of the batch; call model.eval() first")
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise SrdLabError(f"dropout {where} is active; call model.eval() first")


def check_input(x: Tensor, model: nn.Module | None = None) -> None:
    """Refuse anything but a finite float32 / float64 batch (N, C, H, W), of the model's own dtype."""
    if not isinstance(x, Tensor) or x.dim() != 4 or 0 in x.shape:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise SrdLabError(
            f"the input must be a non-empty batch of images (N, C, H, W), got {shape}; add a batch axis with x[None]"
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise SrdLabError(
            f"the input must be float32 or float64, got {x.dtype}; scale pixels to [0, 1] and call x.float()"
        )
    own = None if model is None else next((p for p in model.parameters() if p.is_floating_point()), None)
    if own is not None and own.dtype != x.dtype:
        raise SrdLabError(
            f"the input is {x.dtype}, but the model's weights are {own.dtype}; bring both to one dtype with .to(...)"
        )
    if not torch.isfinite(x).all():
        raise SrdLabError("the input holds NaN or infinite values; expected finite pixels")
    if torch.is_inference_mode_enabled() or x.is_inference():
        raise SrdLabError("no gradient can be taken in torch.inference_mode; use torch.no_grad instead")


def check_target(target: Tensor | int | None, logits: Tensor) -> Tensor:
    """Class indices (N,) on the logits' device; ``None`` is the predicted class, one index serves all images."""
    if logits.dim() != 2:
        raise SrdLabError(f"the model's output must be logits (N, K), got shape {tuple(logits.shape)}")
    n, classes = logits.shape
    if target is None:
        return logits.detach().argmax(1)
    index = torch.as_tensor(target, device=logits.device)
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise SrdLabError(f"targets must be integer class indices, got {index.dtype}")
    if index.dim() == 0:
        index = index.expand(n)
    if index.shape != (n,):
        raise SrdLabError(f"expected one target per image, shape ({n},), got {tuple(index.shape)}")
    if int(index.min()) < 0 or int(index.max()) >= classes:
        raise SrdLabError(
            f"target out of range: the model has classes 0..{classes - 1}, got {index.tolist()}"
        )
    return index.long()


def function_name(function: Function) -> str:
    """Readable name of an intercepted function, such as ``torch.Tensor.mul``."""
    return resolve_name(function) or getattr(function, "__name__", repr(function))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]  # type: ignore[no-any-return]


def _recognise(
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


def _convolution(
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


def _max_pool(
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


def _linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _batch_norm(
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
