"""What a torch function does to the places of its operands' entries: the row and the column of the image that each lies at.

What moves entries does the same to their coordinates. Convolutions and pools take those in the middle of their windows. A
sum, as over channels, takes their mean, unless they lie all over the image: then there is none, as there is behind whatever
is not known to keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from srd_lab.engine.affine import CASTS, COPIES, DIVISIONS, JOINS, LIKE, SHIFTS, exchanged, spelled
from srd_lab.engine.coordinates import Coordinates, agreed, compact, first_of, mean, taken
from srd_lab.engine.letters import WRITTEN_IN_LETTERS, in_letters, sums_nothing
from srd_lab.engine.spellings import Function, recognise, tensors_in

T = torch.Tensor
_STAYING = (SHIFTS | DIVISIONS | CASTS | COPIES) | spelled(  # entry by entry, or scaled by what lies around
    "mul multiply __mul__ __rmul__ __imul__ addcmul lerp where masked_fill neg sigmoid hardsigmoid requires_grad",
    "softmax log_softmax batch_norm layer_norm group_norm instance_norm local_response_norm rms_norm normalize dropout",
)
_JOINING = JOINS | spelled("select_scatter slice_scatter diagonal_scatter index_copy index_put scatter")
_MOVING = _JOINING | spelled(
    "reshape reshape_as view view_as flatten unflatten ravel squeeze unsqueeze permute transpose swapaxes movedim moveaxis",
    "t flip fliplr flipud rot90 roll expand expand_as broadcast_to repeat repeat_interleave tile chunk split tensor_split",
    "unbind narrow select __getitem__ diagonal index_select gather take_along_dim pixel_shuffle pixel_unshuffle",
    "channel_shuffle",
)
_PRODUCTS = spelled("matmul __matmul__ mm bmm addmm baddbmm")
_NOT_KNOWN = (RuntimeError, TypeError, IndexError, KeyError, ValueError, AttributeError)


@dataclass(frozen=True)
class CallOnPlaces:
    """A call of a torch function that was made.

    known : the coordinates of its operands as they were before it, by the id of the tensor; not empty.
    outs : what it put out.
    """

    function: Function
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    known: dict[int, Coordinates]
    outs: Sequence[Any]

    def coordinates(self) -> list[Coordinates | None]:
        """Those of each of its outputs; None for what has none."""
        out = self.outs[0] if self.outs else None
        if not isinstance(out, Tensor) or self.function in LIKE:
            return [None] * len(self.outs)
        try:
            found = self._found(out)
        except _NOT_KNOWN:  # called in a way that is not known here
            return [None] * len(self.outs)
        return [
            of if of is not None and isinstance(t, Tensor) and of.rows.shape == t.shape else None
            for of, t in zip(found, self.outs, strict=True)
        ]

    @property
    def stays(self) -> bool:
        """Whether it is known to leave every entry where it is."""
        return self.function in _STAYING or recognise(self.function, self.args, self.kwargs) is not None

    def _found(self, out: Tensor) -> Sequence[Coordinates | None]:
        tensors = tensors_in(self.args, self.kwargs)
        if self.stays:
            return [agreed(self.known.values(), out.shape)]
        if self.function in _RULES:
            first, *rest = self.args or (self.kwargs["input"],)
            named = {name: value for name, value in self.kwargs.items() if name != "input"}
            of = self.known.get(id(first))
            found = None if of is None else _RULES[self.function](of, out.shape, *rest, **named)
            return [found] * len(self.outs)
        if self.function in _PRODUCTS:
            first, second = (self.known.get(id(t)) for t in tensors[-2:])
            return [_product(first, second, out.shape)]
        if self.function in WRITTEN_IN_LETTERS:
            return [self._in_letters(out.shape)]
        if self.function is T.copy_:
            return [self.known[id(self.args[1])].expand(out.shape)]
        if self.function in _MOVING or any(out is not t and _memory(t) == _memory(out) for t in tensors):
            return self._moved(tensors)
        if self._works_entry_by_entry(out):
            return [agreed(self.known.values(), out.shape)]
        return [None] * len(self.outs)

    def _works_entry_by_entry(self, out: Tensor) -> bool:
        """Tried with two operands of which half is the same: whether the same half of the output is."""
        drawn = torch.Generator(out.device).manual_seed(0)
        for t in tensors_in(self.args, self.kwargs):
            if id(t) not in self.known:
                continue
            if t.shape != out.shape or not t.is_floating_point():
                return False
            one, other, which = (
                torch.rand(t.shape, generator=drawn, device=t.device).to(t) for _ in range(3)
            )
            same = which < 0.5
            made = [self._with({id(t): u})[same] for u in (one.clone(), torch.where(same, one, other))]
            if not torch.equal(made[0].nan_to_num(), made[1].nan_to_num()):
                return False
        return True

    def _moved(self, tensors: list[Tensor]) -> list[Coordinates | None]:
        """Entries that are put elsewhere take their coordinates with them; constants beside them have none."""
        some = next(iter(self.known.values()))
        # what is not moved gives a shape, or says where to look
        if self.function not in _JOINING and id(tensors[0]) not in self.known:
            return [None] * len(self.outs)
        moved = []
        for place in ("rows", "columns"):
            joined = [t for t in tensors if t.is_floating_point() and self.function in _JOINING]
            table = {id(t): torch.full(t.shape, nan).to(some.rows) for t in joined}
            table |= {key: getattr(of, place) for key, of in self.known.items()}
            try:
                out = self._with({key: t.expand(t.shape) for key, t in table.items()})
            except RuntimeError:  # no such view of what is expanded
                like = {id(t): t for t in tensors}
                out = self._with(
                    {k: torch.empty_like(like[k], dtype=t.dtype).copy_(t) for k, t in table.items()}
                )
            moved.append([compact(t) for t in (out if isinstance(out, tuple | list) else (out,))])
        cell = max(of.cell for of in self.known.values())
        return [Coordinates(rows, columns, some.image, cell) for rows, columns in zip(*moved, strict=True)]

    def _with(self, table: dict[int, Tensor]) -> Any:
        args, kwargs = exchanged(self.args, self.kwargs, table)
        return self.function(*args, **kwargs)

    def _in_letters(self, shape: torch.Size) -> Coordinates | None:
        """Over letters that are summed the mean is taken; where both operands have places, the first's count."""
        if (written := in_letters(self.function, self.args, self.kwargs)) is None:
            return None
        found, (operands, rows, result) = [], written
        for t, letters in zip(operands, rows, strict=True):
            if id(t) in self.known:
                summed = [i for i, letter in enumerate(letters) if letter not in result]
                kept = [letters.index(letter) for letter in result if letter in letters]
                order = (*kept, *summed)
                stretched = [slice(None) if letter in letters else None for letter in result]
                index = (*stretched, *[0] * len(summed))
                of = mean(self.known[id(t)], summed)
                laid = [p.permute(order)[index].expand(shape) for p in (of.rows, of.columns)]
                found.append(replace(of, rows=laid[0], columns=laid[1]))
        if sums_nothing(self.function, self.args):
            return agreed(found, shape)
        return first_of(found[0], found[-1])


def written_into(target: Tensor, index: Any, value: Any, known: dict[int, Coordinates]) -> Coordinates:
    """The coordinates of ``target`` behind ``target[index] = value``.

    known : as for :class:`CallOnPlaces`; one of both has some.
    """
    before, new = known.get(id(target)), known.get(id(value))
    some = next(iter(known.values()))
    made = []
    for place in ("rows", "columns"):
        t = torch.full(target.shape, nan).to(some.rows) if before is None else getattr(before, place).clone()
        t[index] = nan if new is None else getattr(new, place)
        made.append(t)
    return replace(some, rows=made[0], columns=made[1])


def _product(one: Coordinates | None, other: Coordinates | None, shape: torch.Size) -> Coordinates | None:
    """A product of matrices has the rows of the first, and the columns of the second where those have no place."""
    first = None if one is None else mean(one, (-1,)).expand(shape)
    second = None if other is None else mean(other, (-2,)).expand(shape)
    return first_of(first, second)


# the functions that have one map ------------------------------------------------------------------------
def _last_summed(of: Coordinates, shape: torch.Size, *args: Any, **kwargs: Any) -> Coordinates:
    """A linear layer; and attention, whose output lies where the queries do."""
    return mean(of, (-1,)).expand(shape)


def _convolved(
    of: Coordinates,
    shape: torch.Size,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *groups: Any,
    back: bool = False,
    **others: Any,
) -> Coordinates:
    """A convolution; ``back``: the middle of all that an entry of a transposed one is made of."""
    axes = weight.dim() - 2
    spans = [d * (k - 1) for d, k in zip(_each(dilation, axes), weight.shape[2:], strict=True)]
    padded = {"same": [span // 2 for span in spans], "valid": [0] * axes}
    starts = padded[padding] if isinstance(padding, str) else _each(padding, axes)
    steps = _each(stride, axes)
    middle = [span / 2 + off for span, off in zip(spans, _off_centre(weight, spans), strict=True)]

    def at(n: Tensor, i: int, size: int) -> Tensor:
        return (n + starts[i] - middle[i]) / steps[i] if back else n * steps[i] - starts[i] + middle[i]

    one_channel = torch.Size([*shape[: -axes - 1], 1, *shape[-axes:]])
    found = taken(mean(of, (-axes - 1,)), one_channel, axes, at).expand(shape)
    return replace(found, cell=of.cell * (1 if back else max(steps)))


def _convolved_back(
    of: Coordinates,
    shape: torch.Size,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Coordinates:
    """A transposed convolution, whose arguments stand in another order."""
    return _convolved(of, shape, weight, bias, stride, padding, dilation, back=True)


def _off_centre(weight: Tensor, spans: Sequence[int]) -> list[float]:
    """How far from the middle of its window a convolution's weights lie, along each axis; 0 if less than a quarter of it."""
    size, off = weight.detach().abs().float().flatten(0, 1).sum(0), []
    for axis, span in enumerate(spans):
        along = size.sum([i for i in range(size.dim()) if i != axis]) if size.dim() > 1 else size
        taps = torch.linspace(-span / 2, span / 2, len(along), device=along.device)
        middle = float((along * taps).sum() / along.sum().clamp_min(1e-30))
        off.append(middle if abs(middle) > span / 4 else 0.0)
    return off


def _pooled(axes: int) -> Callable[..., Coordinates]:
    def pooled(
        of: Coordinates,
        shape: torch.Size,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        *others: Any,
        dilation: Any = 1,
        **named: Any,
    ) -> Coordinates:
        spans = [d * (k - 1) for d, k in zip(_each(dilation, axes), _each(kernel_size, axes), strict=True)]
        starts, steps = _each(padding, axes), _each(stride or kernel_size, axes)
        found = taken(of, shape, axes, lambda n, i, size: n * steps[i] - starts[i] + spans[i] / 2)
        return replace(found, cell=of.cell * max(steps))

    return pooled


def _unfolded(
    of: Coordinates,
    shape: torch.Size,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> Coordinates:
    """``F.unfold``, (N, C k k, windows)."""
    spans = [d * (k - 1) for d, k in zip(_each(dilation, 2), _each(kernel_size, 2), strict=True)]
    starts, steps = _each(padding, 2), _each(stride, 2)
    sizes = of.rows.shape[-2:]
    windows = [
        (n + 2 * p - span - 1) // s + 1 for n, p, span, s in zip(sizes, starts, spans, steps, strict=True)
    ]
    of = mean(of, (-3,))
    found = taken(
        of,
        torch.Size([*of.rows.shape[:-2], *windows]),
        2,
        lambda n, i, size: n * steps[i] - starts[i] + spans[i] / 2,
    )
    return found.each(lambda t: t.flatten(-2).expand(shape))


def _glu(of: Coordinates, shape: torch.Size, dim: int = -1) -> Coordinates:
    return of.each(lambda t: t.chunk(2, dim)[0])


def _resized(of: Coordinates, shape: torch.Size, *args: Any, **kwargs: Any) -> Coordinates:
    """Adaptive pooling and interpolation."""
    axes = 2
    return taken(of, shape, axes, lambda n, i, size: (n + 0.5) * size / shape[i - axes] - 0.5)


def _padded(of: Coordinates, shape: torch.Size, pad: Sequence[int], *args: Any, **kwargs: Any) -> Coordinates:
    """What is put beside a map lies where its edge does."""
    axes = len(pad) // 2
    return taken(of, shape, axes, lambda n, i, size: n - pad[2 * (axes - 1 - i)])


def _reduced(of: Coordinates, shape: torch.Size, *args: Any, **kwargs: Any) -> Coordinates | None:
    dim = kwargs.get("dim", kwargs.get("axis", args[0] if args else None))
    if isinstance(dim, Tensor):  # the larger of two maps
        return None
    dims = range(of.rows.dim()) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    return mean(of, list(dims)).each(lambda t: t.reshape(shape))


def _norm(of: Coordinates, shape: torch.Size, p: Any = 2, *args: Any, **kwargs: Any) -> Coordinates | None:
    return _reduced(of, shape, *args, **kwargs)


def _each(value: Any, axes: int) -> list[int]:
    return [value] * axes if isinstance(value, int) else (list(value) * axes)[:axes]


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


_RULES: dict[Function, Callable[..., Coordinates | None]] = {
    **dict.fromkeys((F.linear, F.scaled_dot_product_attention, F.multi_head_attention_forward), _last_summed),
    **dict.fromkeys(spelled("conv1d conv2d conv3d"), _convolved),
    **dict.fromkeys(spelled("conv_transpose1d conv_transpose2d conv_transpose3d"), _convolved_back),
    **{
        function: _pooled(axes)
        for axes in (1, 2, 3)
        for function in spelled(
            *(f"{kind}_pool{axes}d" for kind in ("avg", "max")), f"max_pool{axes}d_with_indices"
        )
    },
    F.unfold: _unfolded,
    torch.view_as_complex: lambda of, shape: of.each(lambda t: t.select(-1, 0)),
    torch.view_as_real: lambda of, shape: of.each(lambda t: t.unsqueeze(-1).expand(shape)),
    F.glu: _glu,
    **dict.fromkeys(
        spelled(
            "adaptive_avg_pool2d adaptive_max_pool2d interpolate upsample upsample_nearest upsample_bilinear"
        ),
        _resized,
    ),
    **dict.fromkeys(spelled("pad constant_pad_nd"), _padded),
    **dict.fromkeys(spelled("sum mean amax amin max min std var median prod logsumexp"), _reduced),
    **dict.fromkeys(spelled("norm vector_norm"), _norm),
}
