"""What a torch function does to the places of its operands' entries: the row and the column of the image that each lies at.

What moves entries does the same to their coordinates. Convolutions and pools take those in the middle of their windows. A
sum, as over channels, takes their mean, unless they lie all over the image: then there is none, as there is behind whatever
is not known to keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, nan
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from srd_lab.engine.affine import CASTS, COPIES, DIVISIONS, LIKE, SHIFTS, exchanged, spelled
from srd_lab.engine.letters import WRITTEN_IN_LETTERS, in_letters, sums_nothing
from srd_lab.engine.spellings import Function, recognise, tensors_in

T = torch.Tensor
_STAYING = (SHIFTS | DIVISIONS | CASTS | COPIES) | spelled(  # entry by entry, or scaled by what lies around
    "mul multiply __mul__ __rmul__ __imul__ addcmul lerp where masked_fill neg sigmoid hardsigmoid requires_grad",
    "softmax log_softmax batch_norm layer_norm group_norm instance_norm local_response_norm rms_norm normalize dropout",
)
_JOINING = spelled(
    "cat concat concatenate stack hstack vstack dstack select_scatter slice_scatter diagonal_scatter index_copy index_put",
    "scatter",
)
_MOVING = _JOINING | spelled(
    "reshape reshape_as view view_as flatten unflatten ravel squeeze unsqueeze permute transpose swapaxes movedim moveaxis",
    "t flip fliplr flipud rot90 roll expand expand_as broadcast_to repeat repeat_interleave tile chunk split tensor_split",
    "unbind narrow select __getitem__ diagonal index_select gather take_along_dim pixel_shuffle pixel_unshuffle",
    "channel_shuffle",
)
_PRODUCTS = spelled("matmul __matmul__ mm bmm addmm baddbmm")
_NOT_KNOWN = (RuntimeError, TypeError, IndexError, KeyError, ValueError, AttributeError)


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Where in the image the entries of a tensor lie.

    rows, columns : in pixels from 0, of the shape of the tensor; NaN where an entry has no one place.
    image : height and width of the image, in pixels.
    cell : how far apart, in pixels, two entries may lie and still count as being at the same place.
    """

    rows: Tensor
    columns: Tensor
    image: tuple[int, int]
    cell: float = 1.0

    @classmethod
    def of_image(cls, x: Tensor) -> Coordinates:
        """Those of images x (N, C, H, W)."""
        rows, columns = (torch.arange(float(n), device=x.device) for n in x.shape[2:])
        return cls(rows[:, None].expand(x.shape), columns.expand(x.shape), (x.shape[2], x.shape[3]))

    def each(self, function: Callable[[Tensor], Tensor]) -> Coordinates:
        """Both changed by ``function``."""
        return Coordinates(function(self.rows), function(self.columns), self.image, self.cell)

    def expand(self, shape: torch.Size) -> Coordinates:
        """Those of the tensor that this one is stretched into by broadcasting."""
        return self if self.rows.shape == shape else self.each(lambda t: t.expand(shape))


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
            return [_agreed(self.known.values(), out.shape)]
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
            return [_agreed(self.known.values(), out.shape)]
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
        if (
            self.function not in _JOINING and id(tensors[0]) not in self.known
        ):  # others give a shape, or say where to look
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
            moved.append([_compact(t) for t in (out if isinstance(out, tuple | list) else (out,))])
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
                of = _mean(self.known[id(t)], summed)
                laid = [p.permute(order)[index].expand(shape) for p in (of.rows, of.columns)]
                found.append(replace(of, rows=laid[0], columns=laid[1]))
        if sums_nothing(self.function, self.args):
            return _agreed(found, shape)
        return _first_of(found[0], found[-1])


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


# what is done to coordinates ---------------------------------------------------------------------------
def _agreed(known: Iterable[Coordinates], shape: torch.Size) -> Coordinates:
    """Where all operands of a call lie that have a place; none where two are apart."""
    operands = sorted((of.expand(shape) for of in known), key=lambda of: of.cell)
    found, apart = operands[0], None
    for other in operands[1:]:
        far = _far(found.rows, other.rows, other.cell) | _far(found.columns, other.columns, other.cell)
        apart = far if apart is None else apart | far
        found = _first_of(found, other) or found
    if apart is None or not apart.any():
        return found
    rows, columns = (t.masked_fill(apart, nan) for t in (found.rows, found.columns))
    return replace(found, rows=rows, columns=columns)


def _far(a: Tensor, b: Tensor, near: float) -> Tensor:
    return (thin(a) - thin(b)).abs() > near


def _first_of(one: Coordinates | None, other: Coordinates | None) -> Coordinates | None:
    """The coordinates of ``one``; where it has none, those of ``other``."""
    if one is None or other is None or one.rows is other.rows:
        return one or other
    if not (thin(one.rows).isnan().any() or thin(one.columns).isnan().any()):
        return one
    rows, columns = (
        torch.where(thin(a).isnan(), thin(b), thin(a)).expand(a.shape)
        for a, b in ((one.rows, other.rows), (one.columns, other.columns))
    )
    return Coordinates(rows, columns, one.image, max(one.cell, other.cell))


def thin(t: Tensor) -> Tensor:
    """``t`` without the copies of its entries along the axes that it was expanded over, which stay with size 1."""
    return t[tuple(slice(None) if stride else slice(0, 1) for stride in t.stride())]


def _compact(t: Tensor) -> Tensor:
    """``t`` with an axis along which it has the same entries everywhere as one that it is expanded over."""
    shape, t = t.shape, thin(t)
    for axis, size in enumerate(t.shape):
        first = t.narrow(axis, 0, 1)
        if size > 1 and bool(((t == first) | (t.isnan() & first.isnan())).all()):
            t = first
    return t.expand(shape)


def _mean(of: Coordinates, dims: Sequence[int]) -> Coordinates:
    """The mean over some axes, which stay with size 1; none where the entries lie over more than half of the image."""
    if not dims:
        return of
    cell, made = of.cell, []
    summed = {d % of.rows.dim() for d in dims}
    for t, size in zip((of.rows, of.columns), of.image, strict=True):
        shape = [1 if i in summed else n for i, n in enumerate(t.shape)]
        t, axes = thin(t), tuple(summed)
        spread = (t.nan_to_num(-inf).amax(axes, True) - t.nan_to_num(inf).amin(axes, True)).clamp_min(0)
        wide = spread > size / 2
        cell = max(cell, of.cell + float(spread.masked_fill(wide, 0).amax()))
        made.append(t.nanmean(axes, keepdim=True).masked_fill(wide, nan).expand(shape))
    return Coordinates(made[0], made[1], of.image, cell)


def _product(one: Coordinates | None, other: Coordinates | None, shape: torch.Size) -> Coordinates | None:
    """A product of matrices has the rows of the first, and the columns of the second where those have no place."""
    first = None if one is None else _mean(one, (-1,)).expand(shape)
    second = None if other is None else _mean(other, (-2,)).expand(shape)
    return _first_of(first, second)


def _taken(
    of: Coordinates, shape: torch.Size, axes: int, middle: Callable[[Tensor, int, int], Tensor]
) -> Coordinates:
    """The entries in the middle of windows over the last ``axes`` axes; over an axis that becomes one entry, the mean.

    shape : of the output. middle : of the windows, given their numbers, the axis from 0, and the input's size there.
    """
    before = of.rows.shape
    whole = [i - axes for i in range(axes) if shape[i - axes] == 1 < before[i - axes]]
    of = _mean(of, whole)

    def taken(t: Tensor) -> Tensor:
        t = thin(t)
        for i in range(axes):
            axis = i - axes
            if t.shape[axis] > 1:
                at = middle(torch.arange(float(shape[axis]), device=t.device), i, before[axis])
                at = at.clamp(0, before[axis] - 1)
                below, above = (t.index_select(axis, side.long()) for side in (at.floor(), at.ceil()))
                t = (below + above) / 2
        return t.expand(shape)

    return of.each(taken)


# the functions that have one map ------------------------------------------------------------------------
def _last_summed(of: Coordinates, shape: torch.Size, *args: Any, **kwargs: Any) -> Coordinates:
    """A linear layer; and attention, whose output lies where the queries do."""
    return _mean(of, (-1,)).expand(shape)


def _convolved(
    of: Coordinates,
    shape: torch.Size,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *groups: Any,
    **others: Any,
) -> Coordinates:
    axes = weight.dim() - 2
    spans = [d * (k - 1) for d, k in zip(_each(dilation, axes), weight.shape[2:], strict=True)]
    padded = {"same": [span // 2 for span in spans], "valid": [0] * axes}
    starts, steps = padded[padding] if padding in padded else _each(padding, axes), _each(stride, axes)
    middle = [span / 2 + off for span, off in zip(spans, _off_centre(weight, spans), strict=True)]
    of = _mean(of, (-axes - 1,))
    channel = [*shape[: -axes - 1], 1, *shape[-axes:]]
    taken = _taken(
        of, torch.Size(channel), axes, lambda n, i, size: n * steps[i] - starts[i] + middle[i]
    ).expand(shape)
    return Coordinates(taken.rows, taken.columns, of.image, of.cell * max(steps))


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
    """A transposed convolution: the middle of all that an entry is made of."""
    axes = weight.dim() - 2
    spans = [d * (k - 1) for d, k in zip(_each(dilation, axes), weight.shape[2:], strict=True)]
    starts, steps = _each(padding, axes), _each(stride, axes)
    middle = [span / 2 + off for span, off in zip(spans, _off_centre(weight, spans), strict=True)]
    of = _mean(of, (-axes - 1,))
    channel = torch.Size([*shape[: -axes - 1], 1, *shape[-axes:]])
    return _taken(of, channel, axes, lambda n, i, size: (n + starts[i] - middle[i]) / steps[i]).expand(shape)


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
        taken = _taken(of, shape, axes, lambda n, i, size: n * steps[i] - starts[i] + spans[i] / 2)
        return Coordinates(taken.rows, taken.columns, of.image, of.cell * max(steps))

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
    of = _mean(of, (-3,))
    taken = _taken(
        of,
        torch.Size([*of.rows.shape[:-2], *windows]),
        2,
        lambda n, i, size: n * steps[i] - starts[i] + spans[i] / 2,
    )
    return taken.each(lambda t: t.flatten(-2).expand(shape))


def _glu(of: Coordinates, shape: torch.Size, dim: int = -1) -> Coordinates:
    return of.each(lambda t: t.chunk(2, dim)[0])


def _resized(of: Coordinates, shape: torch.Size, *args: Any, **kwargs: Any) -> Coordinates:
    """Adaptive pooling and interpolation."""
    axes = 2
    return _taken(of, shape, axes, lambda n, i, size: (n + 0.5) * size / shape[i - axes] - 0.5)


def _padded(of: Coordinates, shape: torch.Size, pad: Sequence[int], *args: Any, **kwargs: Any) -> Coordinates:
    """What is put beside a map lies where its edge does."""
    axes = len(pad) // 2
    return _taken(of, shape, axes, lambda n, i, size: n - pad[2 * (axes - 1 - i)])


def _reduced(of: Coordinates, shape: torch.Size, *args: Any, **kwargs: Any) -> Coordinates | None:
    dim = kwargs.get("dim", kwargs.get("axis", args[0] if args else None))
    if isinstance(dim, Tensor):  # the larger of two maps
        return None
    dims = range(of.rows.dim()) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    return _mean(of, list(dims)).each(lambda t: t.reshape(shape))


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
