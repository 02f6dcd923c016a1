"""Which torch functions are affine in the maps that they are given, and what such a call makes of constants.

Activations, convolutions, linear layers, batch norms and max pools are not here: :mod:`srd_lab.calls` recognises them.
What is not listed counts as affine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from srd_lab.calls import Function

T = torch.Tensor
GATES = {torch.sigmoid, T.sigmoid, F.sigmoid, F.hardsigmoid, F.softmax, torch.softmax, T.softmax}
_NOT_AFFINE = {
    # layers
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.conv1d, F.conv3d, F.bilinear),
    *(F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.rms_norm, torch.rms_norm),
    *(F.instance_norm, torch.instance_norm, F.local_response_norm, F.normalize),
    *(F.scaled_dot_product_attention, F.multi_head_attention_forward),
    *(torch.convolution, torch.batch_norm),  # of which srd_lab.calls knows the functional forms
    # activations without a name in srd_lab.calls
    *(F.softsign, F.hardshrink, F.softshrink, F.tanhshrink, F.glu, F.rrelu, F.rrelu_, F.logsigmoid),
    *(F.threshold, F.threshold_, torch.threshold, torch.rrelu, torch.rrelu_),  # type: ignore[attr-defined]
    *(torch.clamp, T.clamp, torch.clamp_, T.clamp_, torch.clip, T.clip, torch.clip_, T.clip_),
    *(torch.clamp_max, T.clamp_max, T.clamp_min, torch.clamp_min, T.clamp_max_, T.clamp_min_),
    *(torch.sigmoid_, T.sigmoid_, torch.maximum, T.maximum, torch.minimum, T.minimum),
    *(F.log_softmax, torch.log_softmax, T.log_softmax, F.softmin, F.gumbel_softmax),
    # elementwise functions
    *(torch.abs, T.abs, T.abs_, torch.exp, T.exp, T.exp_, torch.log, T.log, torch.sqrt, T.sqrt, torch.rsqrt, T.rsqrt),
    *(torch.square, T.square, torch.pow, T.pow, T.pow_, T.__pow__, T.__rpow__, T.__ipow__),
    *(torch.sin, T.sin, torch.cos, T.cos, torch.erf, T.erf, torch.reciprocal, T.reciprocal, T.__rdiv__),
    *(torch.log1p, T.log1p, torch.expm1, T.expm1, torch.atan, T.atan),
    *(torch.logaddexp, torch.logaddexp2, torch.fmax, torch.fmin, torch.remainder, torch.fmod, torch.hypot),
    *(torch.log2, torch.log10, torch.lgamma, torch.logit, torch.sinc, torch.sinh, torch.cosh, torch.tan, torch.sgn),
    *(torch.special.expit, torch.special.softmax, torch.special.log_softmax, torch.special.erf),
    *(T.square_, T.sqrt_, T.rsqrt_, T.sin_, T.log_, T.exp2_, torch.exp2, T.sigmoid_, T.tan_, T.reciprocal_),
    # statistics
    *(torch.var, T.var, torch.std, T.std, torch.var_mean, torch.std_mean, torch.norm, T.norm),
    *(torch.linalg.norm, torch.linalg.vector_norm, torch.prod, T.prod, torch.logsumexp, T.logsumexp),
    *(torch.cumprod, T.cumprod, torch.cdist, F.cosine_similarity),
}  # fmt: skip
_NOT_AFFINE |= {  # the methods of these names, in place too
    getattr(T, name)
    for function in tuple(_NOT_AFFINE)
    for name in (function.__name__, f"{function.__name__}_")
    if hasattr(T, name)
}
_ONE_OR_TWO = {torch.max, T.max, torch.min, T.min}
DIVISIONS = {torch.div, T.div, T.div_, torch.divide, T.divide, torch.true_divide, T.true_divide}
PRODUCTS = DIVISIONS | {
    *(torch.mul, T.mul, T.mul_, torch.multiply, T.multiply, torch.einsum, torch.tensordot),
    *(torch.matmul, T.matmul, torch.mm, T.mm, torch.mv, T.mv, torch.bmm, T.bmm),
    *(torch.addmm, T.addmm, torch.baddbmm, T.baddbmm, torch.addcmul, T.addcmul, torch.lerp, T.lerp),
}
SHIFTS = {
    *(torch.add, T.add, T.add_, torch.sub, T.sub, T.sub_, torch.subtract, T.subtract, T.subtract_),
    *(torch.rsub, T.__rsub__),
}
COPIES = {torch.clone, T.clone, T.contiguous, T.to}


def is_affine(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], moving: list[Tensor]
) -> bool:
    """Whether a call that is no layer is affine in the maps among its operands."""
    if function in PRODUCTS:
        divisor = args[1] if len(args) > 1 else kwargs.get("other")
        return len(moving) == 1 and not (function in DIVISIONS and divisor is moving[0])
    if function in _ONE_OR_TWO:  # of one map: a choice among its own values, as a max pool is
        return not any(isinstance(other, Tensor) for other in (*args[1:], *kwargs.values()))
    opaque = isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    return not opaque and function not in _NOT_AFFINE and function not in GATES


def exchanged(
    args: tuple[Any, ...], kwargs: dict[str, Any], table: dict[int, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with the tensors of these ids exchanged, one level of lists deep."""

    def one(arg: Any) -> Any:
        return table.get(id(arg), arg)

    def each(arg: Any) -> Any:
        return type(arg)(map(one, arg)) if type(arg) in (tuple, list) else one(arg)

    return tuple(map(each, args)), {name: each(arg) for name, arg in kwargs.items()}


def constant_part(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], moving: list[Tensor]
) -> Tensor:
    """What an affine call makes of zeros."""
    return called_with(0, function, args, kwargs, moving)


def called_with(
    value: float, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], moving: list[Tensor]
) -> Tensor:
    """What a call makes of maps that are ``value`` everywhere."""
    with torch.no_grad():
        args, kwargs = exchanged(args, kwargs, {id(t): torch.full_like(t, value) for t in moving})
        return function(*args, **kwargs)  # type: ignore[no-any-return]


def overwrites(function: Function, kwargs: dict[str, Any]) -> bool:
    """Whether a call writes its result into its first argument."""
    name = getattr(function, "__name__", "").replace("__ipow__", "pow_")
    return bool(kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))
