"""Which torch functions are affine in the maps that they are given, and what such a call makes of constants.

Activations, convolutions, linear layers, batch norms and max pools are not here: :mod:`srd_lab.engine.spellings` has
them.
What is not listed here counts as not affine: a decomposition refuses it by name when relevance arrives there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from srd_lab.engine.spellings import Function, tensors_in

T = torch.Tensor
_NAMESPACES = (torch, T, F, torch._C._nn, torch.linalg, torch.special)


def spelled(*groups: str) -> set[Function]:
    """Every function and method of torch of these names, in place too.

    groups : names, with spaces between them.

    Example
    -------
    >>> spelled("exp") == {torch.exp, torch.exp_, torch.Tensor.exp, torch.Tensor.exp_}
    True
    """
    names = [name for group in groups for name in group.split()]
    spellings = [*names, *(f"{name}_" for name in names)]
    found = {getattr(place, name, None) for place in _NAMESPACES for name in spellings}
    return {function for function in found if callable(function)}


GATES = {torch.sigmoid, T.sigmoid, F.sigmoid, F.hardsigmoid, F.softmax, torch.softmax, T.softmax}
DIVISIONS = spelled("div divide true_divide __truediv__ __itruediv__ __div__ __idiv__")
_SUMS_OF_PRODUCTS = spelled("addmm addbmm baddbmm addmv addr addcmul lerp")
SAMPLERS = spelled("grid_sample grid_sampler grid_sampler_2d grid_sampler_3d")
_IN_FIRST = DIVISIONS | SAMPLERS  # affine in their first operand alone
# affine in one of their operands, where the others are constants
PRODUCTS = _IN_FIRST | spelled(
    "mul multiply __mul__ __rmul__ __imul__ einsum tensordot matmul __matmul__ __rmatmul__ __imatmul__ mm mv bmm",
    "addmm addbmm baddbmm addmv addr addcmul lerp dot inner outer ger kron vdot vecdot cross multi_dot chain_matmul",
)
_PLAIN_PRODUCTS = PRODUCTS - _SUMS_OF_PRODUCTS  # of zero maps they are zero
SCALES = DIVISIONS | spelled("mul multiply __mul__ __rmul__ __imul__")
SHIFTS = spelled("add __add__ __radd__ __iadd__ sub subtract __sub__ __isub__ rsub __rsub__")
JOINS = spelled("cat concat concatenate stack hstack vstack dstack")
RESHAPES = spelled("reshape view reshape_as view_as flatten unflatten")
COPIES = {torch.clone, T.clone, T.contiguous, T.to}
CASTS = spelled("to type type_as float double half bfloat16 bool int long short byte char")
SELECTIONS = spelled(  # among a map's own values, as a max pool is: affine wherever the choice stays the same
    "max min amax amin aminmax sort msort topk kthvalue median nanmedian quantile nanquantile cummax cummin",
    "max_pool1d max_pool3d max_pool1d_with_indices max_pool3d_with_indices",
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
    "adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices",
)
KINKS = spelled(  # piecewise linear, and so an activation in all but its spelling, unless srd_lab.engine.spellings has it
    "maximum minimum fmax fmin abs absolute __abs__ sign sgn heaviside threshold clamp clamp_min clamp_max clip",
    "hardshrink softshrink rrelu copysign hypot logaddexp logaddexp2",
    "to_sparse to_sparse_coo to_sparse_csr to_sparse_csc to_sparse_bsr to_sparse_bsc",  # no slope at zeros
)
CURVES = spelled(  # bent functions of single entries: activations, unless they make a gate, or a statistic
    "sigmoid expit hardsigmoid logsigmoid log_sigmoid tanhshrink exp exp2 expm1 log log2 log10 log1p logit reciprocal",
    "erf erfc erfinv ndtr log_ndtr erfcx sin cos tan sinh cosh tanh asin acos atan asinh acosh atanh arcsin arccos arctan",
    "arcsinh arccosh arctanh sinc lgamma digamma entr i0 i0e i1 i1e __rpow__ __rdiv__ __rtruediv__",
)
RECURRENT = spelled(
    "rnn_tanh rnn_relu lstm gru rnn_tanh_cell rnn_relu_cell lstm_cell gru_cell"
)  # activations inside
MATRIX_PRODUCTS = spelled(
    "matmul __matmul__ __rmatmul__ mm mv bmm einsum tensordot addmm baddbmm multi_dot bilinear"
)
ROWS_BY_MATRIX = spelled("matmul __matmul__ mm")
CONVOLUTIONS = spelled("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution")
NORMS = spelled("norm vector_norm matrix_norm")  # of one number each they are its absolute value

_FILLS = SHIFTS | spelled(  # with a number that is given
    "pad constant_pad_nd masked_fill index_fill fill where nan_to_num tril triu"
)
LIKE = spelled(  # take a map's shape and nothing else
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor size dim",
)
LEAVING = spelled("numpy tolist __array__ __dlpack__")  # what is made of them comes back as a constant
SHAPED = spelled(
    "expand_as view_as reshape_as type_as"
)  # take a second tensor's shape or type and nothing else
_AFFINE = (
    SHIFTS
    | CASTS
    | spelled("sum mean cumsum diff trace sum_to_size neg negative positive __neg__ __pos__")
    | spelled("clone contiguous cpu cuda copy requires_grad nan_to_num")
    | spelled(  # arrangements
        "reshape reshape_as view view_as flatten unflatten ravel squeeze unsqueeze atleast_1d atleast_2d atleast_3d",
        "permute transpose swapaxes swapdims movedim moveaxis t adjoint rot90 flip fliplr flipud roll expand expand_as",
        "broadcast_to broadcast_tensors repeat repeat_interleave tile chunk split split_with_sizes unsafe_chunk",
        "unsafe_split unsafe_split_with_sizes tensor_split hsplit vsplit dsplit unbind narrow narrow_copy select",
        "__getitem__ __iter__ __reversed__ diagonal diag diag_embed diagflat tril triu cat concat concatenate",
        "stack hstack vstack dstack column_stack row_stack block_diag meshgrid cartesian_prod unfold fold pad",
        "constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle",
    )
    | {getattr(T, name).__get__ for name in ("T", "mT", "H", "mH")}
    | spelled(  # at given places
        "__setitem__ index_select index_add index_copy index_fill index_put gather take take_along_dim scatter",
        "scatter_add select_scatter slice_scatter diagonal_scatter masked_fill masked_select masked_scatter where",
        "zero fill max_unpool1d max_unpool2d max_unpool3d",
    )
    | spelled(  # averages
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
        "interpolate upsample upsample_nearest upsample_bilinear",
    )
    # in evaluation mode; srd_lab.engine.spellings.DROPPING knows when chance has a part
    | spelled("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout")
)


def is_affine(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], moving: list[Tensor]
) -> bool:
    """Whether a call that is no layer is known to be affine in the maps among its operands, or to select from one.

    moving : the maps among its operands.

    Example
    -------
    >>> a, b = torch.zeros(1), torch.ones(1)
    >>> is_affine(torch.mul, (a, b), {}, [a]), is_affine(torch.mul, (a, b), {}, [a, b])
    (True, False)
    """
    if function in PRODUCTS:
        first = args[0] if args else kwargs.get("input")
        return (
            len(moving) == 1
            and kwargs.get("rounding_mode") is None
            and (first is moving[0] or function not in _IN_FIRST)
        )
    if function in SELECTIONS:
        return len(tensors_in(args, kwargs)) == 1
    return function in _AFFINE and kwargs.get("reduce") in (None, "add")


def brings_constants(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], maps: list[Tensor]
) -> bool:
    """Whether what an affine call puts out may contain something that is made of no map."""
    if function in _PLAIN_PRODUCTS or not is_affine(function, args, kwargs, maps):
        return False
    return function in _FILLS or len(maps) < len(tensors_in(args, kwargs))


def fills(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], maps: list[Tensor]) -> bool:
    """Whether an affine call puts numbers that are made of no map beside those of its maps: behind a pad, say.

    Example
    -------
    >>> x = torch.zeros(1)
    >>> fills(torch.cat, ([x, torch.ones(1)],), {}, [x]), fills(torch.add, (x, torch.ones(1)), {}, [x])
    (True, False)
    """
    if function in SHIFTS or function in PRODUCTS or not is_affine(function, args, kwargs, maps):
        return False
    numbers = (*args[1:], *kwargs.values())
    if any(isinstance(n, float) and n == -torch.inf for n in numbers):  # never the largest
        return False
    constants = [
        t for t in tensors_in(args, kwargs) if t.is_floating_point() and not any(t is x for x in maps)
    ]
    return bool(constants) or (function in _FILLS and kwargs.get("mode", "constant") == "constant")


def exchanged(
    args: tuple[Any, ...], kwargs: dict[str, Any], table: dict[int, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with the tensors of these ids exchanged, one level of lists deep.

    table : by the id of a tensor, what takes its place.
    """

    def one(arg: Any) -> Any:
        return table.get(id(arg), arg)

    def each(arg: Any) -> Any:
        return type(arg)(map(one, arg)) if type(arg) in (tuple, list) else one(arg)

    return tuple(map(each, args)), {name: each(arg) for name, arg in kwargs.items()}


def constant_part(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], moving: list[Tensor]
) -> Tensor:
    """What an affine call makes of zeros: of ``x + 1`` it is 1.

    Example
    -------
    >>> x = torch.rand(3)
    >>> constant_part(torch.add, (x, 1), {}, [x])
    tensor([1., 1., 1.])
    """
    return called_with(0, function, args, kwargs, moving)


def called_with(
    value: float, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], moving: list[Tensor]
) -> Tensor:
    """What a call makes of maps that are ``value`` everywhere."""
    with torch.no_grad():
        table = {id(t): torch.full_like(t, value) for t in moving}
        if overwrites(function, kwargs):  # a constant of the model stays as it is
            table.setdefault(id(args[0]), args[0].clone())
        args, kwargs = exchanged(args, kwargs, table)
        return function(*args, **kwargs)


def overwrites(function: Function, kwargs: dict[str, Any]) -> bool:
    """Whether a call writes its result into its first argument.

    Example
    -------
    >>> overwrites(torch.Tensor.add_, {}), overwrites(torch.add, {})
    (True, False)
    """
    name = getattr(function, "__name__", "").replace("__ipow__", "pow_")
    return bool(kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))
