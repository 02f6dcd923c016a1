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
from torch.overrides import resolve_name

from srd_lab.engine.softplus import smooth_clip, smooth_relu

Function = Callable[..., Any]

_OF_TORCH = ("aten", "prims", "prim", "quantized")  # namespaces of operators


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> list[Tensor]:
    """The tensors among a call's arguments, one level of lists deep.

    Example
    -------
    >>> len(tensors_in((torch.zeros(1), [torch.zeros(2), 3]), {"out": None}))
    2
    """
    leaves = (*args, *(kwargs or {}).values())
    flat = [t for leaf in leaves for t in (leaf if isinstance(leaf, tuple | list) else (leaf,))]
    return [t for t in flat if isinstance(t, Tensor)]


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

_NN = torch._C._nn  # where functional has many of its own from
ACTIVATIONS = {function: kind for kind, functions in _PURE.items() for function in functions}
ACTIVATIONS |= {getattr(_NN, kind): kind for kind in _PURE if hasattr(_NN, kind)}

IN_PLACE_ACTIVATIONS = {function: kind for kind, functions in _IN_PLACE.items() for function in functions}
IN_PLACE_ACTIVATIONS |= {getattr(_NN, f"{kind}_"): kind for kind in _PURE if hasattr(_NN, f"{kind}_")}

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
        """The activation at one number; interceptors do not see this."""
        with torch._C.DisableTorchFunction():
            return float(self.function(torch.tensor(u, dtype=torch.float64)))


def plain_spelling(function: Function) -> Function:
    """The function of torch that an operator of its dispatcher is; ``function`` itself for all others.

    Example
    -------
    >>> plain_spelling(torch.ops.aten.relu.default) is torch.relu
    True
    """
    if type(function).__module__ != "torch._ops":
        return function
    space, _, name = str(function).partition(".")
    if space != "aten":
        return function
    name = name.partition(".")[0]
    found = (getattr(place, name, None) for place in (torch, _NN, T))
    return next((plain for plain in found if plain is not None), function)


_FIRST: dict[Function, tuple[str, ...]] = {F.scaled_dot_product_attention: ("query", "key", "value")}
_SUMS = {torch.add, T.add, T.add_, torch.sub, T.sub, T.sub_, torch.subtract, T.subtract, T.subtract_}
_IN_OTHER_ORDER = {torch.where, T.where, torch.searchsorted}
_INSTANCE_NORM = [
    "input",
    "running_mean",
    "running_var",
    "weight",
    "bias",
    "use_input_stats",
    "momentum",
    "eps",
]
_TORCH_INSTANCE_NORM = [
    "input",
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "use_input_stats",
    "momentum",
    "eps",
    "cudnn_enabled",
]


def in_one_spelling(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Function, tuple[Any, ...], dict[str, Any]]:
    """A call as torch's own function, its first tensors by place and not by name, and that of a layer where there is one.

    Example
    -------
    >>> x = torch.zeros(2, 3)
    >>> function, args, kwargs = in_one_spelling(torch.mean, (), {"input": x, "dim": 1})
    >>> args[0] is x, kwargs
    (True, {'dim': 1})
    """
    function = plain_spelling(function)
    if kwargs and function not in _IN_OTHER_ORDER:
        for i, name in enumerate(_FIRST.get(function, ("input", "other"))):
            if len(args) == i and name in kwargs:
                args = (*args, kwargs[name])
                kwargs = {key: value for key, value in kwargs.items() if key != name}
    if function in _SUMS and len(args) == 3 and not isinstance(args[1], torch.Tensor):  # add(x, alpha, y)
        args, kwargs = (args[0], args[2]), {**kwargs, "alpha": args[1]}
    return _as_layer(function, args, kwargs)


def _as_layer(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Function, tuple[Any, ...], dict[str, Any]]:
    """A call of an operator below a layer of ``torch.nn.functional`` as a call of the layer; any other call as it is.

    Example
    -------
    >>> bias, x, weight = torch.ones(3), torch.zeros(2, 4), torch.ones(4, 3)
    >>> _as_layer(torch.addmm, (bias, x, weight), {})[0] is F.linear
    True
    """
    if function in (torch.addmm, T.addmm) and len(args) == 3 and not kwargs:
        bias, x, weight = args
        if bias.dim() == 1 and x.dim() == 2 and bias.shape[0] == weight.shape[1]:
            return F.linear, (x, weight.T, bias), {}
    if function is torch.batch_norm and len(args) >= 8 and not kwargs:
        x, weight, bias, mean, variance, *how = args
        return F.batch_norm, (x, mean, variance, weight, bias, *how[:3]), {}
    if function in (F.instance_norm, torch.instance_norm):
        names = _INSTANCE_NORM if function is F.instance_norm else _TORCH_INSTANCE_NORM
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if (
            not given.pop("use_input_stats", True) and given.get("running_mean") is not None
        ):  # one for all images
            given.pop("cudnn_enabled", None)
            return F.batch_norm, (given.pop("input"),), {"training": False, **given}
    return function, args, kwargs


def is_foreign(function: Function) -> bool:
    """Whether a function is an operator, called by torch.ops, that is not torch's own."""
    if isinstance(function, torch._ops.OpOverload):
        return function.namespace not in _OF_TORCH
    if isinstance(function, torch._ops.OpOverloadPacket):
        return function._qualified_op_name.partition("::")[0] not in _OF_TORCH
    return False


def function_name(function: Function) -> str:
    """Readable name of an intercepted function.

    Example
    -------
    >>> function_name(torch.Tensor.mul)
    'torch.Tensor.mul'
    """
    return resolve_name(function) or getattr(function, "__name__", repr(function))


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a call, by place or by name."""
    return args[0] if args else kwargs["input"]


def recognise(
    func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Function, bool] | None:
    """Kind of an activation call, its pure function, and whether it is in place; None for any other call.

    Example
    -------
    >>> recognise(torch.Tensor.clamp_, (torch.zeros(1),), {"min": 0})
    ('relu', <built-in method clamp of type object at 0x...>, True)
    """
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
